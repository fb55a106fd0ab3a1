"""Open labelled images: built datasets, class folders or label CSVs.

`open_data` detects the kind. Each kind becomes the arrays of `samples` and an explicit class map, which is read from
`dataset.json`, the folder names of all splits, or the class name file, and never from the labels that occur in a split.
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
from animesion.dataset import label_files
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.sources import class_folders
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
            A `classid_classname.csv` next to label CSVs names the classes.
        images: root of the paths in a label CSV; its own folder by default.
        classes: class map to use for class folders, names by id, such as that of trained weights.
        cache: folder for shards of a URL; by default in the user's cache.
        cache_bytes: upper limit of the size of cached shards.

    Raises:
        UsageError: no labelled images found, or they are damaged.
    """
    if "://" in str(path):
        from animesion_training.data.remote import open_remote

        dataset, source = open_remote(str(path), cache, cache_bytes)
        return _from_dataset(str(path), dataset, source)
    folder = Path(path)
    if folder.suffix == ".csv" and folder.is_file():
        return _from_label_files(folder, {folder.stem: folder}, Path(images or folder.parent))
    if (folder / "dataset.json").is_file():
        return _from_dataset(str(folder), animesion.open_dataset(folder), None)
    if not folder.is_dir():
        raise UsageError(f"folder or label CSV {folder} not found: give a built dataset, class folders or a label CSV")
    if labels := label_files.find_label_files(folder).labels:
        return _from_label_files(folder, labels, Path(images or folder))
    return _from_class_folders(folder, classes)


# -- built datasets --------------------------------------------------------------------------------------------------


def _from_dataset(path: str, dataset: Dataset, source: Files | None) -> DataSplits:
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


def _from_class_folders(root: Path, classes: Sequence[str] | None) -> DataSplits:
    folders = class_folders.read(root)
    found = sorted({name for split in folders.splits.values() for name in split})
    names = tuple(classes) if classes is not None else tuple(found)
    if unknown := sorted(set(found) - set(names)):
        raise UsageError(f"{root} has the folder {unknown[0]!r}, which is not one of the {len(names)} given classes")
    ids = {name: i for i, name in enumerate(names)}
    splits = {}
    for split, images in folders.splits.items():
        paths = [path for name in images for path in images[name]]
        labels = [ids[name] for name in images for _ in images[name]]
        splits[split] = _from_paths(split, root, paths, np.array(labels, dtype=np.int64))
    return DataSplits(str(root), names, splits)


def _from_label_files(path: Path, files: Mapping[str, Path], root: Path) -> DataSplits:
    """Read splits from label CSVs; the class map covers every label file in the folder, also those not opened."""
    folder_files = label_files.find_label_files(path if path.is_dir() else path.parent)
    tables = {split: label_files.read_labels(file) for split, file in files.items()}
    if folder_files.names is not None:
        named = label_files.read_class_names(folder_files.names)
        if sorted(named) != list(range(len(named))):
            raise UsageError(
                f"{folder_files.names}: the class ids are not 0 to {len(named) - 1}; number them without gaps"
            )
        names = tuple(named[i] for i in range(len(named)))
    else:
        others = [label_files.read_labels(file) for file in folder_files.labels.values() if file not in files.values()]
        most = max((int(t.class_ids.max()) for t in [*tables.values(), *others] if len(t.paths)), default=-1)
        names = tuple(str(i) for i in range(most + 1))
    splits = {}
    for split, table in tables.items():
        if len(table.paths) and int(table.class_ids.max()) >= len(names):
            raise UsageError(
                f"{files[split]} has the class id {table.class_ids.max()}, which {folder_files.names} does not "
                "name: add it there"
            )
        for name in table.paths:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UsageError(
                    f"{files[split]} names {name[:80]!r}, which is outside the image folder: correct the path"
                )
        splits[split] = _from_paths(split, root, table.paths, table.class_ids)
    if not any(len(samples) for samples in splits.values()):
        raise UsageError(f"{path} lists no images: give label files with rows `class_id,path`")
    return DataSplits(str(path), names, splits)


def _from_paths(split: str, root: Path, paths: list[str], labels: IntArray) -> Samples:
    numbers = np.arange(len(paths), dtype=np.int64)
    offsets = np.zeros_like(numbers)
    whole = offsets - 1  # size -1: the whole file
    return Samples(split, labels, numbers, offsets, whole, paths, LocalFiles(root, paths))
