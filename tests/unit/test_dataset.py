from __future__ import annotations

import base64
import dataclasses
import io
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import animesion
from animesion.dataset import fiftyone_samples, shards
from animesion.dataset.dataset import ClassInfo, Dataset
from animesion.dataset.shards import sample_members
from animesion.errors import UsageError
from animesion.schemas import INDEX
from animesion.storage import parquet


@pytest.fixture
def folder(small_dataset: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy, ignore=shutil.ignore_patterns("raw", "features", "pack", ".receipts"))
    return copy


def refused(folder: Path) -> str:
    """The sentence with which opening the dataset, or reading it through, is refused."""
    with pytest.raises(UsageError) as caught:
        list(animesion.open_dataset(folder).samples())
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, *path: str | int, value: Any) -> None:
    """Change one value of dataset.json."""
    facts = json.loads((folder / "dataset.json").read_bytes())
    inner = facts
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    (folder / "dataset.json").write_text(json.dumps(facts))


def test_facts(small_dataset: Path) -> None:
    dataset = animesion.open_dataset(str(small_dataset))
    assert isinstance(dataset, Dataset)
    assert dataset.name == "folder"
    assert dataset.image_field == "jpg"
    assert dataset.fields == ("cls", "jpg", "json", "txt")
    assert [info.id for info in dataset.classes] == [0, 1, 2]
    assert {info.name: info.total for info in dataset.classes} == {
        "初音ミク": 14,
        "crème_brûlée": 12,
        "plain (blue) & co": 11,
    }
    assert all(isinstance(info, ClassInfo) and sum(info.counts.values()) == info.total for info in dataset.classes)
    assert list(dataset.splits) == ["train", "val", "test"]
    for split in dataset.splits.values():
        assert split.samples == sum(shard.samples for shard in split.shards)
        assert split.bytes == sum((small_dataset / shard.path).stat().st_size for shard in split.shards)
    assert len(dataset.splits["train"].shards) > 1
    assert len(dataset) == 37
    assert dataset.index.num_rows == 37
    assert dataset.curated.num_rows == dataset.seen == 37
    assert dataset.recipe.pack.shard_samples == 10


def test_samples_in_order_by_position_and_by_key_are_the_same(small_dataset: Path) -> None:
    dataset = animesion.open_dataset(small_dataset)
    streamed = list(dataset.samples())
    assert [sample.key for sample in streamed] == dataset.index["key"].to_pylist()
    assert [dataset[i] for i in range(len(dataset))] == streamed
    assert dataset[-1] == streamed[-1]
    for sample in streamed:
        assert dataset[sample.key] == sample
        assert sample.name == dataset.classes[sample.label].name == sample.meta["name"]
        assert sample.split == sample.meta["split"]
        with Image.open(io.BytesIO(sample.image)) as image:
            assert sample.decode().tobytes() == image.tobytes()
    by_split = {name: list(dataset.samples(name)) for name in dataset.splits}
    assert [sample for samples in by_split.values() for sample in samples] == streamed
    assert {name: len(samples) for name, samples in by_split.items()} == {
        name: split.samples for name, split in dataset.splits.items()
    }
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[7] == streamed[7]
    assert "37 samples of 3 classes" in repr(copy)


def test_unknown_positions_keys_and_splits(small_dataset: Path) -> None:
    dataset = animesion.open_dataset(small_dataset)
    for position in (37, -38):
        with pytest.raises(IndexError):
            dataset[position]
    with pytest.raises(KeyError):
        dataset["none"]
    wrong: Any
    for wrong in (1.0, slice(2), None):
        with pytest.raises(TypeError):
            dataset[wrong]
    with pytest.raises(UsageError, match="no split 'dev'; it has train, val, test"):
        dataset.samples("dev")
    assert dataset[np.int64(3)] == dataset[3]
    assert dataset[3].key in dataset
    assert "none" not in dataset
    assert 3 not in dataset


def test_a_sample_and_a_dataset_are_shown_briefly(small_dataset: Path) -> None:
    dataset = animesion.open_dataset(small_dataset)
    sample = next(each for each in dataset.samples() if each.name == "plain (blue) & co")
    assert repr(sample) == f"<Sample {sample.key}: 'plain (blue) & co' (1), train, {len(sample.image):,} bytes>"
    assert repr(dataset) == f"<Dataset folder: 37 samples of 3 classes in {small_dataset}>"
    html = dataset._repr_html_()
    assert "<td>plain (blue) &amp; co</td><td>11</td>" in html
    assert "<tr><td>train</td><td>28</td><td>3</td>" in html
    html = sample._repr_html_()
    assert f"<td>{sample.meta['source_id'].replace('&', '&amp;')}</td>" in html
    shown = Image.open(io.BytesIO(base64.b64decode(html.partition("base64,")[2].partition('"')[0])))
    assert shown.tobytes() == sample.decode().tobytes()


