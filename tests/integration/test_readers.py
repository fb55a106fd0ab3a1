"""The shards load unchanged with the libraries that people train with: same samples, same labels, nothing adapted."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import animesion
from tests.sharing import made_once

#: The libraries themselves leave files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

FACES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "holo-faces" / "faces-train-128.tar"


@dataclass(frozen=True)
class Stored:
    """A sample as the standard library's tarfile finds it."""

    image: bytes
    label: int
    described: dict[str, Any]
    caption: str

    @property
    def pixels(self) -> bytes:
        """What any decoder should see."""
        return pixels(Image.open(io.BytesIO(self.image)))


def pixels(image: Image.Image) -> bytes:
    assert image.mode == "RGB"
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def shard_paths(folder: Path, split: str) -> list[str]:
    return [str(path) for path in sorted(folder.glob(f"data/{split}-*.tar"))]


def stored(folder: Path, split: str) -> dict[str, Stored]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in shard_paths(folder, split):
        with tarfile.open(path) as shard:
            for member in shard:
                key, _, field = member.name.partition(".")
                samples.setdefault(key, {})[field] = shard.extractfile(member).read()
    return {
        key: Stored(fields["jpg"], int(fields["cls"]), json.loads(fields["json"]), fields["txt"].decode())
        for key, fields in samples.items()
    }


@pytest.fixture(scope="session")
def some_faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of sixty real faces."""
    if not FACES.is_file():
        pytest.skip("the shared faces are not here")

    def make(folder: Path) -> None:
        few = folder / "few.tar"
        with tarfile.open(FACES) as source, tarfile.open(few, "w") as target:
            for member in [member for member in source if member.isreg()][::150]:
                target.addfile(member, source.extractfile(member))
        settings = [f'source.path="{few}"', "pack.shard_samples=20", "pack.size=96", "pack.format=jpg"]
        animesion.build(animesion.load_recipe("folder", settings), folder / "faces", workers=2)

    return made_once(tmp_path_factory, "some-faces", make) / "faces"


@pytest.fixture(params=["small_dataset", "some_faces"])
def folder(request: pytest.FixtureRequest) -> Path:
    built: Path = request.getfixturevalue(request.param)
    return built


@pytest.fixture
def splits(folder: Path) -> dict[str, dict[str, Stored]]:
    found = {split: stored(folder, split) for split in ("train", "val", "test")}
    assert all(found.values())
    return found


def test_webdataset(folder: Path, splits: dict[str, dict[str, Stored]]) -> None:
    import webdataset

    for split, expected in splits.items():
        samples = list(webdataset.WebDataset(shard_paths(folder, split), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == list(expected)
        decoded = webdataset.WebDataset(shard_paths(folder, split), shardshuffle=False).decode("pil")
        for raw, sample in zip(samples, decoded, strict=True):
            truth = expected[raw["__key__"]]
            assert raw["jpg"] == truth.image
            assert sample["cls"] == sample["json"]["label"] == truth.label
            assert sample["json"] == truth.described
            assert sample["txt"] == truth.caption
            assert pixels(sample["jpg"]) == truth.pixels


def test_hugging_face(
    folder: Path, splits: dict[str, dict[str, Stored]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    with_card = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "card"))
    files = {split: shard_paths(folder, split) for split in splits}
    bare = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path / "bare"))
    names = [info.name for info in animesion.open_dataset(folder).classes]
    for loaded in (with_card, bare):
        assert set(loaded) == set(splits)
        for split, expected in splits.items():
            table = loaded[split]
            assert pixels(table[0]["jpg"]) == expected[table[0]["__key__"]].pixels
            rows = list(table.cast_column("jpg", datasets.Image(decode=False)))
            assert [row["__key__"] for row in rows] == list(expected)
            for row in rows:
                truth = expected[row["__key__"]]
                assert row["jpg"]["bytes"] == truth.image
                assert row["cls"] == truth.label
                assert row["json"] == truth.described
                assert row["txt"] == truth.caption
    features = with_card["train"].features
    assert features["cls"].names == names
    assert features["json"]["box"] == datasets.List(datasets.Value("int64"))


def test_hugging_face_streaming(folder: Path, splits: dict[str, dict[str, Stored]], tmp_path: Path) -> None:
    import datasets

    for split, expected in splits.items():
        rows = datasets.load_dataset(str(folder), split=split, streaming=True, cache_dir=str(tmp_path))
        assert {row["__key__"]: (row["cls"], pixels(row["jpg"])) for row in rows} == {
            key: (truth.label, truth.pixels) for key, truth in expected.items()
        }


def test_timm(folder: Path, splits: dict[str, dict[str, Stored]]) -> None:
    import timm.data

    for split, expected in splits.items():
        dataset = timm.data.create_dataset(f"wds/{folder.name}", root=str(folder), split=split, is_training=False)
        assert len(dataset) == len(expected)
        seen = Counter((pixels(image), label) for image, label in dataset)
        assert seen == Counter((truth.pixels, truth.label) for truth in expected.values())


@pytest.mark.parametrize("training", [True, False])
def test_open_clip(
    folder: Path, splits: dict[str, dict[str, Stored]], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip_train import data
    from open_clip_train.data import get_dataset_size, get_wds_dataset

    if "eof_value" in inspect.signature(data.tar_file_expander).parameters:
        # open_clip asks for webdataset <= 0.2.86: newer ones tell it the end of a shard, which it takes for a member
        monkeypatch.setattr(data, "tar_file_expander", functools.partial(data.tar_file_expander, eof_value=None))
    for split, expected in splits.items():
        urls = "::".join(shard_paths(folder, split))
        assert get_dataset_size(urls) == (len(expected), len(shard_paths(folder, split)))
        settings = SimpleNamespace(
            train_data=urls, val_data=urls, train_num_samples=None, val_num_samples=None, dataset_resampled=False,
            train_data_upsampling_factors=None, seed=0, batch_size=1, workers=0, world_size=1,
        )  # fmt: skip
        loader = get_wds_dataset(settings, pixels, is_train=training, tokenizer=lambda text: [text]).dataloader
        if training:
            assert loader.num_samples == len(expected)
        seen = Counter((images[0], texts[0]) for images, texts in loader)
        assert seen == Counter((truth.pixels, truth.caption) for truth in expected.values())


def test_index_places_the_bytes_that_tarfile_finds(folder: Path) -> None:
    index = {row["key"]: row for row in animesion.open_dataset(folder).index.to_pylist()}
    walked = 0
    for path in sorted(folder.glob("data/*.tar")):
        content = path.read_bytes()
        with tarfile.open(path) as shard:
            members = shard.getmembers()
        for member in members:
            key, _, field = member.name.partition(".")
            row = index[key]
            assert row["shard"] == f"data/{path.name}"
            assert row["sample_offset"] <= member.offset < row["sample_offset"] + row["sample_size"]
            if field == "jpg":
                walked += 1
                assert (row["offset"], row["size"]) == (member.offset_data, member.size)
                image = content[member.offset_data : member.offset_data + member.size]
                assert hashlib.sha256(image).hexdigest() == row["sha256"]
                sample = content[row["sample_offset"] : row["sample_offset"] + row["sample_size"]]
                with tarfile.open(fileobj=io.BytesIO(sample)) as alone:
                    assert {name.partition(".")[0] for name in alone.getnames()} == {key}
    assert walked == len(index)
