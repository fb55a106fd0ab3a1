from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from animesion_sample.server import SampleServer, serve
from animesion_sample.world import World

AGENT = "animesion-tests/1 (tests@sample-booru.invalid)"

PARENT = """
import multiprocessing, time
from animesion_sample.server import serve
if __name__ == "__main__":
    with serve(200) as server:
        print(server.port, *(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[SampleServer]:
    with serve(300) as running:
        yield running


@pytest.fixture(scope="module")
def world() -> World:
    return World(300)


@pytest.fixture
def get(server: SampleServer) -> Iterator[Any]:
    with requests.Session() as session:
        session.headers["User-Agent"] = AGENT
        yield lambda path, **params: session.get(server.url + path, params=params, timeout=30)


def test_importing_the_server_is_light() -> None:
    code = "import sys, animesion_sample.server; print([m for m in ('PIL', 'aiohttp', 'numpy') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_paging_down_lists_every_post_once(get: Any, world: World) -> None:
    page, seen = "1", []
    while posts := get("/posts.json", limit=200, page=page).json():
        seen += [post["id"] for post in posts]
        page = f"b{seen[-1]}"
    assert seen == [post.id for post in reversed(world.posts)]


def test_limits_and_page_forms(get: Any, world: World) -> None:
    ids = [post.id for post in reversed(world.posts)]
    assert [post["id"] for post in get("/posts.json").json()] == ids[:20]
    assert len(get("/posts.json", limit=5000).json()) == 200
    assert [post["id"] for post in get("/posts.json", limit=10, page=2).json()] == ids[10:20]
    above = get("/posts.json", limit=3, page=f"a{ids[10]}").json()
    assert [post["id"] for post in above] == ids[7:10]
    assert get("/posts.json", page=1000).json() == []


def test_searches(get: Any, world: World) -> None:
    name = world.characters[0].name
    wanted = [p.id for p in reversed(world.posts) if name in p.characters and p.rating == "g" and not p.deleted]
    edge = wanted[len(wanted) // 2]
    found = get("/posts.json", limit=200, tags=f"{name} rating:g status:active id:<{edge}").json()
    assert [post["id"] for post in found] == [number for number in wanted if number < edge]
    three = [world.posts[k].id for k in (3, 7, 9)]
    assert {p["id"] for p in get("/posts.json", tags="id:" + ",".join(map(str, three))).json()} == set(three)
    assert name not in " ".join(p["tag_string"] for p in get("/posts.json", limit=50, tags=f"-{name}").json()).split()
    counted = get("/counts/posts.json", tags=name).json()
    assert counted == {"counts": {"posts": sum(name in post.characters for post in world.posts)}}


@pytest.mark.parametrize(
    ("path", "params", "status", "error"),
    [
        ("/posts.json", {"tags": "a b c rating:g"}, 422, "PostQuery::TagLimitError"),
        ("/posts.json", {"page": "1001"}, 410, "PaginationError"),
        ("/posts.json", {"page": "b"}, 400, "ArgumentError"),
        ("/posts.json", {"tags": "id:x"}, 400, "PostQuery::Error"),
        ("/posts/1.json", {}, 404, "ActiveRecord::RecordNotFound"),
        ("/posts.json", {"cause_error": "503"}, 503, "CausedError"),
        ("/nowhere.json", {}, 404, "NotFound"),
    ],
)
def test_errors_are_json(get: Any, path: str, params: dict[str, str], status: int, error: str) -> None:
    answer = get(path, **params)
    assert answer.status_code == status
    assert answer.json()["success"] is False
    assert answer.json()["error"] == error
    assert answer.json()["message"]


@pytest.mark.parametrize("agent", ["", "python-requests/2.32", "Python-urllib/3.11", "Python/3.11 aiohttp/3.14.0"])
def test_library_agents_are_refused(server: SampleServer, agent: str) -> None:
    answer = requests.get(server.url + "/posts.json", headers={"User-Agent": agent}, timeout=30)
    assert answer.status_code == 403
    assert "User-Agent" in answer.json()["message"]


def test_a_post_has_the_real_keys_without_hidden_ones(get: Any, world: World) -> None:
    hidden = next(post for post in world.posts if post.trouble == "not visible")
    record = get(f"/posts/{hidden.id}.json").json()
    assert not {"md5", "file_url", "large_file_url", "preview_file_url"} & set(record)
    assert not {"md5", "file_key", "variants"} & set(record["media_asset"])
    child = next(post for post in world.posts if post.parent_id)
    record = get(f"/posts/{child.id}.json").json()
    assert record["parent_id"] == child.parent_id
    assert isinstance(record["file_size"], int)
    assert record["tag_string_character"].split() == list(child.characters)
    assert record["file_url"].startswith("http://sample-booru.invalid/data/original/")
    orphan = next(post for post in world.posts if post.trouble == "")
    assert get(f"/posts/{orphan.id}.json").json()["parent_id"] is None


def test_files_are_those_of_the_world(get: Any, world: World) -> None:
    records = {post["id"]: post for post in get("/posts.json", limit=200).json()}
    for post in reversed(world.posts[-200:]):
        if not post.visible or (post.id % 5 and not post.trouble):
            continue
        url = records[post.id]["file_url"]
        answer = get(url.removeprefix("http://sample-booru.invalid"))
        if post.trouble == "not found":
            assert answer.status_code == 404
            continue
        matches = hashlib.md5(answer.content).hexdigest() == records[post.id]["md5"]
        assert matches == (post.trouble != "checksum mismatch"), post.trouble
        assert len(answer.content) == records[post.id]["file_size"]
        assert answer.content == world.file(post)


def test_tables_tags_and_home(get: Any, world: World) -> None:
    assert get("/faces.tsv").content == world.faces_tsv()
    assert get("/tagIds.tsv").content == world.tag_ids_tsv()
    tags = get("/tags.json", **{"search[category]": "4", "search[order]": "count", "limit": 1000}).json()
    assert {tag["name"] for tag in tags} == {design.name for design in world.characters}
    assert tags[0]["post_count"] == max(tag["post_count"] for tag in tags)
    assert "Sample booru" in get("/").text


def test_unknown_files_are_not_found(get: Any) -> None:
    assert get(f"/data/original/ab/cd/{'ab' * 16}.jpg").status_code == 404


def test_the_processes_end_with_the_block() -> None:
    with serve(200, processes=1) as server:
        socket.create_connection((server.host, server.port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port), timeout=5)


def test_the_processes_end_when_the_parent_is_killed(tmp_path: Any) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        port, *children = map(int, parent.stdout.readline().split())
        assert len(children) == 2
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the server outlived its parent")
    while list(tmp_path.glob("animesion-sample-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(tmp_path.glob("animesion-sample-*"))


def test_describes_hostile_text_faithfully(get: Any, world: World) -> None:
    for post in world.posts:
        if post.trouble == "hostile text":
            record = json.loads(get(f"/posts/{post.id}.json").text)
            assert record["source"] == post.source
            assert post.artists[0] in record["tag_string_artist"]
