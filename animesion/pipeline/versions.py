"""Versions of a dataset that grows in its folder: where the tables of the version before are kept, and what they fix.

`animesion build --update` makes the finished dataset the parent of the next one: `versions/DIGEST/` has hard links of
its tables, and the receipt of the listing names the digest. Images of the parent keep their shard, split, group and
class id, so that a shard is written again only if a sample in it has changed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.dataset import tags
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.schemas import CURATED
from animesion.storage import checksums, names, parquet
from animesion.storage.workspace import Workspace, sha256_file

FOLDER = "versions"

#: Files of a version that the next one needs.
_FILES = ("dataset.json", "curated.parquet", "index.parquet")
#: Another one, if the dataset has it.
_MAYBE = (tags.VOCABULARY,)
#: For `animesion diff`, if the recipe has not been changed since.
_RECIPE = "recipe.toml"
_MOST_BYTES = 500_000_000


def begin(workspace: Workspace) -> str:
    """Keep the tables of the finished dataset in a folder, as those of a parent.

    Returns:
        The digest of its `dataset.json`; empty if the folder has no finished dataset.

    Raises:
        UsageError: a table does not match the dataset's SHA256SUMS.
    """
    if not all(workspace.path(name).is_file() for name in checksums.SEALS):
        return ""
    listed = checksums.read(workspace.root)
    there = [*_FILES, *(name for name in _MAYBE if workspace.path(name).is_file())]
    digests = {name: sha256_file(workspace.path(name)) for name in there}
    for name, digest in digests.items():
        if listed.get(name) != digest:
            raise UsageError(f"{workspace.root}: {name} does not match its SHA256SUMS: run `animesion verify`")
    with_recipe = sha256_file(workspace.path(_RECIPE)) == listed.get(_RECIPE)
    keep(workspace, digests["dataset.json"], with_recipe=with_recipe)
    return digests["dataset.json"]


def keep(workspace: Workspace, digest: str, *, with_recipe: bool = True) -> None:
    """Link the tables of the finished dataset into its folder below `versions/`."""
    folder = workspace.path(FOLDER, digest)
    folder.mkdir(parents=True, exist_ok=True)
    maybe = [name for name in _MAYBE if workspace.path(name).is_file()]
    for name in (*_FILES, *maybe, *([_RECIPE] if with_recipe else [])):
        # Files are replaced and never changed, so a link keeps what it links to.
        temporary = folder / f".tmp-{os.getpid()}-{name}"
        temporary.unlink(missing_ok=True)
        try:
            os.link(workspace.path(name), temporary)
        except OSError:  # a file system without links
            shutil.copyfile(workspace.path(name), temporary)
        temporary.replace(folder / name)


def forget_others(workspace: Workspace, digest: str) -> None:
    """Remove the tables of versions before the parent."""
    folder = workspace.path(FOLDER)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name != digest and re.fullmatch(names.SHA256, path.name):
            shutil.rmtree(path)


class Parent:
    """The version before.

    Args:
        workspace: the output folder.
        digest: SHA-256 of its `dataset.json`, as hex.
        compact: whether samples get new shards all the same.

    Raises:
        UsageError: its tables are missing or damaged.
    """

    def __init__(self, workspace: Workspace, digest: str, *, compact: bool = False) -> None:
        self.digest, self.compact = digest, compact
        folder = workspace.path(FOLDER, digest)
        path = folder / "dataset.json"
        if not path.is_file() or sha256_file(path) != digest:
            raise UsageError(
                f"{folder} is missing or damaged, but the dataset is built onto that version: copy it from where the "
                "dataset was built, or build into another folder"
            )
        self._dataset = Dataset(folder)
        self._facts: dict[str, Any] = json.loads(path.read_bytes())

    @functools.cached_property
    def classes(self) -> dict[str, int]:
        """Class ids by name."""
        return {info.name: info.id for info in self._dataset.classes}

    @functools.cached_property
    def vocabulary(self) -> tags.Vocabulary | None:
        """Its tags; None if its samples carry none."""
        folder = self._dataset.path
        return tags.read_vocabulary(folder) if (folder / tags.VOCABULARY).is_file() else None

    @functools.cached_property
    def rows(self) -> pa.Table:
        """Columns `key kept split group` of every image that it has seen."""
        path = self._dataset.path / "curated.parquet"
        return parquet.read(path, CURATED, ("key", "kept", "split", "group"))

    @property
    def splits(self) -> dict[str, str]:
        """Split of each kept image by key."""
        kept = self.rows.filter(self.rows["kept"])
        return dict(zip(kept["key"].to_pylist(), kept["split"].to_pylist(), strict=True))

    @property
    def places(self) -> pa.Table:
        """Columns `key split shard` of its samples; none if samples get new shards."""
        index = self._dataset.index.select(["key", "split", "shard"])
        return index.slice(0, 0) if self.compact else index

    @property
    def shards(self) -> list[str]:
        """Every shard that it has or had; their names are not given to other shards."""
        emptied = self._facts.get("emptied_shards", [])
        emptied = [name for name in emptied if isinstance(name, str)] if isinstance(emptied, list) else []
        there = [shard.path for split in self._dataset.splits.values() for shard in split.shards]
        return [] if self.compact else [*there, *emptied]

    def stable_groups(self, groups: npt.NDArray[np.int64], keys: pa.Array) -> npt.NDArray[np.int64]:
        """Groups named so that those of the parent keep their names, although an image with a smaller key joined.

        Args:
            groups: row of the image that each row's group is named after, shape (n,).
            keys: key of each row.
        """
        # a group that was divided leaves its name to the part with the image of that name
        rows, named = (pc.index_in(self.rows[name], value_set=keys) for name in ("key", "group"))
        there = pc.and_(rows.is_valid(), named.is_valid())
        row, name = (each.filter(there).to_numpy().astype(np.int64) for each in (rows, named))
        same = groups[row] == groups[name]
        row, name = row[same], name[same]
        # of several groups that were joined, the smallest name, which is assigned last
        order = pc.sort_indices(keys.take(pa.array(name)), sort_keys=[("", "descending")]).to_numpy()
        best = np.full(len(keys), -1, dtype=np.int64)
        best[groups[row[order]]] = name[order]
        found: npt.NDArray[np.int64] = np.where(best[groups] >= 0, best[groups], groups)
        return found

    def stable_classes(self, class_ids: Mapping[str, int]) -> dict[str, int]:
        """Class ids in which the parent's classes keep theirs, also those that have no image now; new ones follow."""
        known = self.classes
        new = sorted((name for name in class_ids if name not in known), key=lambda name: class_ids[name])
        return known | {name: len(known) + i for i, name in enumerate(new)}

    def lineage(self, index: pa.Table) -> dict[str, Any]:
        """What `dataset.json` tells of the versions before, and of what has changed since the last.

        Args:
            index: `index.parquet` of the new version.
        """
        before = self._dataset.index["key"]
        stayed = pc.sum(pc.is_in(index["key"], value_set=before.combine_chunks())).as_py() or 0
        return {
            "parent": self.digest,
            "added": len(index) - stayed,
            "removed": len(before) - stayed,
            "lineage": next_lineage(self._facts, self.digest),
        }


def next_lineage(facts: Mapping[str, Any], digest: str) -> list[dict[str, Any]]:
    """The versions before the next one, the oldest first.

    Args:
        facts: content of the `dataset.json` of the last version.
        digest: its SHA-256.
    """
    images = facts["images"]
    entry = {
        "dataset": digest,
        "images": images,
        "added": facts.get("added", images),
        "removed": facts.get("removed", 0),
    }
    return [*earlier(facts), entry]


def earlier(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The versions that a `dataset.json` lists, the oldest first; entries that no build writes are left out."""
    listed = facts.get("lineage", [])
    found = []
    for each in listed if isinstance(listed, list) else []:
        if not isinstance(each, dict) or not re.fullmatch(names.SHA256, str(each.get("dataset"))):
            continue
        counts = {name: each.get(name) for name in ("images", "added", "removed")}
        if all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts.values()):
            found.append({"dataset": each["dataset"], **counts})
    return found
