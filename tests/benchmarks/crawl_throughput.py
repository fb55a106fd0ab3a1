"""Images per CPU-second of a crawl, compared with bare aiohttp and img2dataset, over TLS on the loopback interface.

    python tests/benchmarks/crawl_throughput.py [--items 1000 10000] [--bytes 1000 51000] [--img2dataset VENV]

One server process serves the same files to all clients. Our crawler hashes, sniffs, obeys robots.txt, spools, keeps the
ledger and writes tars (except for `no tar`). Bare aiohttp reads the bytes and discards them. img2dataset neither
resizes nor encodes, and writes nothing. Without `--img2dataset` the script creates a virtual environment for it; if
that fails, it prints the reason. `--no-img2dataset` leaves it out. Shares of bare aiohttp compare consecutive runs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import random
import resource
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import certifi

SIZES = (1_000, 51_000)
"""Bytes of the smallest and the largest file: 26 KB on average, as in the sample world."""

FILES = 200
"""Number of different files; each is served under many names."""

PART = 500
AGENT = "animesion-benchmark/1.0 (benchmark@example.org)"


def files(sizes: tuple[int, int] = SIZES) -> list[bytes]:
    """Incompressible bytes with the start of a JPEG file."""
    rng = random.Random(0)
    return [b"\xff\xd8\xff\xe0" + rng.randbytes(rng.randrange(*sizes)) for _ in range(FILES)]


def serve(ready: Connection, certificate: tuple[Path, Path] | None, sizes: tuple[int, int] = SIZES) -> None:
    """Main function of the server process."""
    from aiohttp import web

    from animesion_sample.faults import LocalServer

    bodies = files(sizes)

    async def file(request: web.Request) -> web.Response:
        return web.Response(body=bodies[int(request.match_info["number"]) % FILES], content_type="image/jpeg")

    def application() -> web.Application:
        app = web.Application()
        app.router.add_get(r"/{number:\d+}.jpg", file)
        return app

    server = LocalServer(application, certificate=certificate)
    ready.send(server.address[1])
    ready.recv()


def urls(port: int, scheme: str, items: int) -> list[str]:
    """URLs of the files."""
    return [f"{scheme}://localhost:{port}/{number}.jpg" for number in range(items)]


# -- the three clients, each in a separate process -----------------------------------------------------------------


def ours(port: int, scheme: str, items: int, digests: list[str], folder: Path, *, tar: bool = True) -> None:
    """A crawl with all features, written to tars as in a build, or left in the spool."""
    from animesion.dataset import shards
    from animesion.storage.workspace import atomic_file
    from animesion_scrapers import Crawler, Download, Ledger, RateLimiter

    requests = [
        Download(f"item-{number}", url, digests[number % FILES], image=True)
        for number, url in enumerate(urls(port, scheme, items))
    ]
    limiter = RateLimiter(1e6, memory=folder / "hosts.sqlite")
    with (
        Ledger(folder) as ledger,
        Crawler(
            ledger,
            user_agent=AGENT,
            limiter=limiter,
            robots=folder / "robots.sqlite",
            allow_private=True,
            concurrency=32,
            per_host=32,
        ) as crawler,
    ):
        for start in range(0, items, PART):
            entries = crawler.fetch(f"part-{start}", requests[start : start + PART])
            if not tar:
                continue
            with atomic_file(folder / f"part-{start}.tar") as out:
                for key, entry in entries.items():
                    content = ledger.content(entry)
                    assert content is not None, entry
                    out.write(shards.member(f"{key}.jpg", content))
                out.write(shards.END)
            ledger.hand_over(entries)


def bare(port: int, scheme: str, items: int, folder: Path) -> None:
    """One aiohttp session that reads every body and discards it."""
    import aiohttp

    async def run() -> None:
        context = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE"))
        queue = iter(urls(port, scheme, items))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=32, ssl=context)) as session:

            async def work() -> None:
                for url in queue:
                    async with session.get(url) as response:
                        await response.read()

            await asyncio.gather(*(work() for _ in range(32)))

    asyncio.run(run())


IMG2DATASET = """
import sys
from img2dataset import download
download(url_list=sys.argv[1], output_folder=sys.argv[2], output_format="dummy", processes_count=2, thread_count=32,
         resize_mode="no", disable_all_reencoding=True, number_sample_per_shard=1000, retries=0, timeout=20,
         disallowed_header_directives=[])