def test_hostile_text_is_escaped_in_a_notebook(small_dataset: Path) -> None:
    sample = animesion.open_dataset(small_dataset)[0]
    deep: Any = "<b>"
    for _ in range(5_000):
        deep = [deep]
    meta = {"<script>": '"><img src=x onerror=alert(1)>', "deep": deep, "page_url": "javascript:alert(1)", "none": None}
    hostile = dataclasses.replace(sample, name="<i>name</i>", image=b"no image", meta=meta)
    html = hostile._repr_html_()
    assert "does not decode" in html
    assert set(re.findall(r"</?([a-z]+)", html)) == {"div", "p", "table", "tbody", "tr", "td"}
    assert "href" not in html
    classes = {f"<{i}>": {"train": 1} for i in range(30)}
    dataset = animesion.open_dataset(small_dataset)
    dataset.classes = [ClassInfo(i, name, counts, 1) for i, (name, counts) in enumerate(classes.items())]
    assert "<td>20 more</td>" in dataset._repr_html_()
    assert "&lt;29&gt;" in dataset._repr_html_()


def test_tensors_for_a_loader(small_dataset: Path) -> None:
    torch = pytest.importorskip("torch")
    dataset = animesion.open_dataset(small_dataset)
    tensors = dataset.torch("val", 32)
    assert len(tensors) == dataset.splits["val"].samples == 3
    assert repr(tensors) == "<Tensors of folder, val: 3 samples, 32 px>"
    images, labels = next(iter(torch.utils.data.DataLoader(tensors, batch_size=3)))
    assert (images.shape, images.dtype, labels.dtype) == ((3, 3, 32, 32), torch.float32, torch.int64)
    for sample, image, label in zip(dataset.samples("val"), images, labels, strict=True):
        assert label == sample.label
        small = sample.decode()
        width, height = small.size
        small = small.resize((32, (2 * height * 32 + width) // (2 * width)), Image.Resampling.LANCZOS, reducing_gap=3.0)
        top = (small.height - 32) // 2
        expected = np.asarray(small.crop((0, top, 32, top + 32)), np.float32) / 255
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    again = pickle.loads(pickle.dumps(tensors))
    assert torch.equal(again[2][0], images[2])
    assert tensors[-1][1] == labels[2]
    with pytest.raises(IndexError):
        tensors[3]
    sizes = dataset.torch("test", transform=lambda image: image.size)
    assert [sizes[i][0] for i in range(len(sizes))] == [each.decode().size for each in dataset.samples("test")]
    assert len(dataset.torch(None)) == 37
    with pytest.raises(UsageError, match="no split 'dev'"):
        dataset.torch("dev")
    with pytest.raises(UsageError, match="size 0"):
        dataset.torch("val", 0)


def test_hugging_face_rows_are_the_samples(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(small_dataset.parent)
    dataset = animesion.open_dataset(small_dataset.name)  # a relative path, which the Hub could have too
    rows = dataset.to_hf("val")
    assert rows.features["cls"].names == [info.name for info in dataset.classes]
    assert [(row["__key__"], row["cls"]) for row in rows] == [(s.key, s.label) for s in dataset.samples("val")]
    assert set(dataset.to_hf(streaming=True)) == {"train", "val", "test"}
    with pytest.raises(UsageError, match="no split 'dev'"):
        dataset.to_hf("dev")


def test_fiftyone_samples_show_the_files(small_dataset: Path, tmp_path: Path) -> None:
    """Without FiftyOne's database, which needs MongoDB."""
    fiftyone = pytest.importorskip("fiftyone")
    dataset = animesion.open_dataset(small_dataset)
    made = list(fiftyone_samples.samples(dataset, "val", tmp_path / "images"))
    for sample, shown in zip(dataset.samples("val"), made, strict=True):
        assert isinstance(shown, fiftyone.Sample)
        assert Path(shown.filepath).read_bytes() == sample.image
        assert (shown.ground_truth.label, shown.tags, shown["key"]) == (sample.name, ["val"], sample.key)
        assert shown["source"] == "folder"


def test_what_is_not_installed_is_named(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from animesion.dataset import dataset as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    dataset = animesion.open_dataset(small_dataset)
    with pytest.raises(UsageError, match=r"animesion\[train\]"):
        dataset.torch("val")
    with pytest.raises(UsageError, match="pip install datasets"):
        dataset.to_hf()
    with pytest.raises(UsageError, match="pip install fiftyone"):
        dataset.to_fiftyone("images")


def test_verify_and_publish_are_functions(small_dataset: Path, tmp_path: Path) -> None:
    dataset = animesion.open_dataset(small_dataset)
    assert animesion.verify(small_dataset, workers=1, decode=False).clean
    to = f"file://{tmp_path / 'out'}"
    planned = animesion.publish(dataset, to, dry_run=True, workers=1)
    assert not (tmp_path / "out").exists()
    done = animesion.publish(str(small_dataset), to, workers=1)
    assert [file.name for file in done.sent] == [file.name for file in planned.sent]
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (small_dataset / "SHA256SUMS").read_bytes()
    with pytest.raises(UsageError, match="there is no check 'leak'; did you mean 'leaks'"):
        animesion.publish(dataset, to, force=["leak"])


def test_no_dataset(tmp_path: Path) -> None:
    assert "is not a built dataset" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"name": NaN}'])
def test_damaged_facts(folder: Path, content: bytes) -> None:
    (folder / "dataset.json").write_bytes(content)
    assert "dataset.json is damaged" in refused(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("splits", "train", "shards", 0, "path"), "../outside.tar"),
        (("splits", "train", "shards", 0, "path"), "data/../../outside.tar"),
        (("splits", "train", "shards", 0, "path"), "/etc/passwd"),
        (("splits", "train", "shards", 0, "path"), "data/train-00000.tar\n"),
        (("splits", "train", "shards", 0, "path"), "data/val-00000.tar"),
        (("splits", "train", "shards", 0, "samples"), -1),
        (("splits", "train", "shards", 0, "samples"), "10"),
        (("splits", "train", "shards"), {}),
        (("splits", "../x"), {"samples": 0, "bytes": 0, "shards": []}),
        (("class_names"), ["a"]),
        (("class_names",), ["a", "a", "b"]),
        (("class_counts",), [{}, {}]),
        (("image_field",), "exe"),
        (("images",), True),
        (("name",), "../../etc"),
    ],
)
def test_hostile_facts(folder: Path, path: tuple[str | int, ...], value: Any) -> None:
    rewrite(folder, *((path,) if isinstance(path, str) else path), value=value)
    assert "dataset.json is damaged" in refused(folder)


def test_a_later_format_is_named(folder: Path) -> None:
    rewrite(folder, "format", value=2)
    assert "has format 2, but this version reads format 1" in refused(folder)


@pytest.mark.parametrize("name", ["index.parquet", "data/val-00000.tar"])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert "no such file" in refused(folder)
    assert name in refused(folder)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_damaged_index(folder: Path, content: bytes) -> None:
    (folder / "index.parquet").write_bytes(content)
    assert "index.parquet" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shard": "../outside.tar"},
        {"offset": -1},
        {"sample_offset": 10**9},
        {"offset": 2**63 - 1, "size": 1},
        {"size": None},
    ],
)
def test_index_that_points_outside(folder: Path, change: dict[str, Any]) -> None:
    rows = animesion.open_dataset(folder).index.to_pylist()
    rows[3] |= change
    parquet.write(folder / "index.parquet", parquet.table(rows, INDEX))
    assert "index.parquet" in refused(folder)


