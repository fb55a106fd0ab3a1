"""Images below a root, found one by one and, where many are missing, by a listing of their folder."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from animesion.sources.dump import DumpOptions, DumpSource
from animesion.sources.image_root import ImageRoot


def test_a_folder_that_lacks_many_files_is_listed_and_answers_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["0007/1007.jpg", "007/2007.png", f"0007/{unicodedata.normalize('NFD', 'é')}.jpg", "flat.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "0007" / "3007.jpg").mkdir()
    asked = [*names, "0007/2007.png", "007/1007.jpg", "0007/3007.jpg", "0007/é.jpg", "0007/9007.jpg", "a/b.jpg"]
    asked += [
        "",
        ".",
        "./flat.jpg",
        "0007//1007.jpg",
        "flat.jpg/x.jpg",
        "../flat.jpg",
        "0007/\0.jpg",
        "x" * 300 + ".jpg",
    ]
    fresh = [ImageRoot(str(tmp_path), "source.images").locate(name) for name in asked]
    assert [failure for _, failure in fresh] == [
        *[""] * 6, "not a regular file", "", "missing file", "missing file",
        "not a regular file", "not a regular file", "", "", "missing file", "unsafe path", "unsafe path",
        "missing file",
    ]  # fmt: skip
    root = ImageRoot(str(tmp_path), "source.images")
    for post in range(100):
        for folder in ("", "0007/", "007/", "a/"):
            assert root.locate(f"{folder}{post}.gif") == ({}, "missing file")
    assert [root.locate(name) for name in asked] == fresh

    def stat(path: str) -> object:
        raise AssertionError(path)

    monkeypatch.setattr("animesion.sources.image_root.os.stat", stat)
    assert root.locate("0007/8007.jpg") == ({}, "missing file")


def test_categories_of_tags_are_numbers_as_text_or_whole_numbers(tmp_path: Path) -> None:
    tags = [("a", "4"), ("b", 4), ("c", True), ("d", 4.0), ("e", [4]), ("f", None), ("g", "1"), ("h", 1), (7, "4")]
    record = {"id": 1, "tags": [{"name": name, "category": category} for name, category in tags] + ["x"]}
    general = {"id": 2, "tags": [{"name": "solo", "category": "0"}], "tag_string_character": "miku"}
    unnamed = {"id": 3, "tags": [{"category": "4"}], "tag_string_character": "miku"}
    (tmp_path / "m.json").write_text("\n".join(map(json.dumps, (record, general, unnamed))))
    found = list(DumpSource(DumpOptions(metadata=str(tmp_path / "m.json"), images=str(tmp_path))).items())
    assert [(item.labels, item.author) for item in found] == [(("a", "b"), "g h"), ((), ""), (("miku",), "")]


def test_the_stamp_of_a_dump_covers_metadata_tables_and_images(tmp_path: Path) -> None:
    for name in ("meta/0.json", "faces.tsv", "tags.tsv", "aliases.csv", "images/0001/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    places = {
        "metadata": "meta",
        "faces": "faces.tsv",
        "tag_ids": "tags.tsv",
        "aliases": "aliases.csv",
        "images": "images",
    }
    options = DumpOptions.model_validate({name: str(tmp_path / path) for name, path in places.items()})
    source = DumpSource(options)
    seen = [source.stamp()]
    for name in ("meta/1.json", "meta/0.json", "faces.tsv", "tags.tsv", "aliases.csv", "images/0001/2.jpg"):
        assert source.stamp() == seen[-1]
        (tmp_path / name).write_text("{ }")
        seen.append(source.stamp())
    assert len(set(seen)) == 7
    assert "" not in seen
