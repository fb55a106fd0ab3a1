"""URL tables as a source: listing, faulty hosts, resuming, updates, dry runs, memory."""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

import animesion
from animesion import sources
from animesion.cli import main
from animesion.errors import UsageError
from animesion.pipeline import runner
from animesion.progress import Progress
from animesion.sources import urls
from animesion_sample.faults import LASTING, FaultPlan, LocalServer, local_server

from .crawling import raw

HOSTS = ("one.invalid", "two.invalid", "three.invalid")
SETTINGS = ["source.contact=me@example.org", "source.requests_per_second=10"]


def image(number: int) -> bytes:
    """A small PNG unlike any other, even to a perceptual hash."""
    side = Image.effect_noise((24, 24), 90)
    side.putdata([(value * (number + 3) + number * 37) % 256 for value in range(24 * 24)])
    stream = io.BytesIO()
    side.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def application() -> web.Application:
    async def file(request: web.Request) -> web.Response:
        return web.Response(body=image(int(request.match_info["number"])), content_type="image/png")

    app = web.Application()
    app.router.add_get(r"/data/{number:\d+}.png", file)
    return app


def url(number: int) -> str:
    return f"http://{HOSTS[number % len(HOSTS)]}/data/{number}.png"


def table(path: Path, rows: Iterable[str], header: str = "url,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def recipe(path: Path, *overrides: str) -> Any:
    return animesion.load_recipe("urls", [f"source.path={path}", *SETTINGS, *overrides])


def items(path: Path, *overrides: str) -> tuple[list[Any], list[str]]:
    source = sources.make(recipe(path, *overrides))
    return list(source.items()), source.notes


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[LocalServer]:
    """All hosts lead here."""
    with local_server(application, getattr(request, "param", None)) as running:
        original = sources.make

        def made(recipe: Any) -> Any:
            source: Any = original(recipe)
            source.connect_to = dict.fromkeys(HOSTS, running.address)
            return source

        monkeypatch.setattr(sources, "make", made)
        yield running


# -- listing ---------------------------------------------------------------------------------------------------------


def test_rows_become_items(tmp_path: Path) -> None:
    row = 'https://a.example/x/Photo 1.jpg,"  rose  ‮ red",k/7,ab,cc-by-4.0,Ann,obs 3,validation,' + "f" * 32 + ",99"
    header = "image_url,species,name,sha1,license,creator,group_id,split,md5,file_size"
    [item], notes = items(table(tmp_path / "t.csv", [row], header), "source.key_column=name")
    assert item.key.startswith("urls-k-7-")
    assert (item.source_id, item.file_url) == ("k/7", "https://a.example/x/Photo 1.jpg")
    assert (item.labels, item.families, item.split) == (("rose red",), ("group:obs 3",), "val")
    assert (item.licence, item.author, item.md5, item.bytes) == ("cc-by-4.0", "Ann", "f" * 32, 99)
    assert json.loads(item.locator) == {"url": "https://a.example/x/Photo 1.jpg"}
    assert notes[0].startswith("columns recognised by name: url from 'image_url', label from 'species'")
    assert notes[1] == "1 value of the column for sha1 ignored: not 40 hexadecimal digits"


def test_a_url_is_given_once_and_so_is_a_key(tmp_path: Path) -> None:
    rows = [
        "https://a.example/1,a,k1",
        "HTTPS://A.example/1#x,b,k2",
        "https://a.example/2,a,k1",
        "https://a.example/3,a,",
    ]
    path = table(tmp_path / "t.csv", rows, "url,label,key")
    found, notes = items(path)
    assert [(item.file_url[-1], item.labels) for item in found] == [("1", ("a", "b")), ("2", ("a",)), ("3", ("a",))]
    assert notes[-2:] == [
        "1 row repeats a URL and is skipped",
        "1 URL with several labels in the rows: https://a.example/1 (a, b)",
    ]
    found, notes = items(path, "source.key_column=key")
    assert [item.order for item in found] == [0, 3]
    assert notes[1:] == [
        "1 row repeats a URL and is skipped",
        "1 URL with several labels in the rows: https://a.example/1 (a, b)",
        "1 row skipped, as an earlier one has the key with another URL",
    ]
    again, _ = items(table(tmp_path / "u.csv", reversed(rows), "url,label,key"))
    assert {item.key for item in again} == {item.key for item in items(path)[0]}


def test_rows_of_one_url_are_one_item_with_all_labels_and_groups(tmp_path: Path) -> None:
    rows = [
        "https://a.example/a b.jpg,x,post 1,train",
        "https://a.example/2.jpg,x,post 2,train",
        "https://a.example/a%20b.jpg,y,post 3,test",
        "https://a.example/2.jpg,x,post 4,train",
        "https://a.example/3.jpg,,,",
        "https://a.example/3.jpg,z,,",
        "https://a.example/3.jpg,z,,",
    ]
    found, notes = items(table(tmp_path / "t.csv", rows, "url,label,group,split"))
    assert [(item.labels, item.families, item.split) for item in found] == [
        (("x", "y"), ("group:post 1", "group:post 3"), "train"),
        (("x",), ("group:post 2", "group:post 4"), "train"),
        (("z",), (), ""),
    ]
    assert notes[1:] == [
        "4 rows repeat a URL and are skipped",
        "1 URL with several labels in the rows: https://a.example/a b.jpg (x, y)",
        "1 URL is in several splits; the first counts",
    ]


def test_an_update_states_what_it_cannot_add_to_listed_urls(tmp_path: Path) -> None:
    rows = [f"{url(1)},a", f"{url(2)},b"]
    found, _ = items(table(tmp_path / "t.csv", rows))
    source = sources.make(recipe(table(tmp_path / "t.csv", [*rows, f"{url(1)},c", f"{url(2)},b", f"{url(3)},c"])))
    assert isinstance(source, sources.Crawled)
    assert [item.file_url for item in source.items_after(found[-1])] == [url(3)]
    assert source.notes[-1].startswith("1 new row gives a listed URL another label, group or split, which it does not")


def test_too_many_urls_with_several_labels_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "_MOST_MERGED", 2)
    rows = [f"https://a.example/{number},{label}" for number in range(3) for label in "ab"]
    with pytest.raises(UsageError, match=r"^source.path: more than 2 URLs of .* give each URL one row"):
        items(table(tmp_path / "t.csv", rows))
    assert len(items(table(tmp_path / "t.csv", rows[:4]))[0]) == 2


