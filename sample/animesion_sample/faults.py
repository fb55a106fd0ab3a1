"""Fault injection for HTTP servers: the faults that crawlers meet, over real sockets, http and https.

A middleware damages the responses of any aiohttp application, by a plan or on request with `?fault=NAME`. `LocalServer`
runs an application on a thread and keeps a journal. The API of the sample booru is in `api`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

STATUSES = {
    "401": "the caller is not known",
    "402": "the caller's kind is not wanted",
    "404": "no such file",
    "410": "gone",
    "422": "not a request that can be served",
    "451": "taken down",
}
LASTING = {
    **STATUSES,
    "403 challenge": "a firewall's HTML page with status 403",
    "wrong md5": "other bytes than announced",
    "wrong type": "a JSON error instead of an image, with status 200",
    "empty": "no bytes",
    "endless": "a body without end",
    "redirect loop": "a redirect to itself",
    "private redirect": "a redirect to a cloud's metadata address",
    "file redirect": "a redirect to a file: URL",
    "compressed": "a gzip bomb that was not requested",
    "noai": "X-Robots-Tag: noai",
}
"""Permanent faults of a file."""

PASSING = {
    "429": "too many requests",
    "429 wait": "too many requests, Retry-After one second",
    "500": "internal error",
    "503": "out of order for a moment",
    "challenge": "a firewall's HTML page with status 200",
    "drip": "one byte now and then",
    "stall": "half of the body, then silence",
    "silent": "no answer at all",
    "reset": "half of the body, then a TCP reset",
    "truncated": "half of the body, then the end of the connection",
    "wrong length": "a longer Content-Length than the body",
    "garbage": "something that is not HTTP",
}
"""Temporary faults of a file, gone after a few requests."""

LISTING = {
    "invalid json": "JSON cut in half",
    "duplicates": "each page begins with the last post of the page before",
    "vanishing": "some posts are missing from their page",
    "absent fields": "some posts have neither `md5` nor `file_url`",
    "html": "an HTML page with status 200",
    "single object": "a page with one post has the post itself instead of a list",
    "missing post": "a document of posts without its posts",
}
"""Faults of a listing, which is a bare list of posts or a document with one."""

FAULTS = {**LASTING, **PASSING, **LISTING}

CHALLENGE = b"<!DOCTYPE html><html><head><title>Just a moment...</title></head><body>cf-chl</body></html>"
_PATIENCE = 600.0
_ENDLESS = 1 << 14
"""Pieces of 64 KiB in an endless body: 1 GiB is above the limit of any crawler."""

_BOMB = gzip.compress(bytes(1 << 20)) * 80
"""80 MiB after decompression, above the default limit of a file."""

_LISTS = ("post", "posts", "items")
"""Keys of the list of posts in documents."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class FaultPlan:
    """Choice of the faulty responses, which depends only on the path and the seed.

    Attributes:
        share: Share of the paths below `prefix` that are faulty, 0 to 1.
        seed: Seed of the choice.
        kinds: Names of the faults, from `FAULTS`, all equally frequent.
        times: How often a path has its `PASSING` fault before it works.
        prefix: Prefix of the paths to which the plan applies.
        drip: Seconds between two bytes of a drip.
    """

    share: float = 0.3
    seed: int = 0
    kinds: tuple[str, ...] = (*LASTING, *PASSING)
    times: int = 1
    prefix: str = "/data/"
    drip: float = 0.2

    def __post_init__(self) -> None:
        """Check the names of the faults."""
        if unknown := set(self.kinds) - FAULTS.keys():
            raise ValueError(f"There is no fault {min(unknown)!r}: use {', '.join(FAULTS)}.")

    def fault(self, path: str) -> str:
        """The fault of a path; empty for none."""
        if not path.startswith(self.prefix) or not self.kinds:
            return ""
        digest = hashlib.sha256(f"{self.seed}/{path}".encode()).digest()
        if int.from_bytes(digest[:8], "big") >= self.share * 2**64:
            return ""
        return self.kinds[int.from_bytes(digest[8:16], "big") % len(self.kinds)]


def inject_faults(plan: FaultPlan) -> Middleware:
    """A middleware that injects the faults of a plan, and those requested with `fault=NAME` in the query."""
    injected: Counter[str] = Counter()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        requested = request.query.get("fault", "")
        fault = requested if requested in FAULTS else plan.fault(request.path)
        if fault in PASSING:
            times = int(request.query.get("times", plan.times))
            if injected[request.path_qs] >= times:
                fault = ""
            injected[request.path_qs] += bool(fault)
        if not fault:
            return await handler(request)
        return await _respond_with_fault(fault, plan, request, handler)

    return middleware


