"""The `indexed-tar` source: offsets from an index, on disk and over HTTP with range requests."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from animesion.errors import AnimesionError, UsageError
from animesion.schemas import Item, Payload
from animesion.sources.indexed_tars import IndexedTarOptions, IndexedTarSource
from tests.answering import answering

HOST = "mirror.example"


def mirror(folder: Path, tar: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Write a tar and its index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tar}.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    entries = {}
    with tarfile.open(path) as archive:
        for member in archive:
            digest = hashlib.sha256(files[member.name]).hexdigest()
            entries[member.name] = {"offset": member.offset_data, "size": member.size, "sha256": digest}
    index = {"filesize": path.stat().st_size, "hash": "0" * 40, "hash_lfs": "0" * 64, "files": entries}
    (folder / f"{tar}.json").write_text(json.dumps(index))
    return index


def listed(index: Path | str, **options: Any) -> tuple[IndexedTarSource, list[Item]]:
    source = IndexedTarSource(IndexedTarOptions(index=str(index), **options))
    source.connect_to = options_to.copy()
    with source.session():
        items = list(source.items())
    assert len({item.key for item in items}) == len(items)
    return source, items


options_to: dict[str, tuple[str, int]] = {}


def read(source: IndexedTarSource, items: list[Item]) -> list[Payload]:
    with source.session():
        return list(source.read(items))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mirror"
    mirror(root, "0000", {"1000.jpg": b"image 1000", "2000.png": b"image 2000", "note.md": b"#"})
    mirror(root, "0001", {"1001.jpg": b"image 1001"})
    (tmp_path / "labels.csv").write_text("id,label,split\n1000,miku,train\n2000,rin,test\n2000,len,test\n")
    return root


def test_labels_of_a_table_by_id(folder: Path) -> None:
    labels = str(folder.parent / "labels.csv")
    source, items = listed(folder, labels=labels)
    assert [(item.source_id, item.labels, item.split) for item in items] == [
        ("0000.tar/1000.jpg", ("miku",), "train"),
        ("0000.tar/2000.png", ("rin", "len"), "test"),
        ("0001.tar/1001.jpg", (), ""),
    ]
    assert source.notes == [
        "3 classes in splits train/test, by labels.csv; 3 images in 2 tars; 1 image has no label; files that are no "
        "images, left out: 1 (source.labels gives other labels)"
    ]
    assert [payload.content for payload in read(source, items)] == [b"image 1000", b"image 2000", b"image 1001"]
    assert len(listed(folder / "0000.json", labels=labels)[1]) == 2
    assert len(listed(f"{folder}/{{0000..0001}}.json", labels=labels)[1]) == 3


def test_tars_in_another_folder_and_labels_by_file(folder: Path) -> None:
    tars = folder.parent / "tars"
    tars.mkdir()
    for path in folder.glob("*.tar"):
        path.rename(tars / path.name)
    (folder / "meta.json").write_text("{}")
    table = folder.parent / "by-file.csv"
    table.write_text("file;character\n1000.jpg;miku\n0001.tar/1001.jpg;rin\n")
    source, items = listed(folder, tars=str(tars), labels=str(table))
    assert [item.labels for item in items] == [("miku",), (), ("rin",)]
    assert [payload.reason for payload in read(source, items)] == ["", "", ""]
    with pytest.raises(UsageError, match=r"contains no \.tar files|not found"):
        listed(folder, labels=str(table))


def test_labels_of_json_members(tmp_path: Path) -> None:
    def member(**keys: Any) -> bytes:
        return json.dumps(keys).encode()

    mirror(
        tmp_path, "0000",
        {"1.jpg": b"1", "1.json": member(tag_string_character="miku rin", rating="g", tag_string_artist="A"),
         "2.jpg": b"2", "2.json": b"[[[", "3.jpg": b"3"},
    )  # fmt: skip
    _, items = listed(tmp_path)
    assert [item.labels for item in items] == [("miku", "rin"), (), ()]
    assert (items[0].rating, items[0].author) == ("g", "A")


def test_images_without_any_label_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"none of the 3 images has a label: no \.json member"):
        listed(folder)
    table = folder.parent / "t.csv"
    table.write_text("id,label\n9,x\n")
    with pytest.raises(UsageError, match="none of the 3 images has a label in "):
        listed(folder, labels=str(table))
    table.write_text("a,b\n9,x\n")
    with pytest.raises(UsageError, match="needs a header with the columns id or file, and label"):
        listed(folder, labels=str(table))
    with pytest.raises(UsageError, match="cannot be read"):
        listed(folder, labels=str(folder / "no.csv"))


# -- hostile indexes -------------------------------------------------------------------------------------------------


def test_places_outside_the_tar_and_unsafe_names_are_counted_drops(folder: Path) -> None:
    index = json.loads((folder / "0000.json").read_text())
    end = index["filesize"]
    good = index["files"]["1000.jpg"]
    index["files"] |= {
        "a.jpg": {"offset": -5, "size": 3}, "b.jpg": {"offset": 0, "size": -1}, "c.jpg": {"offset": end - 1, "size": 2},
        "d.jpg": {"offset": 1 << 80, "size": 1}, "e.jpg": {"offset": True, "size": 1}, "f.jpg": None,
        "g.jpg": {"offset": "7", "size": 1.5}, "../h.jpg": good, "/i.jpg": good, "j\0.jpg": good, "C:/k.jpg": good,
        "l.jpg": {"offset": 0, "size": end}, "m.jpg": {**good, "sha256": "0" * 64}, "n.jpg": {**good, "sha256": "zz"},
    }  # fmt: skip
    (folder / "0000.json").write_text(json.dumps(index))
    source, items = listed(folder / "0000.json", labels=str(folder.parent / "labels.csv"), max_bytes=1000)
    failures = {item.source_id.removeprefix("0000.tar/"): item.failure for item in items}
    assert {name for name, failure in failures.items() if failure == "bad record"} == {f"{c}.jpg" for c in "abcdefg"}
    unsafe = {"../h.jpg", "/i.jpg", "j .jpg", "C:/k.jpg"}
    assert {name for name, failure in failures.items() if failure == "unsafe path"} == unsafe
    assert failures["l.jpg"] == "too many bytes"
    assert "7 entries have no valid place in their tar, such as offset" in source.notes[0]
    fetched = {item.source_id.removeprefix("0000.tar/"): item for item in items if not item.failure}
    reasons = dict(zip(fetched, [payload.reason for payload in read(source, list(fetched.values()))], strict=True))
    assert reasons == {"1000.jpg": "", "2000.png": "", "m.jpg": "checksum mismatch", "n.jpg": ""}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', "[" * 100_000, "\0"])
def test_files_that_are_no_index_are_refused(folder: Path, content: str) -> None:
    (folder / "0000.json").write_text(content)
    with pytest.raises(UsageError, match=r"is no JSON|is no index of a tar") as caught:
        listed(folder / "0000.json", labels=str(folder.parent / "labels.csv"))
    assert "\n" not in str(caught.value)


def test_an_index_of_another_tar_and_a_missing_tar(folder: Path) -> None:
    labels = str(folder.parent / "labels.csv")
    with (folder / "0000.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UsageError, match="get both again"):
        listed(folder, labels=labels)
    (folder / "0000.tar").unlink()
    with pytest.raises(UsageError, match=r"0000\.tar not found"):
        listed(folder, labels=labels)


def test_a_tar_that_shrinks_after_the_listing(folder: Path) -> None:
    source, items = listed(folder, labels=str(folder.parent / "labels.csv"))
    (folder / "0000.tar").write_bytes(b"x" * 500)
    (folder / "0001.tar").unlink()
    reasons = [payload.reason for payload in read(source, items)]
    assert reasons == ["fetch failed", "fetch failed", "missing file"]


# -- over HTTP -------------------------------------------------------------------------------------------------------


def serve(folder: Path, sent: list[int], how: str = "ranges") -> Callable[[web.Request], web.Response]:
    def answer(request: web.Request) -> web.Response:
        path = folder / request.path.rpartition("/")[2]
        if not path.exists():
            return web.Response(status=404)
        content, status, headers = path.read_bytes(), 200, {}
        wanted = request.headers.get("Range", "")
        if wanted and how != "whole":
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            total, status = len(content), 206
            if first >= total:
                return web.Response(status=416)
            first += how == "shifted"
            content = content[first:] if how == "long" else content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{total}"
        sent.append(len(content))
        return web.Response(body=content, status=status, headers=headers)

    return answer


def over_http(folder: Path, sent: list[int], how: str = "ranges", **options: Any) -> list[Payload]:
    with answering(serve(folder, sent, how)) as server:
        options_to[HOST] = server.address
        settings = {
            "contact": "a@example.org",
            "requests_per_second": 10.0,
            "labels": str(folder.parent / "labels.csv"),
        }
        try:
            source, items = listed(f"http://{HOST}/set/{{0000..0001}}.json", **(settings | options))
            return read(source, items)
        finally:
            options_to.clear()


def test_images_are_read_by_range_requests(folder: Path) -> None:
    sent: list[int] = []
    payloads = over_http(folder, sent)
    assert [payload.content for payload in payloads] == [b"image 1000", b"image 2000", b"image 1001"]
    assert sorted(sent)[:4] == [1, 10, 10, 10]  # one byte to try the server, then the images
    assert len(sent) == 6  # and the two indexes


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("whole", "ignores Range requests and sends the whole file; nothing of it was read"),
        ("shifted", "another piece of the file"),
        ("long", "another piece of the file|more bytes"),
    ],
)
def test_servers_that_send_something_else_are_refused(folder: Path, how: str, message: str) -> None:
    with pytest.raises(AnimesionError, match=message) as caught:
        over_http(folder, [], how)
    assert "\n" not in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "downloads"]


def test_missing_indexes_and_tars_over_http(folder: Path) -> None:
    (folder / "0001.tar").unlink()
    assert [payload.reason for payload in over_http(folder, [])] == ["", "", "not found"]
    (folder / "0001.json").unlink()
    with pytest.raises(AnimesionError, match=r"0001\.json could not be fetched"):
        over_http(folder, [])


def test_web_addresses_need_a_contact_and_a_pattern() -> None:
    with pytest.raises(UsageError, match=r"source\.contact"):
        listed(f"https://{HOST}/0000.json")
    with pytest.raises(UsageError, match="a web server lists no files"):
        listed(f"https://{HOST}/set/", contact="a@example.org")


def test_private_addresses_are_refused() -> None:
    with pytest.raises(AnimesionError, match="not on the public internet"):
        listed("http://127.0.0.1:9/0000.json", contact="a@example.org")


def test_a_mirror_on_loopback_is_named_and_no_other_host_is_asked(folder: Path) -> None:
    sent: list[int] = []
    stray: list[int] = []
    with answering(serve(folder, sent)) as server, answering(serve(folder, stray)) as other:
        here, there = (f"127.0.0.1:{each.address[1]}" for each in (server, other))
        settings: dict[str, Any] = {
            "contact": "a@example.org",
            "requests_per_second": 10.0,
            "labels": str(folder.parent / "labels.csv"),
            "allow_private": [here],
        }
        source, items = listed(f"http://{here}/{{0000..0001}}.json", **settings)
        assert [payload.content for payload in read(source, items)] == [b"image 1000", b"image 2000", b"image 1001"]
        with pytest.raises(AnimesionError, match="not on the public internet"):
            listed(f"http://{here}/{{0000..0001}}.json", tars=f"http://{there}", **settings)
        with pytest.raises(AnimesionError, match="not on the public internet"):
            listed(f"http://{there}/{{0000..0001}}.json", **settings)
    assert sent
    assert not stray


def test_malformed_private_hosts_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="allow_private accepts host:port"):
        IndexedTarOptions(index=str(folder), allow_private=["127.0.0.1"])