def test_lists_of_urls_need_a_label(tmp_path: Path) -> None:
    for name, numbers in (("rose.txt", (1, 2)), ("lily.v2.txt", (2, 3))):
        (tmp_path / name).write_text("".join(f"{url(number)}\n" for number in numbers))
    with pytest.raises(
        UsageError, match=r"rose.txt lists URLs without labels: set source.label=NAME, or source.label="
    ):
        items(tmp_path / "rose.txt")
    found, _ = items(tmp_path / "rose.txt", "source.label=a rose")
    assert [item.labels for item in found] == [("a rose",)] * 2
    found, _ = items(tmp_path, "source.label={file}")
    assert {item.file_url: item.labels for item in found} == {
        url(1): ("rose",),
        url(2): ("lily.v2", "rose"),
        url(3): ("lily.v2",),
    }


def test_what_was_recognised_is_noted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(f"url,label\n{url(1)},初音ミク\n{url(2)},鏡音リン\n".encode("cp932"))
    (tmp_path / "more.xlsx").write_bytes(b"PK")
    found, notes = items(tmp_path)
    assert [item.labels for item in found] == [("初音ミク",), ("鏡音リン",)]
    assert notes[1:] == [
        "1 other file of the folder skipped: more.xlsx",
        "1 table read as cp932, not UTF-8; source.encoding sets another encoding",
    ]
    found, notes = items(tmp_path, "source.encoding=cp932")
    assert found[0].labels == ("初音ミク",)
    assert len(notes) == 2
    (tmp_path / "t.csv").write_bytes(f"url,label\n{url(1)},роза\n".encode("cp1251"))
    with pytest.raises(UsageError, match=r"t\.csv, line 2: the text may be cp1251 or .* or set source\.encoding$"):
        items(tmp_path / "t.csv")
    assert [item.labels for item in items(tmp_path / "t.csv", "source.encoding=cp1251")[0]] == [("роза",)]
    (tmp_path / "t.csv").write_bytes(f"url,label\n{url(1)},".encode() + b"\xff\xfe\x81\n")
    with pytest.raises(UsageError, match=r"not UTF-8 text in the column for label; save .* or set source.encoding\)$"):
        items(tmp_path / "t.csv")
    (tmp_path / "t.jsonl").write_text(json.dumps({"url": url(1), "label": {"a": 1}}))
    _, notes = items(tmp_path / "t.jsonl")
    assert notes[-1] == ("1 value of the column for label ignored: not text, a number, a date or a list of these")