async def _respond_with_fault(
    fault: str, plan: FaultPlan, request: web.Request, handler: Handler
) -> web.StreamResponse:
    if fault in STATUSES or fault in {"429", "500", "503"}:
        return web.json_response({"success": False, "message": f"{fault} as asked"}, status=int(fault))
    match fault:
        case "429 wait":
            return web.Response(status=429, headers={"Retry-After": "1"})
        case "403 challenge":
            return web.Response(
                body=CHALLENGE, status=403, content_type="text/html", headers={"cf-mitigated": "challenge"}
            )
        case "challenge" | "html":
            return web.Response(body=CHALLENGE, content_type="text/html")
        case "wrong type":
            return web.json_response({"success": False, "message": "the file is being prepared"})
        case "empty":
            return web.Response(body=b"", content_type="image/jpeg")
        case "redirect loop":
            return web.Response(status=302, headers={"Location": request.path_qs})
        case "private redirect":
            return web.Response(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data/"})
        case "file redirect":
            return web.Response(status=302, headers={"Location": "file:///etc/passwd"})
        case "compressed":
            return web.Response(body=_BOMB, headers={"Content-Encoding": "gzip"}, content_type="image/jpeg")
        case "silent":
            await asyncio.sleep(_PATIENCE)
        case "garbage":
            assert request.transport is not None
            request.transport.write(b"\x00\x01 not HTTP at all\r\n\r\n")
            request.transport.close()
    if request.transport is None or request.transport.is_closing():
        return web.Response(status=500)
    answer = await handler(request)
    if not isinstance(answer, web.Response) or answer.status != 200 or not isinstance(answer.body, bytes):
        return answer  # not a file that a fault could damage
    if fault == "noai":
        answer.headers["X-Robots-Tag"] = "noai, noimageai"
        return answer
    if fault == "wrong md5":
        answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1]) if answer.body else b"?"
        return answer
    if fault in LISTING:
        answer.body = _damage_listing(fault, answer.body, request)
        return answer
    await _send_faulty_body(fault, plan, request, answer.body)
    return web.Response(status=500)  # never sent: the connection is closed


