"""The `parquet` source: Hugging Face datasets with embedded images, and hostile files."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import animesion
from animesion.errors import AnimesionError, UsageError
from animesion.schemas import Item
from animesion.sources import clean_text
from animesion.sources.file_sets import expand_braces, split_of
from animesion.sources.parquet_images import ParquetOptions, ParquetSource

NAMES = ["apple", "bee", "cat"]


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (seed * 37 % 256, seed % 256, 9)).save(out, "PNG")
    return out.getvalue()


def huggingface(**features: Any) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


CLASS_LABEL = {"names": NAMES, "_type": "ClassLabel"}


def write(
    path: Path,
    labels: Sequence[Any],
    *,
    metadata: dict[bytes, bytes] | None = None,
    group: int = 3,
    images: Sequence[Any] | None = None,
    **columns: Any,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images or [{"bytes": png(i), "path": f"img_{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels, **columns})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=group)


def listed(path: Path | str, **options: Any) -> tuple[ParquetSource, list[Item]]:
    source = ParquetSource(ParquetOptions(path=str(path), **options))
    items = list(source.items())
    assert len({item.key for item in items}) == len(items)
    return source, items


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    metadata = huggingface(image={"_type": "Image"}, label=CLASS_LABEL)
    write(tmp_path / "data/train-00000-of-00002.parquet", [0, 1, 2, 0, 1], metadata=metadata)
    write(tmp_path / "data/train-00001-of-00002.parquet", [2, 1], metadata=metadata)
    write(tmp_path / "data/validation-00000-of-00001.parquet", [0], metadata=metadata)
    write(tmp_path / "data/test-00000-of-00001.parquet", [-1, -1], metadata=metadata)
    return tmp_path


def test_a_dataset_of_the_hub_keeps_names_splits_and_bytes(hub: Path) -> None:
    source, items = listed(hub)
    assert [item.split for item in items] == ["test"] * 2 + ["train"] * 7 + ["val"]
    assert [item.labels for item in items[:4]] == [(), (), ("apple",), ("bee",)]
    assert {item.labels[0]: item.class_order for item in items if item.labels} == {"apple": 0, "bee": 1, "cat": 2}
    assert source.notes == [
        "3 classes (ClassLabel) in splits train/val/test, image column image, label column label; 4 files, 10 rows; "
        "2 rows have no label (source.image_column and source.label_column choose others)"
    ]
    train = [item for item in items if item.source_id.startswith("data/train-00000")]
    assert [payload.content for payload in source.read(train)] == [png(i) for i in range(5)]
    assert [payload.content for payload in source.read(train[::-1])] == [png(i) for i in range(5)][::-1]
    assert [payload.content for payload in source.read(train[3:4])] == [png(3)]
    assert json.loads(train[4].locator) | {"stamp": ""} == {
        "file": "data/train-00000-of-00002.parquet", "group": 1, "row": 1, "column": "image", "stamp": ""
    }  # fmt: skip


def test_files_written_by_datasets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES)})
    rows = {"img": [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(6)], "kind": [i % 3 for i in range(6)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    source, items = listed(tmp_path / "train.parquet")
    assert [item.labels[0] for item in items] == NAMES * 2
    assert all(payload.content.startswith(b"\x89PNG") for payload in source.read(items))


def test_one_file_a_pattern_and_a_range_of_files(hub: Path) -> None:
    assert len(listed(hub / "data/train-00001-of-00002.parquet")[1]) == 2
    assert len(listed(hub / "data/train-*.parquet")[1]) == 7
    assert len(listed(f"{hub}/data/train-{{00000..00001}}-of-00002.parquet")[1]) == 7
    with pytest.raises(UsageError, match=r"train-00002-of-00002\.parquet not found"):
        listed(f"{hub}/data/train-{{00000..00002}}-of-00002.parquet")


def test_a_column_of_splits(tmp_path: Path) -> None:
    splits = ["train", "test", "validation", "train"]
    write(tmp_path / "a.parquet", ["x", "y", "x", "y"], split=splits)
    source, items = listed(tmp_path)
    assert [item.split for item in items] == ["train", "test", "val", "train"]
    assert "2 classes in splits train/val/test" in source.notes[0]
    write(tmp_path / "a.parquet", ["x", "y", "x", "y"], split=["train", "eval", "train", ""])
    with pytest.raises(UsageError, match=r"the column 'split' of .* has the split 'eval'"):
        listed(tmp_path)
    write(tmp_path / "a.parquet", ["x", "y", "x", "y"], split=["p", "q", "p", ""])
    assert {item.split for item in listed(tmp_path)[1]} == {""}
    write(tmp_path / "a.parquet", ["x", "y", "x", "y"], common_name=["crow", "cat", "gull", "dog"])
    with pytest.raises(UsageError, match="several columns of labels"):
        listed(tmp_path)


def test_names_come_from_the_readme_of_the_dataset(tmp_path: Path) -> None:
    write(tmp_path / "data/train.parquet", [2, 0])
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': apple\n          '1': bee\n          '2': cat\n---\n# A\n"
    )
    for path in (tmp_path, tmp_path / "data"):
        assert [item.labels for item in listed(path)[1]] == [("cat",), ("apple",)]
    (tmp_path / "README.md").write_text("---\n[1, {\n---\n")
    assert [item.labels for item in listed(tmp_path)[1]] == [("2",), ("0",)]


def test_texts_lists_and_nulls_as_labels(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["miku  hatsune", None, ""])
    assert [item.labels for item in listed(tmp_path)[1]] == [("miku hatsune",), (), ()]
    write(tmp_path / "a.parquet", [["x", "y"], ["x"], []])
    assert [item.labels for item in listed(tmp_path)[1]] == [("x", "y"), ("x",), ()]


def test_ids_that_pandas_wrote_as_floats_are_ids(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [0.0, 2.0, float("nan"), None, -1.0])
    source, items = listed(tmp_path)
    assert [(item.labels, item.class_order) for item in items] == [
        (("0",), 0),
        (("2",), 2),
        ((), -1),
        ((), -1),
        ((), -1),
    ]
    assert "3 rows have no label" in source.notes[0]
    write(tmp_path / "a.parquet", [1.0, 2.0], metadata=huggingface(label=CLASS_LABEL))
    assert [item.labels for item in listed(tmp_path)[1]] == [("bee",), ("cat",)]
    # the first 1,000 values decide
    write(tmp_path / "a.parquet", [0.0] * 1000 + [0.5, float("inf"), 1e300])
    assert [item.detail for item in listed(tmp_path)[1][-4:]] == [
        "",
        "label 0.5 is no class id",
        "label inf is no class id",
        "label 1e+300 is no class id",
    ]
    write(tmp_path / "a.parquet", [Decimal("-1.00"), Decimal("1.00"), Decimal("0.00")])
    assert [item.labels for item in listed(tmp_path)[1]] == [(), ("1",), ("0",)]


def test_scores_are_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [0.1, 0.9])
    with pytest.raises(UsageError, match="no column of labels; columns that can be are none"):
        listed(tmp_path)
    for scores in ([0.1, 0.9], [[0.0, 1.0], [1.0, 0.0]], [1.0, 2.0]):
        write(tmp_path / "a.parquet", scores, class_name=["a", "b"])
        assert [item.labels for item in listed(tmp_path)[1]] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["a/train-00000-of-00001.parquet", "b/train-00000-of-00002.parquet"], "a and b"),
        (["a/train/0000.parquet", "b/train/0000.parquet", "a/test/0000.parquet"], "a/\\w+ and b/train"),
        (["data/coarse/train-0.parquet", "data/fine/train-0.parquet"], "data/coarse and data/fine"),
        (["train-0.parquet", "more/train-0.parquet"], r"\. and more"),
        (["train_small/0000.parquet", "train_full/0000.parquet"], "train_full and train_small"),
        (["a/train-0-a09b74b3ef9c3b56.parquet", "b/train-0-b21cdcbd44a80c6c.parquet"], "a and b"),
    ],
)
def test_configurations_are_not_mixed(tmp_path: Path, names: list[str], folders: str) -> None:
    for name in names:
        write(tmp_path / name, [0, 1])
    with pytest.raises(UsageError, match=rf"the same name in 2 folders, such as {folders}: if these are") as refused:
        listed(tmp_path)
    assert len(listed(str(refused.value).rpartition(" ")[2].strip("'"))[1]) == 2 * len(names)


def test_splits_and_partitions_in_folders_are_one_dataset(tmp_path: Path) -> None:
    for name in ("train/0000.parquet", "test/0000.parquet", "train/0001.parquet", "data/val-0.parquet"):
        write(tmp_path / "splits" / name, [0, 1])
    assert [item.split for item in listed(tmp_path / "splits")[1]] == ["val"] * 2 + ["test"] * 2 + ["train"] * 4
    for part in ("year=2020", "year=2021", "year=2021/000", "year=2021/001"):
        write(tmp_path / f"parts/{part}/part-0.parquet", [0, 1])
    assert len(listed(tmp_path / "parts")[1]) == 8


def test_several_columns_are_refused_with_the_choice(tmp_path: Path) -> None:
    metadata = huggingface(image={"_type": "Image"}, label=CLASS_LABEL, coarse=CLASS_LABEL)
    write(tmp_path / "a.parquet", [0, 1], metadata=metadata, coarse=[1, 2])
    with pytest.raises(UsageError, match=r"several columns of labels \(label, coarse\): set source.label_column"):
        listed(tmp_path)
    assert [item.labels for item in listed(tmp_path, label_column="coarse")[1]] == [("bee",), ("cat",)]
    write(tmp_path / "a.parquet", [0, 1], mask=[{"bytes": b"m", "path": None}] * 2)
    with pytest.raises(UsageError, match=r"several columns of images \(image, mask\): set source.image_column"):
        listed(tmp_path)
    source, items = listed(tmp_path, image_column="mask")
    assert [payload.content for payload in source.read(items)] == [b"m", b"m"]
    with pytest.raises(UsageError, match="columns of images are image, mask"):
        listed(tmp_path, image_column="label")
    with pytest.raises(UsageError, match="columns that can be are label"):
        listed(tmp_path, image_column="image", label_column="no")


def test_tables_without_images_or_labels_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["https://x"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"no column of embedded images.*source\.kind=urls"):
        listed(tmp_path)
    pq.write_table(pa.table({"image": [b"x"], "height": [1.5]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no column of labels"):
        listed(tmp_path)


def test_rows_without_bytes_are_missing_files_and_large_ones_are_dropped(tmp_path: Path) -> None:
    images = [
        {"bytes": None, "path": "../../etc/passwd"},
        {"bytes": b"x" * 100, "path": None},
        {"bytes": b"", "path": ""},
    ]
    write(tmp_path / "a.parquet", ["a", "b", "c"], images=images)
    source, items = listed(tmp_path, max_bytes=99)
    assert [payload.reason for payload in source.read(items)] == ["missing file", "too many bytes", ""]


def test_binary_columns_and_labels_out_of_range(tmp_path: Path) -> None:
    metadata = huggingface(label=CLASS_LABEL)
    write(tmp_path / "a.parquet", [0, 7], metadata=metadata, images=[b"one", b"two"])
    source, items = listed(tmp_path)
    assert [item.failure for item in items] == ["", "bad record"]
    assert "1 row has a label that is none of the class names, such as label 7 of 3 classes" in source.notes
    assert [payload.content for payload in source.read(items)] == [b"one", b"two"]


def test_copies_by_their_paths_are_one_family(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": name} for name in ("leaf.png", "leaf_rot90.png", "other.png")]
    write(tmp_path / "a.parquet", ["a"] * 3, images=images)
    families = [item.families for item in listed(tmp_path)[1]]
    assert families[0] == families[1] != families[2]


def test_many_row_groups_are_listed_with_one_footer(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["a"] * 3000, group=1, images=[{"bytes": b"x", "path": f"{i}"} for i in range(3000)])
    source, items = listed(tmp_path)
    assert json.loads(items[2999].locator)["group"] == 2999
    assert len(list(source.read(items[1000:1500]))) == 500


def test_other_class_names_in_a_later_file_are_refused(hub: Path) -> None:
    other = huggingface(label={"names": ["x", "y", "z"], "_type": "ClassLabel"})
    write(hub / "data/zz.parquet", [0], metadata=other)
    with pytest.raises(UsageError, match="other class names"):
        listed(hub)
    twice = huggingface(label={"names": ["x", "x"], "_type": "ClassLabel"})
    write(hub / "one.parquet", [0], metadata=twice)
    with pytest.raises(UsageError, match="two classes"):
        listed(hub / "one.parquet")


# -- hostile files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no Parquet file"),
        (b"PAR1PAR1", "is no Parquet file"),
        (b"PAR1" + b"x" * 50 + struct.pack("<I", 0xFFFFFFFF) + b"PAR1", "is no Parquet file, or was cut short"),
        (b"PAR1" + b"\x15\x04\x19" * 40 + struct.pack("<I", 120) + b"PAR1", "cannot be read as Parquet"),
        # a list of 2^31 - 1 columns
        (
            b"PAR1" + b"\x15\x04\x19\xfc\xff\xff\xff\xff\x07" + struct.pack("<I", 9) + b"PAR1",
            "cannot be read as Parquet",
        ),
        (b"PAR1" + b"x" * 50 + struct.pack("<I", 8) + b"PARE", "is encrypted"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        listed(tmp_path)
    assert "\n" not in str(caught.value)


def test_huge_footers_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.parquet").open("wb") as file:
        file.truncate(300 << 20)  # sparse
        file.seek(0, 2)
        file.write(struct.pack("<I", 200 << 20) + b"PAR1")
    with pytest.raises(UsageError, match="footer of 209,715,200 bytes"):
        listed(tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_damage_anywhere_is_a_sentence_or_a_counted_drop(tmp_path: Path, seed: int) -> None:
    import random

    write(tmp_path / "a.parquet", ["a", "b"] * 10, metadata=huggingface(image={"_type": "Image"}))
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    rng = random.Random(seed)
    for _ in range(8):
        content[rng.randrange(4, len(content) - 8)] = rng.randrange(256)
    (tmp_path / "a.parquet").write_bytes(content)
    message, answers = "", 20
    try:
        source, items = listed(tmp_path)
        answers = len(list(source.read(items)))
    except UsageError as error:
        message = str(error)
    assert answers == 20
    assert "\n" not in message


def test_labels_that_unpack_to_gigabytes_are_not_read(tmp_path: Path) -> None:
    text = pa.array(["a" * 3_000_000] * 100)
    images = pa.array([{"bytes": b"x", "path": "x"}] * 100)
    table = pa.table({"image": images, "label": text})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    with pytest.raises(UsageError, match="too many for labels"):
        listed(tmp_path)


def test_a_file_that_changes_after_the_listing(hub: Path) -> None:
    source, items = listed(hub / "data/train-00000-of-00002.parquet")
    write(hub / "data/train-00000-of-00002.parquet", [0])
    assert {payload.reason for payload in source.read(items[1:])} == {"missing file", "fetch failed"}
    (hub / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match="not found"):
        list(source.read(items))


# -- names and places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/validation-00000-of-00001-abc.parquet", "val"),
        ("default/partial-test/0000.parquet", "test"),
        ("valid/a.tar", "val"),
        ("train_test.parquet", ""),
        ("trainer/a.parquet", ""),
        ("extra-00000.parquet", ""),
    ],
)
def test_splits_by_names(name: str, split: str) -> None:
    assert split_of(name) == split


def test_braces() -> None:
    assert expand_braces("{train,val}-{08..10}.tar", "source.path")[2:4] == ["train-10.tar", "val-08.tar"]
    assert expand_braces("plain.tar", "source.path") == ["plain.tar"]
    for pattern in ("{0..999999999}", "{9..1}", "{0..999}{0..999}"):
        with pytest.raises(UsageError, match="names more than 100,000 files"):
            expand_braces(pattern, "source.path")


def test_addresses_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    from animesion.storage import stores

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert stores.connect("hf://datasets/a/b/data", stores.READABLE)[1] == "datasets/a/b/data"
    revision = "hf://datasets/a/b@refs%2Fconvert%2Fparquet/default"
    assert stores.connect(revision, stores.READABLE)[1] == revision.removeprefix("hf://")
    for url in ("hf://a/b", "hf://datasets/a", "hf://spaces/a/b"):
        with pytest.raises(UsageError, match="give hf://datasets/owner/name"):
            stores.connect(url, stores.READABLE)
    for url in ("hf://token@datasets/a/b", "hf://datasets/a/b?token=x"):
        with pytest.raises(UsageError, match="keys and options are not part of an address"):
            stores.refuse_secrets(url)
    with pytest.raises(UsageError, match="is not a supported store"):
        stores.connect("hf://datasets/a/b")
    with pytest.raises(AnimesionError, match="cannot be reached"):
        listed("hf://datasets/a/b/data")


def test_names_with_controls_are_cleaned(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": "a\0b/../\x1b[31mc.png"}]
    write(tmp_path / "a.parquet", ["k\x07\n"], images=images)
    [item] = listed(tmp_path)[1]
    assert item.labels == (clean_text("k\x07\n"),)
    assert item.key.isascii()


def test_a_stamp_tells_whether_files_or_their_description_have_changed(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.parquet", ["a", "b"])
    source = ParquetSource(ParquetOptions(path=str(tmp_path / "set" / "*.parquet")))
    seen = [source.stamp()]
    assert seen[0]
    assert source.stamp() == seen[0]
    write(tmp_path / "set" / "test.parquet", ["a"])
    seen.append(source.stamp())
    (tmp_path / "set" / "README.md").write_text("---\ndataset_info: {}\n---\n")
    seen.append(source.stamp())
    write(tmp_path / "set" / "train.parquet", ["b", "a"])  # of the same size, so its time tells
    os.utime(tmp_path / "set" / "train.parquet", ns=(1, 1))
    seen.append(source.stamp())
    assert len(set(seen)) == 4
    assert ParquetSource(ParquetOptions(path=str(tmp_path / "nowhere"))).stamp() == ""


def test_an_unchanged_source_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set" / "train.parquet", ["a", "b"])
    recipe = animesion.load_recipe("folder", ["source.kind=parquet", f"source.path={tmp_path / 'set'}", "name=rows"])
    calls: list[ParquetSource] = []
    items = ParquetSource.items

    def counted(source: ParquetSource) -> Iterator[Item]:
        calls.append(source)
        return items(source)

    monkeypatch.setattr(ParquetSource, "items", counted)
    for listed_times, rows in ((1, 2), (1, 2), (2, 3)):
        if rows == 3:
            write(tmp_path / "set" / "test.parquet", ["a"])
        assert animesion.build(recipe, tmp_path / "out", workers=1, until="fetch").seen == rows
        assert len(calls) == listed_times