def test_hostile_rows_become_reasons_and_nothing_is_lost(tmp_path: Path) -> None:
    hostile = ["file:///etc/passwd", "javascript:alert(1)", '"data:image/png;base64,AA"', "http://10.0.0.1/x", "=1+1",
               "http://a.example/\0", "http://u:p@a.example/", "http://a.example/" + "x" * 10_000]  # fmt: skip
    rows = [f"{each},=cmd|' /C calc'!A0" for each in hostile] + ["too,many,cells", '"open,rose', f"{url(1)},=1+1"]
    found, notes = items(table(tmp_path / "t.csv", rows))
    assert [item.failure for item in found] == ["unsafe address"] * 8 + ["bad record"] * 2 + [""]
    assert [item.detail for item in found][8:10] == [
        "t.csv, line 10: 3 cells instead of 2",
        "t.csv, line 11: not a row: its quotes do not match",
    ]
    assert found[-1].labels == ("=1+1",)
    assert all(len(item.file_url) <= 1000 and item.locator == "{}" for item in found[:8])
    assert len({item.key for item in found}) == len(found)
    assert any("t.csv, line 2: only http and https are fetched, not file" in note for note in notes)


def test_urls_of_named_private_hosts_are_listed(tmp_path: Path) -> None:
    rows = ["http://127.0.0.1:8080/1.jpg,a", "http://127.0.0.1:8081/2.jpg,a", "http://10.0.0.1/3.jpg,a"]
    found, _ = items(table(tmp_path / "t.csv", rows, "url,label"), "source.allow_private=['127.0.0.1:8080']")
    assert [item.failure for item in found] == ["", "unsafe address", "unsafe address"]


