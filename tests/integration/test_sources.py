"""Local sources: items and their order, hostile names, archives and rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import animesion
from animesion import sources
from animesion.errors import UsageError
from animesion.schemas import Item, Payload


def jpeg(colour: str = "red", size: tuple[int, int] = (16, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "JPEG")
    return out.getvalue()


def put(root: Path, name: str, content: bytes | None = None) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg() if content is None else content)


def listing(recipe: str, *overrides: str) -> tuple[sources.Source, dict[str, Item]]:
    source = sources.make(animesion.load_recipe(recipe, list(overrides)))
    with source.session():
        items = {item.source_id: item for item in source.items()}
    assert len({item.key for item in items.values()}) == len(items)
    return source, items


def contents(source: sources.Source, items: Iterable[Item]) -> list[Payload]:
    with source.session():
        return list(source.read(list(items)))


# -- folder ----------------------------------------------------------------------------------------------------------


def test_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "a/deep/er/1.jpg", "a/1.jpg", "loose.jpg"):
        put(tmp_path, name)
    source, items = listing("folder", f"source.path={tmp_path}")
    assert [(item.source_id, item.labels) for item in items.values()] == [
        ("a/1.jpg", ("a",)),
        ("a/deep/er/1.jpg", ("a",)),
        ("b/2.jpg", ("b",)),
        ("loose.jpg", ()),
    ]
    assert all(payload.content == jpeg() for payload in contents(source, items.values()))


def test_names_with_unicode_spaces_newlines_and_case_twins(tmp_path: Path) -> None:
    names = ["初音 ミク/ピ ク.jpg", "a/line\nbreak.jpg", "a/X.jpg", "a/x.jpg", "a/..jpg.jpg", "a/" + "n" * 200 + ".jpg"]
    for name in names:
        put(tmp_path, name)
    put(tmp_path, os.fsdecode(b"a/\xff\xfe.jpg"))
    source, items = listing("folder", f"source.path={tmp_path}")
    assert len(items) == 6  # `..jpg.jpg` starts with a dot: hidden, and said so
    assert any("hidden" in note for note in source.notes)
    assert "a/line break.jpg" in items
    assert all(item.key.isascii() and len(item.key) <= 80 for item in items.values())
    assert all(not payload.reason for payload in contents(source, items.values()))


def test_images_of_one_post_are_one_family(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 2
    ours = (
        f"a/{digest}-1.jpg",
        f"b/{digest}-2.jpg",
        f"a/{digest}.webp-3.jpg",
        f"b/{digest}_word-4.jpg",
        f"a/{digest}.jpg",
    )
    for name in (*ours, f"a/{digest}0-1.jpg", "a/img-1.jpg", "a/img-2.jpg"):
        put(tmp_path, name)
    _, items = listing("folder", f"source.path={tmp_path}")
    assert {items[name].families for name in ours} == {(f"file:{digest}",)}
    assert items[f"a/{digest}0-1.jpg"].families == ()  # 33 digits are no digest
    assert items["a/img-1.jpg"].families == ()
    _, items = listing("folder", f"source.path={tmp_path}", "source.family='(img)-[0-9]+'")
    assert items["a/img-1.jpg"].families == items["a/img-2.jpg"].families == ("file:img",)


def test_equivalent_folder_names_and_outputs_of_builds_are_noted(tmp_path: Path) -> None:
    for name in ("a b/1.jpg", "a  b/2.jpg", "c/3.jpg", "out/.receipts/x.json", "out/plots/4.jpg"):
        put(tmp_path, name)
    source, items = listing("folder", f"source.path={tmp_path}")
    assert {item.labels for item in items.values()} == {("a b",), ("c",)}
    assert any("are one class: 'a b'" in note for note in source.notes)
    assert "folder 'out' is the output of a build: skipped" in source.notes


def test_empty_class_folders_are_noted_and_other_files_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg")
    put(tmp_path, "a/notes.txt", b"hello")
    (tmp_path / "nobody").mkdir()
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    source, items = listing("folder", f"source.path={tmp_path}")
    assert "class folder 'nobody' is empty" in source.notes
    assert any("already read under another name" in note for note in source.notes)
    assert {name: item.failure for name, item in items.items()} == {
        "a/1.jpg": "",
        "a/gone.jpg": "missing file",
        "a/notes.txt": "",
        "a/pipe.jpg": "not a regular file",
    }


def tar_of(path: Path, members: Iterable[tuple[Any, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_hostile_tars_lose_only_their_hostile_members(tmp_path: Path) -> None:
    archive = tar_of(
        tmp_path / "set.tar",
        [
            ("a/good.jpg", jpeg("red")),
            ("a/good.jpg", jpeg("blue")),
            ("/etc/passwd", b"x"),
            ("a/../../escape.jpg", jpeg()),
            ("C:/windows.jpg", jpeg()),
            (special("a/link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (special("a/hard.jpg", tarfile.LNKTYPE, "a/good.jpg"), b""),
            (special("a/device.jpg", tarfile.CHRTYPE), b""),
            ("a/" + "long" * 40 + ".jpg", jpeg("green")),
            ("a/初音.jpg", jpeg("white")),
            ("__MACOSX/a/._good.jpg", b"x"),
        ],
    )
    source = sources.make(animesion.load_recipe("folder", [f"source.path={archive}"]))
    items = list(source.items())
    failures = [(item.source_id, item.failure) for item in items if item.failure]
    assert sorted(failures) == [
        ("/etc/passwd", "unsafe path"),
        ("C:/windows.jpg", "unsafe path"),
        ("a/../../escape.jpg", "unsafe path"),
        ("a/device.jpg", "not a regular file"),
        ("a/link.jpg", "not a regular file"),
    ]
    good = [item for item in items if not item.failure]
    assert len({item.key for item in items}) == len(items) == 10
    contents = [(item.source_id, payload.content) for item, payload in zip(good, source.read(good), strict=True)]
    assert {content for _, content in contents} == {jpeg(c) for c in ("red", "blue", "green", "white")}
    assert ("a/hard.jpg", jpeg("blue")) in contents  # a hard link is another name of the file that came before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.tar"]


def test_zips_are_read_in_place_and_bombs_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("root/a/1.jpg", jpeg())
        archive.writestr("root/b/bomb.jpg", bytes(2_000_000))
        archive.writestr("root/b/../../up.jpg", jpeg())
        link = zipfile.ZipInfo("root/b/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    source, items = listing("folder", f"source.path={path}", "source.max_bytes=1000000")
    assert {name.rpartition("/")[2]: item.failure for name, item in items.items()} == {
        "1.jpg": "",
        "bomb.jpg": "too many bytes",
        "up.jpg": "unsafe path",
        "link.jpg": "not a regular file",
    }
    [good] = [item for item in items.values() if not item.failure]
    assert good.labels == ("a",)  # the one folder around everything is no class
    assert contents(source, [good])[0].content == jpeg()


def test_damaged_archives_are_refused_by_name(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "whole.tar", [(f"a/{i}.jpg", jpeg()) for i in range(5)])
    with tarfile.open(path) as archive:
        second, third = (archive.getmembers()[i].offset for i in (1, 2))
    whole = path.read_bytes()
    cases = {
        "cut.tar": (whole[: third - 100], "damaged after 'a/1.jpg'"),
        "header.tar": (whole[:second] + b"\xff" * 512 + whole[second + 512 :], "damaged header at byte"),
        "noise.tar": (os.urandom(5000), "neither a folder nor a readable .tar or .zip"),
        "empty.tar": (b"", "neither a folder nor a readable .tar or .zip|contains no files"),
        "set.tar.gz": (b"\x1f\x8b", "compressed as a whole"),
    }
    for name, (content, sentence) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=sentence):
            listing("folder", f"source.path={tmp_path / name}")
    with pytest.raises(UsageError, match=r"source\.path: .* not found"):
        listing("folder", f"source.path={tmp_path / 'absent'}")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UsageError, match="contains no files"):
        listing("folder", f"source.path={tmp_path / 'hollow'}")


# -- labels ----------------------------------------------------------------------------------------------------------


def label_files(root: Path, *, header: bool) -> None:
    root.mkdir(parents=True, exist_ok=True)
    head = "class_id,dir\n" if header else ""
    (root / "train.csv").write_text(head + "1,0007/1007.jpg\n0,0008/1008.jpg\n0,0009\\1009.jpg\n")
    (root / "test.csv").write_text(head + "1,0010/1010.jpg\n0,../../etc/passwd\n")
    (root / "classid_classname.csv").write_text(("class_id,class_name\n" if header else "") + "0,rei\n1,asuka\n")


@pytest.mark.parametrize("header", [True, False])
def test_label_files_keep_published_ids_and_splits(tmp_path: Path, header: bool) -> None:
    label_files(tmp_path / "labels", header=header)
    for name in ("0007/1007.jpg", "008/1008.jpg", "0009/1009.jpg"):  # one bucket of three digits
        put(tmp_path / "faces", name)
    settings = (f"source.labels={tmp_path / 'labels'}", f"source.images={tmp_path / 'faces'}")
    source, items = listing("daf-re-published", *settings)
    found = {name: (i.labels[0], i.class_order, i.split, i.failure, i.order) for name, i in items.items()}
    assert found == {
        "1007": ("asuka", 1, "train", "", 0),
        "1008": ("rei", 0, "train", "", 1),
        "1009": ("rei", 0, "train", "", 2),
        "1010": ("asuka", 1, "test", "missing file", 3),
        "../../etc/passwd": ("rei", 0, "test", "unsafe path", 4),
    }
    assert items["1008"].key == "danbooru-1008"
    assert items["1008"].page_url == "https://danbooru.donmai.us/posts/1008"
    assert contents(source, [items["1008"]])[0].content == jpeg()


def test_two_published_ids_do_not_become_one_class(tmp_path: Path) -> None:
    label_files(tmp_path, header=False)
    (tmp_path / "classid_classname.csv").write_text("0,rei\n1,rei \u3000\n")
    with pytest.raises(UsageError, match=r"have the same name 'rei' up to|twice"):
        listing("daf-re-published", f"source.labels={tmp_path}", f"source.images={tmp_path}")


def test_a_wrong_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    label_files(tmp_path, header=True)
    (tmp_path / "train.csv").write_text("class_id,dir\n0,0007/1007.jpg\nmiku,0008/1008.jpg\n")
    with pytest.raises(UsageError, match=r"train\.csv, line 3: .*miku"):
        listing("daf-re-published", f"source.labels={tmp_path}", f"source.images={tmp_path}")
    with pytest.raises(UsageError, match=r"source\.images: .*absent not found"):
        listing("daf-re-published", f"source.labels={tmp_path}", f"source.images={tmp_path / 'absent'}")
    with pytest.raises(UsageError, match=r"source\.labels: .* not found"):
        listing("daf-re-published", f"source.labels={tmp_path / 'absent'}", f"source.images={tmp_path}")


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_composed_and_decomposed_names_are_one_file(tmp_path: Path, written: str) -> None:
    names = [unicodedata.normalize("NFC", "Klärchen/が.jpg"), unicodedata.normalize("NFD", "Klärchen/が.jpg")]
    on_disk, listed = names if written == "NFC" else names[::-1]
    put(tmp_path, on_disk)
    (tmp_path / "train.csv").write_text(f"0,{listed}\n", encoding="utf-8")
    settings = [f"source.labels={tmp_path / 'train.csv'}", f"source.images={tmp_path}"]
    source, found = listing("daf-re-published", *settings)
    assert [item.failure for item in found.values()] == [""]
    assert [payload.reason for payload in contents(source, found.values())] == [""]


# -- dump ------------------------------------------------------------------------------------------------------------


def record(number: int, *characters: str, **fields: Any) -> str:
    tags = [{"id": "1", "name": "solo", "category": "0"}, {"id": "9", "name": "someone", "category": "1"}]
    tags += [{"id": "2", "name": name, "category": "4"} for name in characters]
    base = {"id": str(number), "rating": "s", "file_ext": "png", "parent_id": "0", "pixiv_id": "0", "is_deleted": False}
    return json.dumps({**base, "tags": tags, **fields})


def test_dumps_with_numbers_as_strings_and_damaged_lines(tmp_path: Path) -> None:
    lines = [
        record(1007, "miku", "miku"),  # listed twice counts once
        record(1008, "miku", "rin"),
        record(1009),
        record(1010, "rin", parent_id="1007", rating="q"),
        record(1011, "rin", is_deleted=True),
        '{"id": "12',
        record(1012, "rin", file_ext="zip"),
        record(1007, "rin"),
        "[]",
        record(1013, "miku", source="https://www.pixiv.net/artworks/4242"),
    ]
    metadata = tmp_path / "2018.json"
    metadata.write_text("\n".join(lines) + "\n\n")
    faces = [(1013, 1, 0.9), (1007, 1, 0.8501), (1010, 0, 0.4), (1011, 0, 0.9), (1011, 0, 0.9)]
    (tmp_path / "faces.tsv").write_text(
        "".join(f"0{n % 1000:03d}\\{n}.jpg\t{tag}\t0.1, 0.2, 0.5, 0.75 {score}\n" for n, tag, score in faces)
    )
    (tmp_path / "tagIds.tsv").write_text("rin\t0\nmiku\t1\n")
    put(tmp_path / "512px", "0007/1007.jpg")
    put(tmp_path / "512px", "0013/1013.png")
    settings = [f"source.{k}={tmp_path / v}" for k, v in (("metadata", "2018.json"), ("images", "512px"))]
    settings += [f"source.{k}={tmp_path / v}" for k, v in (("faces", "faces.tsv"), ("tag_ids", "tagIds.tsv"))]
    recipe = animesion.load_recipe("daf-re", ["source={kind='dump'}", *settings, "classes.minimum=1"])
    source = sources.make(recipe)
    items = {item.source_id: item for item in source.items()}
    assert items["1007"].labels == ("miku",)
    assert items["1007"].class_order == 1
    assert items["1007"].order == 1  # its row in faces.tsv, which is the order of the published split
    assert items["1007"].boxes is not None
    assert items["1007"].boxes[0].right == 0.5
    assert items["1009"].boxes == ()
    assert set(items["1010"].families) == {"post:1010", "post:1007"}
    assert "pixiv:4242" in items["1013"].families
    assert items["1012"].failure == "unsupported format"
    assert [item.detail for item in items.values() if item.failure == "bad record"] == [
        "2018.json, line 6",
        "2018.json, line 9",
    ]
    assert "1 metadata record repeats a post and is skipped" in source.notes

    out = tmp_path / "out"
    animesion.build(recipe, out, workers=1, until="curate")
    found = {row["source_id"]: row["reason"] for row in animesion_rows(out)}
    assert found == {
        "1007": "too small",
        "1008": "several labels",
        "1009": "no label",
        "1010": "rating",
        "1011": "deleted",
        "1012": "no face",
        "1013": "too small",
        "2018.json:6": "bad record",
        "2018.json:9": "bad record",
    }


API = {"rating": "g", "file_ext": "jpg", "tag_string": "1girl miku solo", "tag_string_artist": "x y"}


@pytest.mark.parametrize("form", ["lines", "array", "indented array", "gzipped array"])
def test_exports_of_the_api_as_lines_or_as_one_array(tmp_path: Path, form: str) -> None:
    records = [
        {**API, "id": 1, "tag_string_character": "miku  rin"},
        {**API, "id": 2, "tag_string_character": "", "rating": "General"},
        {**API, "id": 3, "tags": None, "tags_character": ["miku"], "rating": "explicit"},
        {
            **API,
            "id": 4,
            "tags": [{"name": "rin", "category": 4}],
            "tag_string_character": "miku",
            "rating": "sensitive",
        },
        {**API, "id": 5, "tags": ["miku"], "tag_string_character": "rin", "rating": "unsafe"},
    ]
    records += [{**API, "id": 6 + i, "is_deleted": value} for i, value in enumerate(["t", "true", 1, True, 1.0])]
    records += [
        {**API, "id": 11 + i, "is_deleted": value} for i, value in enumerate(["f", "false", 0, False, None, ""])
    ]
    texts = [json.dumps(each) for each in records]
    data = {
        "lines": "\n".join(texts),
        "array": f"[{', '.join(texts)}]",
        "indented array": "\ufeff" + json.dumps(records, indent=1),
        "gzipped array": json.dumps(records),
    }[form].encode()
    path = tmp_path / ("m.json.gz" if form.startswith("gzip") else "m.json")
    path.write_bytes(gzip.compress(data) if form.startswith("gzip") else data)
    settings = [f"source.metadata={path}", f"source.images={tmp_path}", "crop.detector=none"]
    found = list(listing("daf-re", "source={kind='dump'}", *settings)[1].values())
    assert [(item.labels, item.rating) for item in found[:5]] == [
        (("miku", "rin"), "g"), ((), "g"), (("miku",), "e"), (("rin",), "s"), (("rin",), "?"),
    ]  # fmt: skip
    assert [item.flags for item in found[5:]] == [("deleted",)] * 5 + [()] * 6
    assert found[0].author == "x y"


def test_metadata_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    settings = ["source={kind='dump'}", f"source.metadata={path}", f"source.images={tmp_path}", "crop.detector=none"]
    path.write_text(f"[{record(1, 'miku')},\n{record(2, 'miku')[:-9]}")
    with pytest.raises(
        UsageError, match=r"m\.json, line 2: not a JSON array beyond this line; give one record per line"
    ):
        listing("daf-re", *settings)
    path.write_text("[" + json.dumps({"id": 1, "source": "x" * 2_000_000}) + "]")
    with pytest.raises(UsageError, match=r"line 1: a member of the array has more than 1,048,576 bytes"):
        listing("daf-re", *settings)
    path.write_bytes(b"PAR1" + bytes(40))
    with pytest.raises(UsageError, match=r"m\.json is a Parquet file: save its rows as JSON lines and give that$"):
        listing("daf-re", *settings)
    path.write_text(json.dumps({"id": 1, "file_ext": "jpg", "tag_string": "miku"}))
    source = sources.make(animesion.load_recipe("daf-re", settings))
    assert [item.labels for item in source.items()] == [()]
    assert source.notes == [
        "no post has a character: the metadata need `tags` with their categories, or `tag_string_character`"
    ]


def animesion_rows(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(out / "curated.parquet").to_pylist()
    return rows


def test_a_wrong_face_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(record(1007, "miku") + "\n")
    (tmp_path / "faces.tsv").write_text("0007/1007.jpg\t1\t0.1, 0.2, 0.5 0.9\n")
    settings = [f"source.metadata={tmp_path / 'm.json'}", f"source.images={tmp_path}"]
    with pytest.raises(UsageError, match=r"faces\.tsv, line 1: .*not five finite numbers"):
        listing("daf-re", "source={kind='dump'}", *settings, f"source.faces={tmp_path / 'faces.tsv'}")
