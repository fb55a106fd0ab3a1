"""`animesion browse` over real sockets: answers, refused requests, saved decisions."""

from __future__ import annotations

import io
import itertools
import json
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from PIL import Image

import animesion
from animesion.config.decisions import Decisions
from animesion.errors import UsageError
from animesion.report import live
from animesion.report.selection import Filter
from animesion.schemas import EMBEDDINGS
from animesion.storage import parquet
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
    (folder / "image 1.json").write_text(json.dumps({"page_url": "https://site.example/<b>?q=1", "artist": "<i>a"}))
    (folder / "image 2.json").write_text(json.dumps({"page_url": "javascript:alert(1)", "url": "file:///etc/passwd"}))
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


def test_images_are_filtered_and_an_area_of_the_map_holds_what_it_surrounds(site: str, built: Path) -> None:
    dataset = animesion.open_dataset(built)
    ask = lambda path, **query: requests.get(f"{site}/api/{path}", params=query, timeout=10).json()  # noqa: E731
    assert ask("images")["total"] == dataset.kept
    assert ask("images", status="all")["total"] == dataset.seen
    assert ask("images", status="exact duplicate")["total"] == 1
    label = dataset.classes[0]
    keys = {item["key"] for item in ask("images", label=label.name, limit=200)["items"]}
    assert len(keys) == label.total
    drawn = ask("map", status="all")
    assert drawn["kind"] == "thumbnails"
    assert drawn["total"] == len(drawn["keys"]) == dataset.seen - 1  # one is no image
    assert all(0 <= each <= 10_000 for each in (*drawn["x"], *drawn["y"]))
    assert {drawn["labels"][i] for i in drawn["label"]} == {info.name for info in dataset.classes}
    places = sorted(drawn["x"])
    # in the widest gap, as the map is rounded to ten-thousandths
    low, high = max(itertools.pairwise(places), key=lambda pair: pair[1] - pair[0])
    left = (low + high) / 2e4
    area = f"-1,-1 {left},-1 {left},2 -1,2"
    inside = {item["key"] for item in ask("images", status="all", area=area, limit=200)["items"]}
    assert inside == {key for key, x in zip(drawn["keys"], drawn["x"], strict=True) if x / 1e4 <= left}
    assert set(ask("map", status="exact duplicate")["keys"]) < set(drawn["keys"])


def test_images_that_look_the_same_have_one_place(site: str) -> None:
    drawn = requests.get(f"{site}/api/map", params={"status": "all"}, timeout=10).json()
    places = dict(zip(drawn["keys"], zip(drawn["x"], drawn["y"], strict=True), strict=True))
    [cluster] = requests.get(f"{site}/api/clusters", timeout=10).json()["items"]
    one, other = (places[item["key"]] for item in cluster["members"])
    assert one == other
    assert len(set(places.values())) > len(places) // 2