async def _send_faulty_body(fault: str, plan: FaultPlan, request: web.Request, body: bytes) -> None:
    """Send a body with a fault of the transfer, and close the connection."""
    response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
    if fault not in {"endless", "drip"}:
        response.content_length = len(body) + (1000 if fault == "wrong length" else 0)
    transport = request.transport
    if transport is None:
        return
    with contextlib.suppress(ConnectionError):  # the client may disconnect first
        await response.prepare(request)
        match fault:
            case "endless":
                for _ in range(_ENDLESS):
                    await response.write(bytes(1 << 16))
                    await asyncio.sleep(0)  # over TLS, only the event loop notices that the peer has disconnected
                    if transport.is_closing():
                        break
            case "drip":
                for place in range(len(body)):
                    await response.write(body[place : place + 1])
                    await asyncio.sleep(plan.drip)
            case "wrong length":
                await response.write(body)
            case _:
                await response.write(body[: len(body) // 2])
        if fault == "stall":
            await asyncio.sleep(_PATIENCE)
    if fault == "reset" and (raw := transport.get_extra_info("socket")):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def _damage_listing(fault: str, body: bytes, request: web.Request) -> bytes:
    if fault == "invalid json":
        return body[: len(body) // 2]
    try:
        document: Any = json.loads(body)
    except ValueError:
        return body  # some sites send an empty body where others send []
    name = next((name for name in _LISTS if name in document), "") if isinstance(document, dict) else ""
    posts = document[name] if name else document
    if not isinstance(posts, list):
        return body
    if fault == "duplicates" and posts and (above := _page_above(request)):
        posts = [{**posts[0], "id": above}, *posts[:1], *posts]
    elif fault == "vanishing":
        posts = [post for post in posts if int(post["id"]) % 7]
    elif fault == "absent fields":
        hidden = {"md5", "hash", "file_url", "large_file_url", "image"}
        posts = [post if int(post["id"]) % 5 else {k: v for k, v in post.items() if k not in hidden} for post in posts]
    elif fault == "single object" and name and len(posts) == 1:
        posts = posts[0]
    if not name:
        return json.dumps(posts).encode()
    rest = {key: value for key, value in document.items() if key != name}
    return json.dumps(rest if fault == "missing post" else {**rest, name: posts}).encode()


def _page_above(request: web.Request) -> int:
    """Id of the last post of the previous page, from the query; 0 on the first page."""
    page, tags = request.query.get("page", ""), request.query.get("tags", "")
    match = re.fullmatch(r"b(\d+)", page) or re.search(r"\bid:<(\d+)", tags)
    return int(match[1]) if match else 0


# -- a server on a thread --------------------------------------------------------------------------------------------


@dataclass
class Journal:
    """The requests to a server.

    Attributes:
        times: Time of each request in seconds of the monotonic clock, by `Host` header.
        paths: Number of requests by path without query.
        queries: Path and query of each request, in order.
        headers: Headers of each request, in order.
        active: Number of requests in progress.
        most: Highest number of requests in progress at once.
    """

    times: dict[str, list[float]] = field(default_factory=dict)
    paths: Counter[str] = field(default_factory=Counter)
    queries: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    active: int = 0
    most: int = 0

    def busiest_second(self, host: str) -> int:
        """The highest number of requests for a host in any window of one second."""
        times, most, first = self.times.get(host, []), 0, 0
        for last, moment in enumerate(times):
            while moment - times[first] >= 1.0:
                first += 1
            most = max(most, last - first + 1)
        return most


class LocalServer:
    """An aiohttp application on a loopback port, served from its own thread."""

    def __init__(
        self,
        application: Callable[[], web.Application],
        plan: FaultPlan | None = None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        """Start the server.

        Args:
            application: Makes the application, on the server's event loop.
            plan: The faults; by default only those requested with `?fault=NAME`.
            certificate: Certificate and key to serve https with.
        """
        self.journal = Journal()
        self.scheme = "https" if certificate else "http"
        self._plan = plan or FaultPlan(share=0.0)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        self.address = ("127.0.0.1", 0)
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(application, certificate, ready), daemon=True)
        self._thread.start()
        ready.wait()
        if self._error:
            raise RuntimeError("the server did not start") from self._error

    def url(self, path: str = "", host: str = "") -> str:
        """The URL of a path; one with a `host` needs a client that connects to `address` instead."""
        return f"{self.scheme}://{host or ':'.join(map(str, self.address))}{path}"

    def close(self) -> None:
        """Stop the server and close all its connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        self._loop.close()

    def _run(
        self, application: Callable[[], web.Application], certificate: tuple[Path, Path] | None, ready: threading.Event
    ) -> None:
        try:
            self._loop.run_until_complete(self._serve(application(), certificate, ready))
        except BaseException as error:
            self._error = error
        ready.set()

    async def _serve(self, app: web.Application, certificate: tuple[Path, Path] | None, ready: threading.Event) -> None:
        app.middlewares.insert(0, inject_faults(self._plan))
        app.middlewares.insert(0, self._journal_requests())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await runner.setup()
        context = None
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self.address = ("127.0.0.1", runner.addresses[0][1])
        ready.set()
        await self._stop.wait()
        await runner.cleanup()
        stalled = asyncio.all_tasks() - {asyncio.current_task()}
        for task in stalled:
            task.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)

    def _journal_requests(self) -> Middleware:
        journal = self.journal

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            journal.times.setdefault(request.host, []).append(time.monotonic())
            journal.paths[request.path] += 1
            journal.queries.append(request.path_qs)
            journal.headers.append(dict(request.headers))
            journal.active += 1
            journal.most = max(journal.most, journal.active)
            try:
                return await handler(request)
            finally:
                journal.active -= 1

        return middleware


@contextlib.contextmanager
def local_server(
    application: Callable[[], web.Application],
    plan: FaultPlan | None = None,
    certificate: tuple[Path, Path] | None = None,
) -> Iterator[LocalServer]:
    """A `LocalServer` while the block runs."""
    server = LocalServer(application, plan, certificate)
    try:
        yield server
    finally:
        server.close()


def self_signed(
    folder: Path, hosts: tuple[str, ...] = ("localhost", "*.invalid", "*.sample-booru.invalid")
) -> tuple[Path, Path]:
    """Make a self-signed certificate for loopback and the given names, valid for a day.

    Args:
        folder: Folder for `server.crt` and `server.key`.
        hosts: DNS names.

    Returns:
        Paths of the certificate and its key. With `SSL_CERT_FILE` a client trusts it as the only authority.

    Raises:
        RuntimeError: The openssl command is not installed.
    """
    if shutil.which("openssl") is None:
        raise RuntimeError("making a certificate requires the openssl command, which is not installed")
    certificate, key = folder / "server.crt", folder / "server.key"
    names = ",".join([*(f"DNS:{host}" for host in hosts), "IP:127.0.0.1"])
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", f"subjectAltName={names}"], check=True, capture_output=True)
    return certificate, key