"""


def img2dataset(python: Path, port: int, scheme: str, items: int, folder: Path) -> None:
    """img2dataset from the package index, two processes of 32 threads, no re-encoding, nothing written."""
    listing = folder / "urls.txt"
    listing.write_text("\n".join(urls(port, scheme, items)))
    command: list[str | Path] = [python, "-c", IMG2DATASET, listing, folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    stats = list((folder / "out").glob("*_stats.json"))
    import json

    got = sum(json.loads(path.read_text())["successes"] for path in stats)
    if done.returncode or got != items:
        raise RuntimeError(f"img2dataset got {got} of {items}: {(done.stderr or done.stdout)[-300:]}")


def measured(work: Callable[[Path], None]) -> tuple[float, float, float]:
    """CPU-seconds, wall seconds and peak MB of a client in a separate process, including its children."""
    with tempfile.TemporaryDirectory() as name:
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_measure, args=(work, Path(name), send))
        start = time.perf_counter()
        process.start()
        process.join()
        wall = time.perf_counter() - start
        if process.exitcode:
            raise RuntimeError(f"the client ended with status {process.exitcode}")
        cpu, peak = receive.recv()
    return cpu, wall, peak


def _measure(work: Callable[[Path], None], folder: Path, send: Connection) -> None:
    work(folder)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    send.send((cpu, max(each.ru_maxrss for each in used) / 1024))


def environment(folder: Path) -> tuple[Path | None, str]:
    """The interpreter of a new virtual environment with img2dataset, or None and the reason of the failure."""
    python = folder / "venv" / "bin" / "python"
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", folder / "venv"],
        [python, "-m", "pip", "install", "img2dataset"],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return python, ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--bytes", type=int, nargs=2, default=SIZES, help="minimum and maximum size of a file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--img2dataset", type=Path, help="virtual environment with img2dataset")
    parser.add_argument("--no-img2dataset", action="store_true", help="do not measure img2dataset")
    parser.add_argument("--http", action="store_true", help="plain HTTP, without TLS")
    arguments = parser.parse_args()
    scheme = "http" if arguments.http else "https"
    with tempfile.TemporaryDirectory() as name:
        certificate = None
        if scheme == "https":
            from animesion_sample.faults import self_signed

            certificate = self_signed(Path(name))
            # the usual authorities too: parsing them is part of the cost of a TLS context on the real internet
            trusted = Path(name) / "authorities.crt"
            trusted.write_bytes(certificate[0].read_bytes() + Path(certifi.where()).read_bytes())
            os.environ["SSL_CERT_FILE"] = str(trusted)
        python, why = arguments.img2dataset and arguments.img2dataset / "bin" / "python", ""
        if python is None and not arguments.no_img2dataset:
            python, why = environment(Path(name))
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(there, certificate, tuple(arguments.bytes)), daemon=True
        )
        server.start()
        port = here.recv()
        digests = [hashlib.md5(body).hexdigest() for body in files(tuple(arguments.bytes))]
        for items in arguments.items:
            clients: dict[str, Callable[[Path], None]] = {
                "this crawler": lambda folder, items=items: ours(port, scheme, items, digests, folder),  # type: ignore[misc]
                "no tar": lambda folder, items=items: ours(port, scheme, items, digests, folder, tar=False),  # type: ignore[misc]
                "bare aiohttp": lambda folder, items=items: bare(port, scheme, items, folder),  # type: ignore[misc]
            }
            if python:
                clients["img2dataset"] = lambda folder, items=items: img2dataset(  # type: ignore[misc]
                    python, port, scheme, items, folder
                )
            runs: dict[str, list[tuple[float, float, float]]] = {what: [] for what in clients}
            for repeat in range(arguments.repeats):
                for what, work in clients.items():  # alternate: a machine that slows down affects all equally
                    if what == "img2dataset" and repeat and items > 1000:
                        continue  # a run takes minutes
                    runs[what].append(measured(work))
            print(
                f"{items:,} files of {sum(arguments.bytes) // 2000} KB over {scheme}, "
                f"medians of {arguments.repeats} alternating runs"
            )
            print(f"{'':<14} {'per CPU-s':>10} {'per s':>8} {'peak MB':>8}")
            for what, found in runs.items():
                cpu, wall, peak = (statistics.median(each[i] for each in found) for i in range(3))
                print(f"{what:<14} {items / cpu:>10,.0f} {items / wall:>8,.0f} {peak:>8,.0f}")
            for what in ("this crawler", "no tar"):
                shares = sorted(b[0] / a[0] for a, b in zip(runs[what], runs["bare aiohttp"], strict=True))
                print(f"{what}: {statistics.median(shares):.2f} of bare aiohttp ({shares[0]:.2f} to {shares[-1]:.2f})")
            if not python and why:
                print(f"img2dataset    not measured: {why}")
        here.send(None)


if __name__ == "__main__":
    main()