def test_shard_that_does_not_match_the_index(folder: Path) -> None:
    rows = animesion.open_dataset(folder).index.to_pylist()
    content = bytearray((folder / rows[0]["shard"]).read_bytes())
    content[rows[0]["sample_offset"] + 1] ^= 1
    (folder / rows[0]["shard"]).write_bytes(content)
    assert "`animesion verify" in refused(folder)
    dataset = animesion.open_dataset(folder)
    with pytest.raises(UsageError, match=r"does not match index\.parquet"):
        dataset[0]
    assert dataset[1].key == rows[1]["key"]


def test_image_that_does_not_decode(folder: Path) -> None:
    row = animesion.open_dataset(folder).index.to_pylist()[0]
    content = bytearray((folder / row["shard"]).read_bytes())
    content[row["offset"] : row["offset"] + row["size"]] = bytes(row["size"])
    (folder / row["shard"]).write_bytes(content)
    with pytest.raises(UsageError, match="does not decode"):
        animesion.open_dataset(folder)[0].decode()


@given(st.dictionaries(st.sampled_from(["cls", "jpg", "json", "txt"]), st.binary(max_size=1500), min_size=1))
def test_members_of_a_sample_are_read_back(fields: dict[str, bytes]) -> None:
    block = shards.sample("key-1", fields)
    assert sample_members("key-1", block) == fields
    with pytest.raises(ValueError, match="not a member of key-2"):
        sample_members("key-2", block)


@given(st.binary(max_size=2000))
def test_noise_is_no_sample(block: bytes) -> None:
    if block:
        with pytest.raises(ValueError):  # noqa: PT011
            sample_members("key", block)


def test_a_frame_joins_samples_and_provenance(small_dataset: Path) -> None:
    dataset = animesion.open_dataset(small_dataset)
    frame = dataset.frame()
    assert list(frame["key"]) == dataset.index["key"].to_pylist()
    assert frame.notna().all().all()
    first = dataset[0]
    assert (frame["name"][0], frame["label"][0], frame["split"][0]) == (first.name, first.label, first.split)
    assert list(frame["box"][0]) == first.meta["box"]
    assert set(dataset.frame("val")["split"]) == {"val"}
    with pytest.raises(UsageError, match="has no split 'dev'"):
        dataset.frame("dev")


def test_a_frame_without_pandas_names_the_extra(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("animesion.dataset.dataset.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'animesion\[pandas\]'"):
        animesion.open_dataset(small_dataset).frame()
