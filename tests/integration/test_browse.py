"""`animesion browse` over real sockets: answers, refused requests, saved decisions."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

import animesion
from animesion.errors import UsageError
from animesion.report import live
from tests.conftest import draw_folders
from tests.serving import served

TOKEN = "a-token-of-a-test"
NOTHING: dict[str, Any] = {"exclude": [], "label": {}, "same": [], "different": []}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, one exact duplicate, one file that is no image."""
    source = draw_folders(tmp_path_factory.mktemp("images") / "world")
    folder = source / "plain (blue) & co"
    shutil.copy(next(iter(sorted(folder.glob("*.jpg")))), folder / "zz copy.jpg")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path_factory.mktemp("built") / "small"
    animesion.build(animesion.load_recipe("folder", [f'source.path="{source}"']), out, workers=1)
    return out


@pytest.fixture
def site(built: Path, tmp_path: Path) -> Iterator[str]:
    browser = live.Browser(animesion.open_dataset(built), tmp_path / "decisions.toml")
    with served(live.application(browser, TOKEN)) as port:
        yield f"http://127.0.0.1:{port}"


def put(site: str, decisions: Any, revision: str = "", **headers: str) -> requests.Response:
    given = {live.TOKEN_HEADER: TOKEN, **headers}
    body = {"decisions": decisions, "revision": revision}
    return requests.put(f"{site}/api/decisions", json=body, headers=given, timeout=10)


def test_every_image_is_served(site: str, built: Path) -> None:
    dataset = animesion.open_dataset(built)
    for info in dataset.classes:
        keys: list[str] = []
        while True:
            query = {"offset": len(keys), "limit": 5}
            answer = requests.get(f"{site}/api/classes/{info.id}", params=query, timeout=10).json()
            keys += [item["key"] for item in answer["items"]]
            if len(keys) >= answer["total"]:
                break
        assert len(keys) == len(set(keys)) == info.total
    [cluster] = requests.get(f"{site}/api/clusters", timeout=10).json()["items"]
    assert [item["reason"] for item in cluster["members"]] == ["", "exact duplicate"]
    for item in cluster["members"]:  # the dropped one comes from raw/
        answer = requests.get(f"{site}/api/image/{item['key']}", timeout=10)
        assert answer.headers["Content-Type"] == "image/webp"
        assert max(Image.open(io.BytesIO(answer.content)).size) <= live.SIDE
    reason = next(name for name in dataset.dropped if name != "exact duplicate")
    [broken] = requests.get(f"{site}/api/drops", params={"reason": reason}, timeout=10).json()["items"]
    assert requests.get(f"{site}/api/image/{broken['key']}", timeout=10).status_code == 404


def test_other_sites_get_nothing(site: str) -> None:
    port = site.rpartition(":")[2]
    ask = lambda path="/", **headers: requests.get(site + path, headers=headers, timeout=10)  # noqa: E731
    assert ask().status_code == 200
    assert ask(Host=f"localhost:{port}").status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", ""):
        assert ask(Host=host).status_code == 421, host
    assert ask("/api/classes/0", Origin="http://evil.example").status_code == 403
    assert ask("/api/classes/0", Origin="null").status_code == 403
    assert ask("/api/classes/0", **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    answer = ask()
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert TOKEN not in answer.text


def test_only_the_token_writes(site: str, tmp_path: Path) -> None:
    for token in ("", "wrong", TOKEN + "x", "\u00e9".encode().decode("latin-1")):
        assert put(site, NOTHING, **{live.TOKEN_HEADER: token}).status_code == 403
    assert put(site, NOTHING, Origin="http://evil.example").status_code == 403
    assert not (tmp_path / "decisions.toml").exists()


def test_decisions_are_saved_and_checked(site: str, tmp_path: Path) -> None:
    first = put(site, {**NOTHING, "exclude": ["b", "a"]})
    assert first.status_code == 200
    assert tomllib.loads((tmp_path / "decisions.toml").read_text()) == {"exclude": ["a", "b"]}
    stale = put(site, NOTHING, revision="")
    assert stale.status_code == 409
    assert "load the page again" in stale.text
    revision = first.json()["revision"]
    bodies: list[Any] = [
        None,
        [],
        {"exclude": ["../x"]},
        {**NOTHING, "exclude": ["a"], "label": {"a": "b"}},
        {"more": 1},
    ]
    for wrong in bodies:
        assert put(site, wrong, revision).status_code == 400, wrong
    assert put(site, {**NOTHING, "label": {"a": "初音ミク"}}, revision).status_code == 200
    assert tomllib.loads((tmp_path / "decisions.toml").read_text()) == {"label": {"a": "初音ミク"}}


@pytest.mark.parametrize(
    "path",
    ["classes/-1", "classes/99", "classes/x", "classes/1e9", "classes/0?offset=-1", "classes/0?limit=99999",
     "clusters?offset=x", "drops?offset=%00", "image/..%2f..%2fetc%2fpasswd", "image/unknown", "nothing"],
)  # fmt: skip
def test_strange_requests_are_refused_quietly(site: str, path: str) -> None:
    answer = requests.get(f"{site}/api/{path}", timeout=10)
    assert answer.status_code in (400, 404)
    assert "Traceback" not in answer.text


def test_the_command_serves_until_it_is_stopped(built: Path, tmp_path: Path) -> None:
    script = "from animesion.cli import main; main()"
    command = [sys.executable, "-c", script, "browse", str(built), "--decisions", str(tmp_path / "d.toml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=None)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        url, _, token = lines[1].removeprefix("open ").strip().partition("#token=")
        assert requests.get(url, timeout=10).status_code == 200
        body = {"decisions": {**NOTHING, "exclude": ["a"]}, "revision": ""}
        headers = {live.TOKEN_HEADER: token}
        assert requests.put(f"{url}api/decisions", json=body, headers=headers, timeout=10).status_code == 200
        port = int(url.rstrip("/").rpartition(":")[2])
        with socket.socket() as other:  # it listens on 127.0.0.1 only
            other.settimeout(2)
            assert other.connect_ex(("127.0.0.2", port)) != 0
    finally:
        process.terminate()
        assert process.wait(20) in (0, -15, 130)
        process.stdout.close()
    assert json.dumps(tomllib.loads((tmp_path / "d.toml").read_text())) == '{"exclude": ["a"]}'


def test_a_taken_port_and_damaged_decisions_are_errors(built: Path, tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text("exclude = 3\n")
    with pytest.raises(UsageError, match="exclude"):
        live.Browser(animesion.open_dataset(built), tmp_path / "d.toml")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        script = "from animesion.cli import main; main()"
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-c", script, "browse", str(built), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"cannot listen on port {port}" in done.stderr
