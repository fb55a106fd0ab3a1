"""A server on loopback that speaks the part of the Hugging Face Hub's API that publishing needs.

Repositories, the pre-upload question, the LFS batch API with plain PUT uploads, commits as JSON lines, the tree, refs,
tags and resolved files. LFS objects are checked against their digest, as the Hub does.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from aiohttp import web

TOKEN = "hf_" + "loopbackSecret0123456789"
LFS_SUFFIXES = (".tar", ".safetensors", ".parquet", ".png", ".jpg")


@dataclass
class Repo:
    kind: str  # dataset or model
    private: bool
    gated: str | bool = False
    commits: list[dict[str, Any]] = field(default_factory=list)  # id, message, files
    tags: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str) -> dict[str, tuple[str, bytes]]:
        wanted = self.tags.get(revision, revision)
        for commit in reversed(self.commits):
            if wanted in ("main", commit["id"]):
                found: dict[str, tuple[str, bytes]] = commit["files"]
                return found
        return {}


@dataclass
class Hub:
    """What the server holds, and what a test may change.

    Attributes:
        uploads: digests of the LFS objects that were sent, in order, again when sent again.
        slow_after: after so many LFS uploads each further one takes a minute; None for never.
        spoiled: path whose bytes the server reports wrongly, as after a fault of its disk.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    slow_after: int | None = None
    spoiled: str = ""
    url: str = ""


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def application(hub: Hub) -> web.Application:
    routes = web.RouteTableDef()

    @web.middleware
    async def authorised(request: web.Request, handler: Any) -> web.StreamResponse:
        if not request.path.startswith("/lfs/") and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": f"no access with {request.headers.get('Authorization')}"}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    def repo_of(request: web.Request) -> Repo:
        name = f"{request.match_info['user']}/{request.match_info['name']}"
        kind = request.match_info.get("kind", "datasets" if request.path.startswith("/datasets/") else "models")
        if name not in hub.repos or f"{hub.repos[name].kind}s" != kind:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RepoNotFound"}, text="{}")
        return hub.repos[name]

    @routes.post("/api/repos/create")
    async def create(request: web.Request) -> web.Response:
        asked = await request.json()
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        hub.repos[name] = Repo(kind, asked.get("visibility") == "private" or bool(asked.get("private")))
        hub.repos[name].commits.append({"id": "0" * 40, "message": "initial commit", "files": {}})
        return web.json_response({"url": f"{hub.url}/datasets/{name}", "id": name})

    @routes.get("/api/{kind:datasets|models}/{user}/{name}")
    @routes.get("/api/{kind:datasets|models}/{user}/{name}/revision/{revision}")
    async def info(request: web.Request) -> web.Response:
        repo = repo_of(request)
        name = f"{request.match_info['user']}/{request.match_info['name']}"
        head = repo.commits[-1]
        return web.json_response(
            {
                "_id": "1", "id": name, "sha": head["id"], "private": repo.private, "tags": [], "downloads": 0,
                "likes": 0, "gated": repo.gated, "disabled": False,
                "siblings": [{"rfilename": n} for n in head["files"]],
            }
        )  # fmt: skip

    @routes.put("/api/{kind:datasets|models}/{user}/{name}/settings")
    async def settings(request: web.Request) -> web.Response:
        repo = repo_of(request)
        repo.gated = (await request.json())["gated"]
        return web.json_response({"gated": repo.gated})

    @routes.get("/api/{kind:datasets|models}/{user}/{name}/refs")
    async def refs(request: web.Request) -> web.Response:
        repo = repo_of(request)
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1]["id"]}
        return web.json_response({"branches": [main], "converts": [], "tags": tags})

    @routes.get("/api/{kind:datasets|models}/{user}/{name}/tree/{revision}")
    async def tree(request: web.Request) -> web.Response:
        entries: list[dict[str, Any]] = []
        for path, (kind, content) in sorted(repo_of(request).files(request.match_info["revision"]).items()):
            oid = hashlib.sha256(content + b"!" * (path == hub.spoiled)).hexdigest()
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if kind == "lfs":
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return web.json_response(entries)

    @routes.post("/api/{kind:datasets|models}/{user}/{name}/preupload/{revision}")
    async def preupload(request: web.Request) -> web.Response:
        asked = (await request.json())["files"]
        told = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LFS_SUFFIXES) or each["size"] > 10_000_000 else "regular",
                "shouldIgnore": False,
            }
            for each in asked
        ]
        return web.json_response({"files": told})

    @routes.post("/{user}/{name}.git/info/lfs/objects/batch")
    @routes.post("/datasets/{user}/{name}.git/info/lfs/objects/batch")
    async def batch(request: web.Request) -> web.Response:
        asked = (await request.json())["objects"]
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            | ({} if each["oid"] in hub.objects else {"actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}})
            for each in asked
        ]
        return web.json_response({"transfer": "basic", "objects": objects})

    @routes.put("/lfs/{oid}")
    async def put(request: web.Request) -> web.Response:
        content = await request.read()
        oid = request.match_info["oid"]
        if hashlib.sha256(content).hexdigest() != oid:
            return web.Response(status=400)
        if hub.slow_after is not None and len(hub.uploads) >= hub.slow_after:
            await asyncio.sleep(60)
        hub.uploads.append(oid)
        hub.objects[oid] = content
        return web.Response()

    @routes.post("/api/validate-yaml")
    async def validate(request: web.Request) -> web.Response:
        asked = await request.json()
        header = yaml.safe_load(asked["content"].split("---\n")[1])
        needed = {"dataset": "license", "model": "library_name"}[asked["repoType"]]
        wrong = [] if header.get(needed) else [{"message": f"no {needed}"}]
        return web.json_response({"errors": wrong, "warnings": []}, status=400 if wrong else 200)

    @routes.post("/api/{kind:datasets|models}/{user}/{name}/commit/{revision}")
    async def commit(request: web.Request) -> web.Response:
        repo = repo_of(request)
        files = dict(repo.commits[-1]["files"])
        message = ""
        for line in (await request.read()).splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = ("regular", base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in hub.objects:
                    return web.json_response({"error": "LFS pointer to an object that is not there"}, status=400)
                files[value["path"]] = ("lfs", hub.objects[value["oid"]])
            elif kind == "deletedFile":
                del files[value["path"]]
        identity = hashlib.sha1(f"{len(repo.commits)} {message}".encode()).hexdigest()
        repo.commits.append({"id": identity, "message": message, "files": files})
        return web.json_response(
            {"commitUrl": f"{hub.url}/datasets/x/y/commit/{identity}", "commitOid": identity, "success": True}
        )

    @routes.post("/api/{kind:datasets|models}/{user}/{name}/tag/{revision}")
    async def tag(request: web.Request) -> web.Response:
        repo, name = repo_of(request), (await request.json())["tag"]
        if name in repo.tags:
            return web.json_response({"error": "tag exists"}, status=409)
        repo.tags[name] = request.match_info["revision"]
        return web.json_response({})

    @routes.get("/{user}/{name}/resolve/{revision}/{path:.+}")
    @routes.get("/datasets/{user}/{name}/resolve/{revision}/{path:.+}")
    async def resolve(request: web.Request) -> web.Response:
        found = repo_of(request).files(request.match_info["revision"]).get(request.match_info["path"])
        if found is None:
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{blob_id(found[1])}"', "X-Repo-Commit": repo_of(request).commits[-1]["id"]}
        return web.Response(body=found[1], headers=headers)

    app = web.Application(middlewares=[authorised], client_max_size=1 << 30)
    app.add_routes(routes)
    return app


@contextmanager
def serving() -> Iterator[Hub]:
    """A server in a thread of its own."""
    hub = Hub()
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(application(hub), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        for task in asyncio.all_tasks(loop):  # uploads that take a minute
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(20)
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
