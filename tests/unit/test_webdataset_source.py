"""The `webdataset` source: shards of ours and of others, labels by member, and hostile tars."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from animesion.errors import UsageError
from animesion.schemas import Item
from animesion.sources.webdataset_shards import WebDatasetOptions, WebDatasetSource

JPG = b"\xff\xd8\xff jpeg"


def shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def post(**keys: Any) -> bytes:
    return json.dumps(keys).encode()


def listed(path: Path | str, **options: Any) -> tuple[WebDatasetSource, list[Item]]:
    source = WebDatasetSource(WebDatasetOptions(path=str(path), **options))
    items = list(source.items())
    assert len({item.key for item in items}) == len(items)
    return source, items


def labels(items: list[Item]) -> list[tuple[str, ...]]:
    return [item.labels for item in items]


def test_shards_of_others_with_numbers_and_names(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        members = [(f"{i:04}.{name}", content) for i in range(count) for name, content in
                   (("cls", str(i % 2).encode()), ("jpg", JPG + bytes([i])))]  # fmt: skip
        shard(tmp_path / f"{split}-00000.tar", members)
    (tmp_path / "classnames.txt").write_text("apple\nbee\n")
    source, items = listed(tmp_path)
    assert [(item.split, item.labels[0], item.class_order) for item in items] == [
        ("test", "apple", 0), ("test", "bee", 1), *[("train", "apple", 0), ("train", "bee", 1)] * 2
    ]  # fmt: skip
    assert source.notes == [
        "2 classes in splits train/test, by .cls and classnames.txt; 6 images (.jpg) in 2 shards "
        "(source.label_member, source.label_key and source.image_member choose others)"
    ]
    assert [payload.content for payload in source.read(items[2:])] == [JPG + bytes([i]) for i in range(4)]
    one = json.loads(items[2].locator)
    assert (tmp_path / one["shard"]).read_bytes()[one["offset"] :][: one["size"]] == JPG + b"\0"


def test_patterns_name_shards(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"d/train-{i:05}.tar", [(f"k{i}.jpg", JPG), (f"k{i}.cls", b"a")])
    assert len(listed(f"{tmp_path}/d/train-{{00000..00001}}.tar")[1]) == 2
    assert len(listed(f"{tmp_path}/d/*-0000[12].tar")[1]) == 2
    assert len(listed(f"{tmp_path}/*/train-*.tar")[1]) == 3
    assert len(listed(tmp_path / "d/train-00002.tar")[1]) == 1
    with pytest.raises(UsageError, match=r"train-00003\.tar not found"):
        listed(f"{tmp_path}/d/train-{{00000..00003}}.tar")
    with pytest.raises(UsageError, match=r"contains no \.tar files"):
        listed(f"{tmp_path}/d/none-*.tar")


def test_labels_from_json_and_text(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        [
            ("x/1.jpg", JPG), ("x/1.json", post(label=3, caption="c", url="https://e.org/1", author="A")),
            ("x/1.txt", b"a caption"),
            ("y/1.jpg", JPG), ("y/1.json", post(class_name="bee", label=4)),
            ("y/2.png", JPG), ("y/2.json", post(tag_string_character="miku rin", rating="safe")),
            ("y/3.png", JPG), ("y/3.json", b"{" * 5000),
        ],
    )  # fmt: skip
    _, items = listed(path)
    assert labels(items) == [("3",), ("bee",), ("miku", "rin"), ()]
    assert (items[0].file_url, items[0].author, items[2].rating) == ("https://e.org/1", "A", "s")
    assert labels(listed(path, label_member="txt")[1])[0] == ("a caption",)
    assert labels(listed(path, label_key="caption")[1])[:2] == [("c",), ()]


def test_numbers_of_classes_come_before_names_of_files_and_species_before_ranks(tmp_path: Path) -> None:
    posts = [
        post(id=3, name="pic_3.jpg", class_id=0, class_text="zebra"),
        post(name="photo", category_id=1),
        post(name="pic_4.jpg"),
        post(**{"class": "Aves", "species": "crow"}),
    ]
    path = shard(tmp_path / "a.tar", [m for i, p in enumerate(posts) for m in ((f"{i}.jpg", JPG), (f"{i}.json", p))])
    assert labels(listed(path)[1]) == [("zebra",), ("1",), (), ("crow",)]


def test_the_members_of_a_sample_share_a_key_with_its_folders(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        [("d.x/1.jpg", JPG), ("d.x/1.cls", b"a"), ("e/1.seg.png", JPG), ("e/1.jpg", JPG), ("e/1.cls", b"b"),
         ("lone.cls", b"c"), ("e/1.cls", b"again")],
    )  # fmt: skip
    source, items = listed(path)
    assert [item.source_id for item in items] == ["a.tar/d.x/1.jpg", "a.tar/e/1.jpg"]
    assert labels(items) == [("a",), ("b",)]
    assert "1 sample has no image; 1 member skipped, whose name the shard has" in source.notes[-1]
    assert [item.source_id for item in listed(path, image_member="seg.png")[1]] == ["a.tar/e/1.seg.png"]


def test_several_images_in_a_sample_are_refused_with_the_choice(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("1.jpg", JPG), ("1.png", JPG), ("1.cls", b"a")])
    with pytest.raises(UsageError, match=r"several images \(jpg, png\): set source.image_member"):
        listed(path)
    assert [item.source_id for item in listed(path, image_member=".png")[1]] == ["a.tar/1.png"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.csv", "class_id,name,train\n0,apple,5\n1,bee,2\n"),
        ("classes.csv", "0,apple\n1,bee\n"),
        ("classes.csv", "idx;text\n0;apple\n1;bee\n"),
        ("classes.csv", "name\napple\nbee\n"),
        ("classes.txt", "apple\nbee\n"),
    ],
)
def test_files_of_class_names(tmp_path: Path, name: str, text: str) -> None:
    path = shard(tmp_path / "shards/a.tar", [("1.jpg", JPG), ("1.cls", b"1\n"), ("2.jpg", JPG), ("2.cls", b"9")])
    (tmp_path / name).write_text(text)
    _, items = listed(path)
    assert labels(items) == [("bee",), ()]
    assert [item.failure for item in items] == ["", "bad record"]
    assert labels(listed(path, classes=str(tmp_path / name))[1]) == labels(items)


def test_bad_files_of_class_names_are_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("1.jpg", JPG), ("1.cls", b"1")])
    (tmp_path / "classes.csv").write_text("class_id,name\nx,apple\n")
    with pytest.raises(UsageError, match="is no class id and name"):
        listed(path)
    (tmp_path / "classes.csv").write_text("class_id,name\n0,apple\n1,apple\n")
    with pytest.raises(UsageError, match="classes 0 and 1 have the same name 'apple'"):
        listed(path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(UsageError, match="has no list class_names"):
        listed(path)
    with pytest.raises(UsageError, match=r"source\.classes: .* cannot be read"):
        listed(path, classes=str(tmp_path / "no.csv"))


def test_numbers_from_one_do_not_get_the_names_of_the_next_class(tmp_path: Path) -> None:
    def members(*ids: int) -> list[tuple[str, bytes]]:
        return [each for n, i in enumerate(ids) for each in ((f"{n}.jpg", b"j"), (f"{n}.cls", b"%d" % i))]

    path = shard(tmp_path / "set/train.tar", members(1, 2, 3))
    names = tmp_path / "set/classnames.txt"
    names.write_text("apple\nbee\ncat\n")
    with pytest.raises(
        UsageError, match=r"count from 1, but classnames\.txt counts from 0, so .* name of the next one"
    ):
        listed(path.parent)
    assert labels(listed(path.parent, classes=str(names))[1]) == [("bee",), ("cat",), ()]
    shard(path, members(1, 3))  # also if a class has no image
    with pytest.raises(UsageError, match="count from 1"):
        listed(path.parent)
    # as soon as class 0 has an image, they count from 0 and one is wrong
    shard(path, members(0, 1, 2, 3))
    _, items = listed(path.parent)
    assert labels(items) == [("apple",), ("bee",), ("cat",), ()]
    assert items[-1].detail == "class 3 is not in classnames.txt"
    # a class without images is none of these mistakes
    shard(path, members(1, 2))
    assert labels(listed(path.parent)[1]) == [("bee",), ("cat",)]
    names.unlink()
    (path.parent / "classes.csv").write_text("class_id,name\n1,apple\n2,bee\n3,cat\n")
    shard(path, members(1, 2, 3))
    assert labels(listed(path.parent)[1]) == [("apple",), ("bee",), ("cat",)]
    shard(path, members(0, 1, 2))
    with pytest.raises(UsageError, match=r"count from 0, but classes\.csv counts from 1, so .* of the previous one"):
        listed(path.parent)
    # lists with the first class, and one number that has no name
    lists = (b"[1, 2]", b"[1, 3]", b"[0]")
    shard(
        path,
        [
            each
            for n, each_list in enumerate(lists)
            for each in ((f"{n}.jpg", b"j"), (f"{n}.json", post(label=json.loads(each_list))))
        ],
    )
    assert labels(listed(path.parent)[1]) == [("apple", "bee"), ("apple", "cat"), ()]


def test_ids_as_floats_are_ids(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        [
            ("1.jpg", JPG),
            ("1.json", b'{"label": 1.0}'),
            ("2.jpg", JPG),
            ("2.json", b'{"label": NaN}'),
            ("3.jpg", JPG),
            ("3.cls", b"1.0"),
            ("4.jpg", JPG),
            ("4.json", b'{"label": -1.0}'),
            ("5.jpg", JPG),
            ("5.cls", b"1.5"),
        ],
    )
    (tmp_path / "classnames.txt").write_text("apple\nbee\n")
    assert labels(listed(path)[1]) == [("bee",), (), ("bee",), (), ("1.5",)]


def test_a_dataset_of_ours_gives_names_splits_groups_and_provenance(small_dataset: Path) -> None:
    import animesion

    dataset = animesion.open_dataset(small_dataset)
    source, items = listed(small_dataset)
    assert len(items) == len(dataset)
    assert {name for item in items for name in item.labels} == {each.name for each in dataset.classes}
    by_key = {item.source_id.rpartition("/")[2].partition(".")[0]: item for item in items}
    payloads = dict(zip([item.key for item in items], source.read(items), strict=True))
    for split in ("train", "val", "test"):
        for sample in dataset.samples(split):
            item = by_key[sample.key]
            assert (item.labels, item.split, item.class_order) == ((sample.name,), split, sample.label)
            assert item.families[0] == f"group:{sample.meta['group']}"
            assert payloads[item.key].content == sample.image
    assert len(listed(small_dataset / "data")[1]) == len(items)
    alone = next(iter(sorted((small_dataset / "data").glob("*.tar"))))
    assert listed(alone)[1][0].labels[0] in {each.name for each in dataset.classes}


def test_a_shard_of_ours_without_its_dataset_has_names_too(small_dataset: Path, tmp_path: Path) -> None:
    alone = next(iter(sorted((small_dataset / "data").glob("*.tar"))))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/train.tar").write_bytes(alone.read_bytes())
    assert not listed(tmp_path / "x/train.tar")[1][0].labels[0].isdecimal()


def test_hostile_names_lose_only_their_samples(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        [("../1.jpg", JPG), ("/etc/2.jpg", JPG), ("3.jpg", JPG), ("3.cls", b"a\0\xff\x1b"), ("4.jpg", JPG * 50),
         ("4.cls", b"9" * 400)],
    )  # fmt: skip
    _, items = listed(path, max_bytes=100)
    assert {item.source_id: item.failure for item in items} == {
        "a.tar/../1.jpg": "unsafe path",
        "a.tar//etc/2.jpg": "unsafe path",
        "a.tar/3.jpg": "",
        "a.tar/4.jpg": "too many bytes",
    }
    assert all(label.isprintable() for item in items for label in item.labels)


def test_damaged_and_compressed_shards_are_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("1.jpg", JPG), ("1.cls", b"a")])
    whole = path.read_bytes()
    path.write_bytes(whole[:700] + b"garbage" * 100)
    with pytest.raises(UsageError, match="damaged"):
        listed(path)
    (tmp_path / "b.tar").write_bytes(b"no tar at all")
    with pytest.raises(UsageError, match=r"neither a folder nor a readable \.tar"):
        listed(tmp_path / "b.tar")
    path.write_bytes(whole)
    source, items = listed(path)
    path.write_bytes(whole[:515])
    assert [payload.reason for payload in source.read(items)] == ["fetch failed"]
    shard(tmp_path / "c.tar", [("1.cls", b"a")])
    with pytest.raises(UsageError, match=r"no sample in .* has an image"):
        listed(tmp_path / "c.tar")


def test_a_stamp_tells_whether_shards_or_names_have_changed(tmp_path: Path) -> None:
    first = shard(tmp_path / "set" / "train-0.tar", [("1.jpg", JPG), ("1.cls", b"0")])
    source = WebDatasetSource(WebDatasetOptions(path=str(tmp_path / "set")))
    seen = [source.stamp()]
    assert seen[0]
    assert source.stamp() == seen[0]

    def changed() -> bool:
        seen.append(source.stamp())
        return len(set(seen)) == len(seen)

    (tmp_path / "set" / "notes.md").write_text("no file of the set")
    assert not changed()
    del seen[1:]
    shard(tmp_path / "set" / "train-1.tar", [("2.jpg", JPG), ("2.cls", b"0")])
    assert changed()
    (tmp_path / "set" / "classnames.txt").write_text("apple\n")
    assert changed()
    (tmp_path / "classes.csv").write_text("class_id,name\n0,bee\n")  # one folder above
    assert changed()
    os.utime(first, ns=(1, 1))
    assert changed()
    given = WebDatasetSource(WebDatasetOptions(path=str(tmp_path / "set"), classes=str(tmp_path / "classes.csv")))
    before = given.stamp()
    assert before not in ("", *seen)
    (tmp_path / "classes.csv").write_text("class_id,name\n0,wasp\n")
    assert given.stamp() != before
    assert WebDatasetSource(WebDatasetOptions(path=str(tmp_path / "nowhere"))).stamp() == ""