def test_bad_rows_of_tables_with_the_same_name_have_different_keys(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        table(tmp_path / f"{number}" / "t.csv", ["one,two,three", f"{url(number)},a"])
    found, notes = items(Path(f"{tmp_path}/*/t.csv"))
    assert [item.failure for item in found] == ["bad record", ""] * 3
    assert notes[1].startswith("rows that cannot be read and count as bad records: 3 (t.csv, line 2: 3 cells")
    assert not any("repeat" in note for note in notes)


def test_nothing_usable_is_one_sentence(tmp_path: Path) -> None:
    for rows, header, why in (
        (["x,y"], "name,address", "no column of URLs is recognised among"),
        (["file:///etc/passwd,a"], "url,label", "only http and https"),
        ([], "url,label", "has a usable URL$"),
    ):
        with pytest.raises(UsageError, match=rf"^source.path: no row of .*{why}"):
            items(table(tmp_path / "t.csv", rows, header))
    with pytest.raises(UsageError, match=r"^source.path: no file or folder matches .*none.csv$"):
        items(tmp_path / "none.csv")
    with pytest.raises(UsageError, match=r"there is no column 'speceis' among 'url', 'label'"):
        items(table(tmp_path / "t.csv", [f"{url(1)},a"]), "source.label_column=speceis")


# -- the whole road --------------------------------------------------------------------------------------------------


def test_from_a_table_to_a_dataset(server: LocalServer, tmp_path: Path) -> None:
    rows = [f"{url(number)},class {number % 2},g{number // 2},CC0" for number in range(24)]
    path = table(tmp_path / "t.csv", rows, "url,label,group,licence")
    result = animesion.build(recipe(path, "duplicates.near=false"), tmp_path / "out", workers=1)
    assert (result.seen, result.kept, result.classes) == (24, 24, ["class 0", "class 1"])
    assert {row["licence"] for row in raw(tmp_path / "out").values()} == {"CC0"}
    assert server.journal.paths["/robots.txt"] == len(HOSTS)


def test_a_url_under_two_labels_is_dropped_with_both_and_no_file_is_requested_twice(
    server: LocalServer, tmp_path: Path
) -> None:
    rows = [f"{url(number)},class {number % 2},{number}" for number in range(4)]
    rows += [f"file:///{number}.png,class 0,{number}" for number in range(4, 600)]
    # beyond the first part of the listing
    rows += [f"{url(0)},class 1,600", f"{url(2)},class 0,3"]
    result = runner.run(
        recipe(
            table(tmp_path / "t.csv", rows, "url,label,group"), "source.requests_per_second=10", "filter.min_side=1000"
        ),
        tmp_path / "out",
        workers=1,
        until="fetch",
    )
    rows_by_url = {row["file_url"]: row for row in raw(tmp_path / "out").values()}
    assert result.seen == len(rows_by_url) == 600
    assert (rows_by_url[url(0)]["reason"], rows_by_url[url(0)]["labels"]) == ("several labels", ["class 0", "class 1"])
    assert rows_by_url[url(2)]["families"] == ["group:2", "group:3"]
    assert "/data/0.png" not in server.journal.paths
    assert server.journal.paths["/data/2.png"] == 1


@pytest.mark.parametrize("server", [FaultPlan(share=0.5, kinds=("404", "410", "empty", "wrong type", "noai", "500"))],
                         indirect=True)  # fmt: skip
def test_faults_are_accounted_for_and_a_second_run_requests_only_temporary_failures(
    server: LocalServer, tmp_path: Path, asked: Counter[str]
) -> None:
    plan = FaultPlan(share=0.5, kinds=("404", "410", "empty", "wrong type", "noai", "500"))
    path = table(tmp_path / "t.csv", [f"{url(number)},a" for number in range(30)] + ["file:///x,a", "one,two,three"])
    first = runner.run(recipe(path), tmp_path / "out", workers=1, until="fetch")
    rows = raw(tmp_path / "out")
    fault = {key: plan.fault(row["file_url"].partition(".invalid")[2]) for key, row in rows.items()}
    assert first.seen == len(rows) == 32
    assert len(set(fault.values())) == 7
    assert {key for key, row in rows.items() if row["sha256"]} == {key for key in asked if fault[key] not in LASTING}
    assert Counter(row["reason"] for row in rows.values() if not row["file_url"] or "file:" in row["file_url"]) == {
        "bad record": 1,
        "unsafe address": 1,
    }
    asked.clear()
    runner.run(recipe(path), tmp_path / "out", workers=1, until="fetch")
    assert not asked
    runner.run(recipe(path), tmp_path / "out", workers=1, until="fetch", retry_failed=True)
    assert set(asked) == {key for key in fault if fault[key] in LASTING}


def test_a_resumed_crawl_requests_no_downloaded_file(server: LocalServer, tmp_path: Path, asked: Counter[str]) -> None:
    chosen = recipe(
        table(tmp_path / "t.csv", [f"{url(number)},a" for number in range(21)]), "source.requests_per_second=10"
    )

    class StoppedError(Exception):
        pass

    class Stop(Progress):
        def advanced(self, count: int) -> None:
            if asked:
                raise StoppedError

    with pytest.raises(StoppedError):
        runner.run(chosen, tmp_path / "out", workers=1, until="fetch", progress=Stop())
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / ".crawl" / "ledger.sqlite")) as ledger:
        had = {key for (key,) in ledger.execute("SELECT key FROM items WHERE state = 'done'")}
    assert 0 < len(had) < 21
    asked.clear()
    runner.run(chosen, tmp_path / "out", workers=1, until="fetch")
    rows = raw(tmp_path / "out")
    assert all(row["sha256"] for row in rows.values())
    assert set(asked) == set(rows) - had


