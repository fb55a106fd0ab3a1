"""Builds from Parquet files, WebDataset shards and indexed tars, on disk and in a bucket."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import animesion
from animesion.sources.indexed_tars import IndexedTarOptions, IndexedTarSource
from animesion.sources.parquet_images import ParquetOptions, ParquetSource
from animesion.sources.webdataset_shards import WebDatasetOptions, WebDatasetSource
from tests.conftest import draw_folders
from tests.integration import s3_server
from tests.integration.s3_server import BUCKET, Shelf

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

KINDS = ["parquet", "webdataset", "indexed-tar"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same drawn images as Parquet files, shards, and tars with an index; every fourth is a test image."""
    root = tmp_path_factory.mktemp("embedded")
    images = sorted(path for path in draw_folders(root / "folders").rglob("*") if path.is_file())
    names = sorted({path.parent.name for path in images})
    rows = ["id,label,split"]
    for name in ("parquet/data", "shards", "tars"):
        (root / name).mkdir(parents=True)
    for split, chosen in (("train", [path for i, path in enumerate(images) if i % 4]), ("test", images[::4])):
        write_parquet(root / f"parquet/data/{split}-00000-of-00001.parquet", chosen, names)
        write_shard(root / f"shards/{split}-00000.tar", chosen, names)
        write_indexed(root / "tars" / split, chosen)
        rows += [f"{split}{number},{path.parent.name},{split}" for number, path in enumerate(chosen)]
    (root / "shards/classnames.txt").write_text("\n".join(names))
    (root / "labels.csv").write_text("\n".join(rows))
    return root


def write_parquet(path: Path, chosen: list[Path], names: list[str]) -> None:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    images = [{"bytes": each.read_bytes(), "path": each.name} for each in chosen]
    table = pa.table({"image": images, "label": [names.index(each.parent.name) for each in chosen]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=5)


def write_shard(path: Path, chosen: list[Path], names: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, each in enumerate(chosen):
            (label := path.with_suffix(".cls")).write_text(str(names.index(each.parent.name)))
            archive.add(label, f"{number:05}.cls")
            archive.add(each, f"{number:05}{each.suffix}")
            label.unlink()


def write_indexed(path: Path, chosen: list[Path]) -> None:
    tar = path.with_suffix(".tar")
    with tarfile.open(tar, "w") as archive:
        for number, each in enumerate(chosen):
            archive.add(each, f"{path.name}{number}{each.suffix}")
    files = {}
    with tarfile.open(tar) as archive:
        for each, member in zip(chosen, archive, strict=True):
            digest = hashlib.sha256(each.read_bytes()).hexdigest()
            files[member.name] = {"offset": member.offset_data, "size": member.size, "sha256": digest}
    path.with_suffix(".json").write_text(json.dumps({"filesize": tar.stat().st_size, "files": files}))


@pytest.mark.parametrize("kind", KINDS)
def test_builds_keep_classes_splits_and_images(world: Path, tmp_path: Path, kind: str) -> None:
    settings = {
        "parquet": [f'source.path="{world}/parquet"'],
        "webdataset": [f'source.path="{world}/shards"'],
        "indexed-tar": [f'source.index="{world}/tars"', f'source.labels="{world}/labels.csv"'],
    }[kind]
    recipe = animesion.load_recipe("folder", [f'source.kind="{kind}"', *settings])
    animesion.build(recipe, tmp_path / "out", workers=1)
    dataset = animesion.open_dataset(tmp_path / "out")
    originals: dict[str, set[str]] = {}
    for path in (world / "folders").rglob("*.*"):
        originals.setdefault(path.parent.name, set()).add(hashlib.md5(path.read_bytes()).hexdigest())
    assert {each.name for each in dataset.classes} == set(originals)
    for split, count in (("train", 27), ("test", 10)):
        samples = list(dataset.samples(split))
        assert len(samples) == count
        assert all(sample.meta["md5"] in originals[sample.name] for sample in samples)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Iterator[Shelf]:
    with s3_server.serving(tmp_path_factory.mktemp("home")) as shelf:
        shelf.put("set/", world)
        yield shelf


@pytest.fixture
def bucket(served: Shelf, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of the world in the bucket."""
    for name, value in served.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/set"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_gives_the_same_items_and_bytes(world: Path, bucket: str, kind: str) -> None:
    def listed(place: Path | str) -> tuple[list[tuple[object, ...]], list[bytes], list[str]]:
        source: ParquetSource | WebDatasetSource | IndexedTarSource
        if kind == "parquet":
            source = ParquetSource(ParquetOptions(path=f"{place}/parquet"))
        elif kind == "webdataset":
            source = WebDatasetSource(WebDatasetOptions(path=f"{place}/shards"))
        else:
            source = IndexedTarSource(IndexedTarOptions(index=f"{place}/tars", labels=str(world / "labels.csv")))
        items = list(source.items())
        facts: list[tuple[object, ...]] = [(item.key, item.source_id, item.labels, item.split) for item in items]
        return facts, [payload.content for payload in source.read(items)], source.notes

    found = listed(bucket)
    assert found == listed(world)
    assert all(found[1])


@pytest.mark.parametrize("name", ["train-{00000..00000}", "train-*", "train-00000"])
def test_patterns_and_single_files_in_a_bucket(bucket: str, name: str) -> None:
    source = WebDatasetSource(WebDatasetOptions(path=f"{bucket}/shards/{name}.tar"))
    assert len(list(source.items())) == 27
    assert "by .cls and classnames.txt" in source.notes[0]