def test_the_map_is_of_the_embeddings_of_a_build_that_has_them(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "embedded"
    shutil.copytree(built, out)
    recipe = (out / "recipe.toml").read_text()
    assert recipe.count('[duplicates.embedding]\nmodel = ""') == 1
    (out / "recipe.toml").write_text(recipe.replace('embedding]\nmodel = ""', 'embedding]\nmodel = "sscd"'))
    features = pq.read_table(out / "features" / "part-00000.parquet", columns=["key"])["key"].to_pylist()
    numbers = {key: i for i, key in enumerate(features)}
    vectors = [[float(i % 2), 0.5 * (i % 3 == 0), 0.0] for i in numbers.values()]
    table = pa.table([pa.array(features), pa.array(vectors, pa.list_(pa.float32()))], schema=EMBEDDINGS)
    parquet.write(out / "features" / "embeddings-part-00000.parquet", table)
    browser = live.Browser(animesion.open_dataset(out), out / "decisions.toml")
    drawn = browser.drawn(Filter(status="all"), "")
    assert drawn["kind"] == "embeddings"
    places: dict[tuple[int, int], set[tuple[int, bool]]] = {}
    for key, *place in zip(drawn["keys"], drawn["x"], drawn["y"], strict=True):
        places.setdefault((place[0], place[1]), set()).add((numbers[key] % 2, numbers[key] % 3 == 0))
    assert len(places) == 4
    assert all(len(kinds) == 1 for kinds in places.values())


def test_a_list_stays_as_it_was_while_its_images_are_decided(site: str) -> None:
    ask = lambda **query: requests.get(f"{site}/api/images", params=query, timeout=10).json()  # noqa: E731
    before = ask(decided="no", as_of="")
    first = before["items"][0]["key"]
    assert put(site, {**NOTHING, "exclude": [first]}).json()["written"] is True
    assert ask(decided="no", as_of="") == before
    now = ask(decided="no", as_of="unknown")
    assert now["total"] == before["total"] - 1
    assert first not in {item["key"] for item in now["items"]}
    assert [item["key"] for item in ask(decided="yes", as_of="unknown")["items"]] == [first]


def test_an_image_is_shown_in_full_with_where_it_comes_from(site: str, built: Path) -> None:
    rows = {row["source_id"]: row for row in animesion.open_dataset(built).curated.to_pylist()}
    name = next(each for each in rows if each.endswith("image 1.jpg") and "blue" in each)
    row = rows[name]
    found = requests.get(f"{site}/api/details/{row['key']}", timeout=10).json()
    assert found["links"] == [["page at the source", "https://site.example/<b>?q=1"]]
    facts = dict(found["facts"])
    assert (facts["source id"], facts["author"], facts["SHA-256"]) == (name, "<i>a", row["sha256"])
    assert (found["label"], found["split"], found["original"]) == (row["label"], row["split"], True)
    for of in ("original", "sample"):
        answer = requests.get(f"{site}/api/{of}/{row['key']}", timeout=10)
        assert answer.headers["Content-Type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == (row["width"], row["height"])
    other = rows[name.replace("image 1.jpg", "image 2.png")]
    assert requests.get(f"{site}/api/details/{other['key']}", timeout=10).json()["links"] == []
    assert requests.get(f"{site}/api/details/unknown", timeout=10).status_code == 404


def test_a_dataset_that_was_built_again_is_opened_again(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "small")
    browser = live.Browser(animesion.open_dataset(copy), tmp_path / "decisions.toml")
    with served(live.application(browser, TOKEN)) as port:
        site = f"http://127.0.0.1:{port}"
        facts = json.loads((copy / "dataset.json").read_bytes())
        parquet.write(copy / "curated.parquet", animesion.open_dataset(copy).curated.slice(0, 3))
        (copy / "dataset.json").write_text(json.dumps(facts | {"name": "renamed"}))
        refused = requests.get(f"{site}/api/images", timeout=10)
        assert (refused.status_code, refused.text) == (409, f"{copy} was built again: load the page again")
        assert put(site, NOTHING).status_code == 409
        assert "renamed" in requests.get(site, timeout=10).text
        assert requests.get(f"{site}/api/images?status=all", timeout=10).json()["total"] == 3
        # in the middle of a build there is no dataset
        (copy / "dataset.json").unlink()
        assert requests.get(site, timeout=10).status_code == 500


def test_saved_means_that_something_was_written(site: str, tmp_path: Path) -> None:
    assert put(site, NOTHING).json() == {"revision": "", "written": False}
    assert not (tmp_path / "decisions.toml").exists()
    first = put(site, {**NOTHING, "same": [["b", "a"]]}).json()
    written = (tmp_path / "decisions.toml").stat().st_mtime_ns
    again = put(site, {**NOTHING, "same": [["a", "b"]]}, first["revision"]).json()
    assert again == {"revision": first["revision"], "written": False}
    assert (tmp_path / "decisions.toml").stat().st_mtime_ns == written


def test_filters_are_saved_by_name_and_only_with_the_token(site: str, tmp_path: Path) -> None:
    def save(name: Any, address: Any, token: str = TOKEN) -> requests.Response:
        body = {"name": name, "address": address}
        return requests.put(f"{site}/api/filters", json=body, headers={live.TOKEN_HEADER: token}, timeout=10)

    path = tmp_path / "decisions-filters.toml"
    assert save("a", "split=test", "wrong").status_code == 403
    assert not path.exists()
    assert save("tests", "split=test").json() == {"filters": {"tests": "split=test"}}
    assert save("<b>", "text=%3Cb%3E").json()["filters"] == {"tests": "split=test", "<b>": "text=%3Cb%3E"}
    assert tomllib.loads(path.read_text()) == {"filters": {"<b>": "text=%3Cb%3E", "tests": "split=test"}}
    for name, address in (("", "x"), ("a\nb", "x"), ("a" * 101, "x"), ("a", 3), ([], "x"), ("a", "x" * 20_001)):
        assert save(name, address).status_code == 400, (name, address)
    assert save("tests", None).json() == {"filters": {"<b>": "text=%3Cb%3E"}}


def test_the_command_of_the_next_build_is_quoted_for_a_shell(built: Path, tmp_path: Path) -> None:
    file = tmp_path / 'it\'s $(touch owned)\\ "mine".toml'
    browser = live.Browser(animesion.open_dataset(built), file)
    browser.save(Decisions(exclude=["folder-x"]))
    command = shlex.split(browser.rebuild())
    assert command[:3] == ["animesion", "build", str(built / "recipe.toml")]
    settings = [command[i + 1] for i, each in enumerate(command) if each == "--set"]
    assert animesion.load_recipe(command[2], settings).curate.decisions.exclude == ["folder-x"]
    assert command[command.index("--out") + 1] == str(built)


@pytest.mark.parametrize(
    "path",
    ["classes/-1", "classes/99", "classes/x", "classes/1e9", "classes/0?offset=-1", "classes/0?limit=99999",
     "clusters?offset=x", "images?area=0,0", "images?decided=maybe", "map?area=x", "details/..%2fx", "original/unknown",
     "sample/unknown", "drops?offset=%00", "image/..%2f..%2fetc%2fpasswd", "image/unknown", "nothing"],
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