def test_an_update_takes_the_rows_that_were_appended(server: LocalServer, tmp_path: Path, asked: Counter[str]) -> None:
    folder, out = tmp_path / "tables", tmp_path / "out"
    folder.mkdir()
    rows = [f"{url(number)},a" for number in range(4)]
    table(folder / "a.csv", rows)
    runner.run(recipe(folder), out, workers=1, until="fetch")
    assert len(asked) == 4
    asked.clear()
    table(folder / "a.csv", [*rows, f"{url(4)},a", f"{url(0)},a"])
    table(folder / "b.csv", [f"{url(5)},a", f"{url(4)},a"])
    assert runner.run(recipe(folder), out, workers=1, until="fetch").seen == 4
    assert not asked
    result = runner.run(recipe(folder), out, workers=1, until="fetch", update=True)
    assert (result.seen, sum(asked.values())) == (6, 2)
    assert [row["order"] for row in raw(out).values()] == [0, 1, 2, 3, 4, 6]
    asked.clear()
    assert runner.run(recipe(folder), out, workers=1, until="fetch", update=True).seen == 6
    assert not asked
    for name, content in (("0.csv", [f"{url(9)},a"]), ("a.csv", rows[:1])):
        table(folder / name, content)
        with pytest.raises(UsageError, match="an update accepts only rows at the end"):
            runner.run(recipe(folder), out, workers=1, until="fetch", update=True)
        (folder / "0.csv").unlink(missing_ok=True)


# -- dry runs --------------------------------------------------------------------------------------------------------


def test_a_dry_run_reports_the_requests_by_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"https://big.example/{number},a,1000" for number in range(20)]
    rows += [f"https://h{number:02d}.example/,a," for number in range(30)]
    arguments = ["build", "urls", "--dry-run", "--out", str(tmp_path / "out"), "--set", "source.contact=me@example.org"]
    arguments += ["--set", f"source.path={table(tmp_path / 't.csv', rows, 'url,label,bytes')}"]
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["requests"], facts["hosts"], facts["bytes_to_fetch"], facts["bytes_unknown"]) == (112, 31, 20_000, 30)
    assert 22 <= facts["seconds"] < 24
    assert len(facts["busiest_hosts"]) == 10
    assert facts["busiest_hosts"][0] == {
        "host": "big.example", "files": 20, "requests": 22, "seconds": facts["seconds"], "bytes": 20_000,
        "bytes_unknown": 0,
    }  # fmt: skip
    with pytest.raises(SystemExit):
        main(arguments)
    output = capsys.readouterr().out
    assert "note: 31 hosts; the busiest: big.example 22 requests, 0.0 MB, 0:00:23; h00.example 3 requests" in output
    assert "; 21 more\n" in output
    assert not (tmp_path / "out").exists()


PEAK = """
import resource, sys
from pathlib import Path
import animesion
from animesion.pipeline import preview
recipe = animesion.load_recipe("urls", [f"source.path={sys.argv[1]}", "source.contact=me@example.org"])
facts = preview.preview(recipe, Path(sys.argv[2]))
print(facts["listed"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


WITHOUT_PARENT = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


@pytest.mark.slow
def test_memory_hardly_grows_with_the_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    peaks = {}
    for rows in (100_000, 400_000):
        path = tmp_path / f"{rows}.parquet"
        with pq.ParquetWriter(path, pa.schema([("url", pa.string()), ("label", pa.string())])) as writer:
            for start in range(0, rows, 50_000):
                some = range(start, start + 50_000)
                urls = [f"https://h{number % 30_000}.example/photos/{number:08d}.jpg" for number in some]
                writer.write_table(pa.table({"url": urls, "label": [f"c{number % 100}" for number in some]}))
        # the peak of a child counts that of its parent before exec, so the parent is a small one
        command = [sys.executable, "-c", WITHOUT_PARENT, sys.executable, "-c", PEAK]
        done = subprocess.run([*command, path, tmp_path / "out"], capture_output=True, text=True, check=True)
        listed, kilobytes = map(int, done.stdout.split())
        assert listed == rows
        peaks[rows] = kilobytes / 1024
    # 300,000 items alone are 300 MB, their URLs 25 MB; digests are 2.4 MB and up to three times that while they merge
    assert peaks[400_000] - peaks[100_000] < 16
    assert peaks[400_000] < 400
