"""Open labelled images: built datasets, class folders or label CSVs.

`open_data` detects the kind. Each kind becomes the arrays of `samples` and an explicit class map, which is read from
`dataset.json`, the folder names of all splits, or the class name file, and never from the labels that occur in a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import animesion
from animesion.dataset import label_files
from animesion.dataset.dataset import Dataset, ShardInfo
from animesion.dataset.tags import ASSIGNED, VOCABULARY
from animesion.errors import UsageError
from animesion.sources import class_folders
from animesion_training.data.blocks import Blocks, block_bytes, cut_blocks
from animesion_training.data.files import Files, LocalFiles
from animesion_training.data.samples import DataSplits, Samples
from animesion_training.data.seeds import IntArray
from animesion_training.data.tags import read_tags


def open_data(
    path: Path | str,
    *,
    images: Path | str | None = None,
    classes: Sequence[str] | None = None,
    cache: Path | str | None = None,
    cache_bytes: int = 20 * 2**30,
    tags: bool = False,
) -> DataSplits:
    """Open labelled images of any kind.

    Args:
        path: the folder or fsspec URL of a built dataset; a folder of class folders, or of `train`, `val`, `test` with
            class folders in them; a label CSV (`class_id,path`), or a folder of `train.csv`, `val.csv`, `test.csv`.
            A `classid_classname.csv` next to label CSVs names the classes.
        images: root of the paths in a label CSV; its own folder by default.
        classes: class map to use for class folders, names by id, such as that of trained weights. A built dataset takes
            it over if it has some of these classes and no others, as one of several that were blended does.
        cache: folder for blocks of the shards of a URL; by default in the user's cache.
        cache_bytes: upper limit of the size of cached blocks.
        tags: also open the tags of the samples.

    Raises:
        UsageError: no labelled images found, or they are damaged; or tags are asked for, and there are none.
    """
    if "://" in str(path):
        from animesion_training.data.remote import RemoteFiles, open_remote

        dataset, system, root, cached = open_remote(str(path), cache, (VOCABULARY, ASSIGNED) if tags else ())

        def remote(shards: Sequence[ShardInfo], blocks: Blocks) -> Files:
            return RemoteFiles(system, root, shards, blocks, cached, cache_bytes)

        return _from_dataset(str(path), dataset, remote, classes, tags)
    folder = Path(path)
    if tags and not (folder / "dataset.json").is_file():
        raise UsageError(f"{path} has no tags: training on tags needs a dataset that was built with tags.categories")
    if folder.suffix == ".csv" and folder.is_file():
        return _from_label_files(folder, {folder.stem: folder}, Path(images or folder.parent))
    if (folder / "dataset.json").is_file():
        return _from_dataset(str(folder), animesion.open_dataset(folder), None, classes, tags)
    if not folder.is_dir():
        raise UsageError(f"folder or label CSV {folder} not found: give a built dataset, class folders or a label CSV")
    if labels := label_files.with_class_ids(label_files.find_label_files(folder)).labels:
        return _from_label_files(folder, labels, Path(images or folder))
    return _from_class_folders(folder, classes)


# -- built datasets --------------------------------------------------------------------------------------------------


def _from_dataset(
    path: str,
    dataset: Dataset,
    remote: Callable[[Sequence[ShardInfo], Blocks], Files] | None,
    classes: Sequence[str] | None,
    tags: bool,
) -> DataSplits:
    table = dataset.index
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    numbers = pc.index_in(table["shard"], value_set=pa.array([shard.path for shard in shards], pa.string()))
    labels, files, offsets, sizes = (
        np.array(column.fill_null(-1).to_numpy(), dtype=np.int64)
        for column in (table["label"], numbers, table["offset"], table["size"])
    )
    names = tuple(entry.name for entry in dataset.classes)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise UsageError(f"{path} has labels outside its {len(names)} classes: rebuild the dataset")
    if classes is not None and set(names) < set(classes):
        ids = {name: i for i, name in enumerate(classes)}
        labels = np.array([ids[name] for name in names], dtype=np.int64)[labels]
        names = tuple(classes)
    lengths = np.array([shard.bytes for shard in shards], dtype=np.int64)
    if len(files) and (
        min(files.min(), offsets.min(), sizes.min()) < 0
        or (offsets > lengths[files]).any()
        or (sizes > lengths[files] - offsets).any()
    ):
        raise UsageError(f"{path}/index.parquet places samples outside of the shards: rebuild the dataset")
    blocks, ranges = cut_blocks(files, offsets, sizes, block_bytes(int(lengths.sum())))
    source = (
        LocalFiles(dataset.path, [shard.path for shard in shards], lengths.tolist())
        if remote is None
        else remote(shards, ranges)
    )
    digests = _digests(table["sha256"], path)
    splits = {}
    rows_of = {split: np.flatnonzero(pc.equal(table["split"], split).to_numpy()) for split in dataset.splits}
    for split, rows in rows_of.items():
        splits[split] = Samples(
            split,
            labels[rows],
            files[rows],
            offsets[rows],
            sizes[rows],
            table["key"].take(pa.array(rows)).to_pylist(),
            source,
            digests[rows],
            remote is not None,
            blocks[rows],
        )
    return DataSplits(path, names, splits, read_tags(dataset.path, table["key"], rows_of) if tags else None)


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
