"""Labelled images, whatever lies on disk: built datasets, class folders, label CSVs.

`open_data` tells which it is. Every kind becomes the arrays of `samples` and an explicit class map: from
`dataset.json`, from the folder names of all splits, or from the class name file, never from the labels that happen to
occur in a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import animesion
from animesion.dataset import class_folders, label_files
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion_training.data.files import Files, LocalFiles
from animesion_training.data.samples import DataSplits, Samples
from animesion_training.data.seeds import IntArray


def open_data(
    path: Path | str,
    *,
    images: Path | str | None = None,
    classes: Sequence[str] | None = None,
    cache: Path | str | None = None,
    cache_bytes: int = 20 * 2**30,
) -> DataSplits:
    """Open labelled images of any kind.

    Args:
        path: the folder or fsspec URL of a built dataset; a folder of class folders, or of `train`, `val`, `test` with
            class folders in them; a label CSV (`class_id,path`), or a folder of `train.csv`, `val.csv`, `test.csv`.
            A `classid_classname.csv` beside label CSVs names the classes.
        images: the folder that a label CSV's paths start from; its own folder by default.
        classes: the class map to use for class folders, names by id, such as that of a checkpoint.
        cache: where shards of a URL are kept; by default under the user's cache folder.
        cache_bytes: most bytes kept there.

    Raises:
        UsageError: nothing of the kind is there, or it is damaged.
    """
    if "://" in str(path):
        from animesion_training.data.remote import open_remote

        dataset, source = open_remote(str(path), cache, cache_bytes)
        return _built(str(path), dataset, source)
    folder = Path(path)
    if folder.suffix == ".csv" and folder.is_file():
        return _labelled(folder, {folder.stem: folder}, Path(images or folder.parent))
    if (folder / "dataset.json").is_file():
        return _built(str(folder), animesion.open_dataset(folder), None)
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder or label CSV {folder}; give a built dataset, class folders or a label CSV"
        )
    if labels := label_files.find_label_files(folder).labels:
        return _labelled(folder, labels, Path(images or folder))
    return _folders(folder, classes)


# -- built datasets --------------------------------------------------------------------------------------------------


def _built(path: str, dataset: Dataset, source: Files | None) -> DataSplits:
    table = dataset.index
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    files = source or LocalFiles(dataset.path, [shard.path for shard in shards], [shard.bytes for shard in shards])
    names = tuple(entry.name for entry in dataset.classes)
    splits = {}
    for split in dataset.splits:
        rows = table.filter(pc.equal(table["split"], split)).combine_chunks()
        numbers = pc.index_in(rows["shard"], value_set=pa.array([shard.path for shard in shards], pa.string()))
        labels, places, offsets, sizes = (
            np.array(column.to_numpy(), dtype=np.int64)
            for column in (rows["label"], numbers, rows["offset"], rows["size"])
        )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
            raise UsageError(f"{path} has labels outside its {len(names)} classes: rebuild the dataset")
        digests, keys = _digests(rows["sha256"], path), rows["key"].to_pylist()
        splits[split] = Samples(split, labels, places, offsets, sizes, keys, files, digests, source is not None)
    return DataSplits(path, names, splits)


def _digests(column: pa.ChunkedArray, path: str) -> npt.NDArray[np.uint8]:
    try:
        digests = np.frombuffer(bytes.fromhex("".join(column.to_pylist())), dtype=np.uint8)
        return digests.reshape(len(column), hashlib.sha256().digest_size)
    except (TypeError, ValueError):
        raise UsageError(f"{path}/index.parquet is damaged (column sha256): rebuild the dataset") from None


# -- class folders and label files -----------------------------------------------------------------------------------


def _folders(root: Path, classes: Sequence[str] | None) -> DataSplits:
    found = class_folders.read(root)
    there = sorted({name for folders in found.values() for name in folders.images})
    if not there:
        raise UsageError(f"{root} holds no class folders, label CSVs or dataset.json; give a folder that does")
    names = tuple(classes) if classes is not None else tuple(there)
    if unknown := sorted(set(there) - set(names)):
        raise UsageError(f"{root} has the folder {unknown[0]!r}, which is none of the {len(names)} classes given")
    ids = {name: i for i, name in enumerate(names)}
    splits = {}
    for split, folders in found.items():
        paths = [f"{name}/{path}" for name, images in folders.images.items() for path in images]
        labels = [ids[name] for name, images in folders.images.items() for _ in images]
        splits[split] = _loose(split, folders.root, paths, np.array(labels, dtype=np.int64))
    if not any(len(samples) for samples in splits.values()):
        raise UsageError(f"{root} has folders but no images in them; an image ends in .jpg, .png, .webp or the like")
    return DataSplits(str(root), names, splits)


def _labelled(path: Path, files: Mapping[str, Path], root: Path) -> DataSplits:
    """Splits from label CSVs; the class map is that of every label file in the folder, used or not."""
    beside = label_files.find_label_files(path if path.is_dir() else path.parent)
    tables = {split: label_files.read_labels(file) for split, file in files.items()}
    if beside.names is not None:
        named = label_files.read_class_names(beside.names)
        if sorted(named) != list(range(len(named))):
            raise UsageError(f"{beside.names}: the class ids are not 0 to {len(named) - 1}; number them without gaps")
        names = tuple(named[i] for i in range(len(named)))
    else:
        others = [label_files.read_labels(file) for file in beside.labels.values() if file not in files.values()]
        most = max((int(t.class_ids.max()) for t in [*tables.values(), *others] if len(t.paths)), default=-1)
        names = tuple(str(i) for i in range(most + 1))
    splits = {}
    for split, table in tables.items():
        if len(table.paths) and int(table.class_ids.max()) >= len(names):
            raise UsageError(
                f"{files[split]} has the class id {table.class_ids.max()}, which {beside.names} does not name; add it "
                "there"
            )
        for name in table.paths:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UsageError(f"{files[split]} names {name[:80]!r}, which leads out of the image folder; correct it")
        splits[split] = _loose(split, root, table.paths, table.class_ids)
    if not any(len(samples) for samples in splits.values()):
        raise UsageError(f"{path} names no images; give label files with rows `class_id,path`")
    return DataSplits(str(path), names, splits)


def _loose(split: str, root: Path, paths: list[str], labels: IntArray) -> Samples:
    numbers = np.arange(len(paths), dtype=np.int64)
    nowhere = np.zeros_like(numbers)
    return Samples(split, labels, numbers, nowhere, nowhere - 1, paths, LocalFiles(root, paths))
