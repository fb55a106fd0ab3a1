"""The bytes of each kept image in the form that a shard has them: copied, encoded, or read back from earlier shards.

An image that already has the requested format and size is copied without encoding. The others are encoded in parallel,
part by part, into intermediate files. What an earlier build encoded is read back from its shards, where it is known by
the digest of the original, the crop and the settings (`pack/encoded.parquet`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.errors import AnimesionError, UsageError
from animesion.images import codec, ends, formats
from animesion.pipeline.members import ints
from animesion.storage import names, parquet
from animesion.storage.workspace import Workspace, atomic_file
from animesion.wording import amount

CODE = f"pack-4/pillow-{PIL.__version__}{formats.plugin_versions()}"

#: Rows that are Python objects at once.
BATCH = 256

IntArray = npt.NDArray[np.int64]

#: Encoded images in the intermediate file of a part.
_ENCODED = pa.schema([("id", pa.binary(16)), ("offset", pa.int64()), ("size", pa.int64()), ("sha256", pa.string())])

#: Encoded images in shards: what identifies an encode, the SHA-256 of the shard, and where in it the image is.
_KNOWN = pa.schema(
    [
        ("id", pa.binary(16)),
        ("container", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
    ]
)
KNOWN_NAME = "pack/encoded.parquet"


class CrashedImagesError(AnimesionError):
    """Images that inspect decoded killed their worker in pack; curate has to drop them."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(f"{amount(len(keys), 'image kills', 'images kill')} the decoder: {', '.join(keys)}")
        self.keys = keys

    def __reduce__(self) -> tuple[Any, ...]:
        return CrashedImagesError, (self.keys,)


class DamagedShardError(AnimesionError):
    """A shard of an earlier build does not have the bytes that `pack/encoded.parquet` states."""


class Rows:
    """Some rows of a table; another process gets these rows and not the whole table.

    Args:
        table: the table.
        places: the rows, in order.
    """

    def __init__(self, table: pa.Table, places: IntArray) -> None:
        self._table, self._places = table, places

    def __len__(self) -> int:
        return len(self._places)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.taken(), np.arange(len(self), dtype=np.int64))

    def taken(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows as a table of their own."""
        table = self._table if columns is None else self._table.select(list(columns))
        return table.take(pa.array(self._places))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), BATCH):
            yield from self._table.take(pa.array(self._places[start : start + BATCH])).to_pylist()


@dataclass(frozen=True)
class EncodeJob:
    """Encode images of one part into an intermediate file.

    Attributes:
        rows: columns `key id crop width height plain extension offset bytes`.
        only: if not None, encode just these keys and write nothing.
        crashed: keys that killed their worker; if there are any, the job only reports them.
    """

    workspace: Workspace
    recipe: Recipe
    part: int
    rows: Rows
    only: tuple[str, ...] | None = None
    crashed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unit of the receipt."""
        return f"pack/part-{self.part:05d}"

    @property
    def inputs(self) -> dict[str, str]:
        """Inputs of the receipt. An id has the digest of its image, so the raw tar need not be one."""
        return {"images": hashlib.sha256(b"".join(self.rows.taken(["id"])["id"].to_pylist())).hexdigest()}

    @property
    def keys(self) -> Sequence[str]:
        """Keys of the images."""
        keys: list[str] = self.rows.taken(["key"])["key"].to_pylist()
        return keys

    def probe(self, keys: Sequence[str]) -> EncodeJob:
        """The same encodes for some keys; nothing is written."""
        return replace(self, only=tuple(keys))

    def without(self, keys: Sequence[str]) -> EncodeJob:
        """A job that reports the keys instead of packing, as only curate can drop an image."""
        return replace(self, crashed=tuple(keys))

    def run(self) -> int:
        """Encode, write and commit; returns the number of images."""
        if self.crashed:
            raise CrashedImagesError(self.crashed)
        with self.workspace.path(f"raw/part-{self.part:05d}.tar").open("rb") as tar:

            def encoded(row: dict[str, Any]) -> bytes:
                tar.seek(row["offset"])
                return packed_image(tar.read(row["bytes"]), row, self.recipe)

            if self.only is not None:
                chosen = set(self.only)
                for row in self.rows:
                    if row["key"] in chosen:
                        encoded(row)
                return 0
            index = []
            name = images_name(self.part)
            with atomic_file(self.workspace.path(name)) as out:
                for row in self.rows:
                    content = encoded(row)
                    digest = hashlib.sha256(content).hexdigest()
                    index.append({"id": row["id"], "offset": out.position, "size": len(content), "sha256": digest})
                    out.write(content)
        table = f"{self.name}.parquet"
        outputs = {name: out.sha256}
        outputs[table] = parquet.write(self.workspace.path(table), parquet.table(index, _ENCODED))
        self.workspace.commit(self.name, CODE, params(self.recipe), self.inputs, outputs)
        return len(self.rows)


def images_name(part: int) -> str:
    """Path of a part's encoded images, which exist until the shards are written."""
    return f"pack/part-{part:05d}.images"


def packed_image(content: bytes, row: Mapping[str, Any], recipe: Recipe) -> bytes:
    """The bytes of an image that cannot be copied as its file is.

    Args:
        content: bytes of the original.
        row: `crop width height plain extension` of `CURATED`.
        recipe: its `pack` and `filter` sections matter.
    """
    settings = recipe.pack
    crop = tuple(row["crop"])
    whole = (0, 0, row["width"], row["height"])
    final = crop == whole and row["plain"] and row["extension"] == settings.format and _has_size(row, recipe)
    if final and settings.keep_original == "auto" and (end := ends.end_of(content, row["extension"])):
        return content[:end]  # what follows the image was not decoded, so it is not published
    decoded = codec.decode(content, codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels), known=True)
    image = codec.resized(decoded.image, None if crop == whole else crop, settings.size, settings.fit)
    return codec.encode(image, settings.format, settings.quality)


def _has_size(row: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether an original already has the size that `pack.size` and `pack.fit` request."""
    width, height = (np.array([row[name]]) for name in ("width", "height"))
    return bool(_have_size(width, height, recipe)[0])


def _have_size(width: IntArray, height: IntArray, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Which originals already have the size that `pack.size` and `pack.fit` request, shape (n,)."""
    settings = recipe.pack
    if settings.size == 0:
        return np.ones(len(width), dtype=np.bool_)
    if settings.fit == "stretch":
        found: npt.NDArray[np.bool_] = (width == settings.size) & (height == settings.size)
        return found
    side = np.minimum(width, height) if settings.fit == "short-side" else np.maximum(width, height)
    fits: npt.NDArray[np.bool_] = side == settings.size
    return fits


def params(recipe: Recipe) -> str:
    """Digest of the recipe's values that this stage depends on."""
    values = recipe.model_dump(mode="json", include={"pack", "filter"})
    limits = {name: values["filter"][name] for name in ("max_side", "max_pixels")}
    return params_digest({"pack": values["pack"], "limits": limits})


class Images:
    """Where the bytes of each kept image are, in the form that it goes into a shard.

    Args:
        workspace: the output folder.
        recipe: the recipe.
        kept: the kept rows.

    Attributes:
        files: paths relative to the output folder.
        file: number of each image's file in `files`, shape (n,); -1 until it is encoded.
        place: offset in the file in bytes, shape (n,).
        size: size in bytes, shape (n,).
        sha256: SHA-256 as hex, a string column of n rows.
    """

    def __init__(self, workspace: Workspace, recipe: Recipe, kept: pa.Table) -> None:
        self._workspace, self._recipe, self._kept = workspace, recipe, kept
        n = len(kept)
        self._crop = np.asarray(kept["crop"].combine_chunks().flatten(), dtype=np.int64).reshape(-1, 4)
        self._part = ints(kept["part"])
        copied = self._copied()
        parts = np.unique(self._part)
        self.files = [f"raw/part-{part:05d}.tar" for part in parts.tolist()]
        self._containers: dict[str, int] = {}  # SHA-256 of a shard of an earlier build -> number of its file
        self.file = np.where(copied, np.searchsorted(parts, self._part), -1)
        self.offset = np.where(copied, ints(kept["offset"]), 0)
        self.size = np.where(copied, ints(kept["bytes"]), 0)
        self.sha256 = kept["sha256"].combine_chunks()
        self._encoded = np.flatnonzero(~copied)
        self._ids = self._make_ids()
        self._fresh = np.zeros(n, dtype=np.bool_)
        self._find_known()
        self._jobs: list[tuple[EncodeJob, IntArray]] = []

    def _copied(self) -> npt.NDArray[np.bool_]:
        """Which originals go into a shard as they are, shape (n,)."""
        settings = self._recipe.pack
        width, height = ints(self._kept["width"]), ints(self._kept["height"])
        if settings.keep_original != "auto":
            return np.zeros(len(width), dtype=np.bool_)
        whole = np.stack([np.zeros_like(width), np.zeros_like(width), width, height], axis=1)
        same: npt.NDArray[np.bool_] = (self._crop == whole).all(axis=1)
        # `plain` also rules out rotation, palettes and alpha, which readers without our decoder would show differently.
        same &= self._kept["plain"].to_numpy()
        same &= pc.equal(self._kept["extension"], settings.format).to_numpy()
        # What follows an image in its file is not packed.
        same &= pc.invert(pc.is_in(self._kept["sha256"], value_set=self._with_more())).to_numpy()
        return same & _have_size(width, height, self._recipe)

    def _with_more(self) -> pa.Array:
        """Digests of the files in which something follows the image, or whose end was not found."""
        found: set[str] = set()
        for part in np.unique(self._part).tolist():
            receipt = self._workspace.receipt(f"inspect/part-{part:05d}")
            found.update(receipt.facts["followed"] if receipt else ())
        return pa.array(sorted(found), pa.string())

    def _make_ids(self) -> pa.Array:
        """What identifies the encode of each image that is not copied, 16 bytes each."""
        values = self._recipe.model_dump(mode="json", include={"pack", "filter"})
        settings = {name: values["pack"][name] for name in ("size", "fit", "format", "quality", "keep_original")}
        settings |= {name: values["filter"][name] for name in ("max_side", "max_pixels")}
        start = hashlib.blake2b(f"{CODE} {params_digest(settings)}".encode(), digest_size=16)
        ids = []
        for begin in range(0, len(self._encoded), BATCH):
            rows = self._encoded[begin : begin + BATCH]
            digests = self._kept["sha256"].take(pa.array(rows)).to_pylist()
            for digest, crop in zip(digests, self._crop[rows].tolist(), strict=True):
                one = start.copy()
                one.update(f"{digest} {crop}".encode())
                ids.append(one.digest())
        return pa.array(ids, pa.binary(16))

    def _find_known(self) -> None:
        """Place the images that the shards of an earlier build have."""
        index = self._workspace.receipt("index")
        output = index.outputs.get(KNOWN_NAME) if index else None
        if output is None or not self._workspace.has(KNOWN_NAME, output):
            return
        known = parquet.read(self._workspace.path(KNOWN_NAME), _KNOWN)
        if any(column.null_count for column in known.columns):
            return
        found = pc.index_in(self._ids, value_set=known["id"].combine_chunks())
        there = {digest: name for digest in pc.unique(known["container"]).to_pylist() if (name := self._shard(digest))}
        for digest, name in sorted(there.items()):
            self._containers[digest] = len(self.files)
            self.files.append(name)
        numbers = pc.index_in(known["container"], value_set=pa.array(list(self._containers), pa.string()))
        first = len(self.files) - len(self._containers)
        container = numbers.fill_null(-1).to_numpy().astype(np.int64)
        rows = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
        places = found.take(pa.array(rows)).to_numpy(zero_copy_only=False).astype(np.int64)
        rows, places = rows[container[places] >= 0], places[container[places] >= 0]
        self._set(self._encoded[rows], first + container[places], known.take(pa.array(places)))

    def _shard(self, digest: str) -> str:
        """Path of the shard with a digest, in its place or moved aside; empty if it is not there."""
        if not re.fullmatch(names.SHA256, digest):
            return ""
        moved = f"pack/{digest}.tar"
        if self._workspace.path(moved).is_file():
            return moved
        return self._shards.get(digest, "")

    @functools.cached_property
    def _shards(self) -> dict[str, str]:
        """The shards in their places, by digest."""
        found = {}
        folder = self._workspace.path(".receipts/shards")
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            receipt = self._workspace.receipt(f"shards/{path.stem}")
            if receipt and self._workspace.intact(receipt):
                found.update({known["sha256"]: name for name, known in receipt.outputs.items()})
        return found

    def _set(self, rows: IntArray, file: IntArray | int, at: pa.Table) -> None:
        """Set where some images are: in which file, and columns `offset size sha256`."""
        self.file[rows] = file
        self.offset[rows], self.size[rows] = ints(at["offset"]), ints(at["size"])
        mask = np.zeros(len(self.file), dtype=np.bool_)
        mask[rows] = True
        order = np.argsort(rows, kind="stable")
        digests = at["sha256"].take(pa.array(order)).combine_chunks()
        self.sha256 = pc.replace_with_mask(self.sha256, pa.array(mask), digests)

    def jobs(self) -> list[EncodeJob]:
        """Jobs that encode what is not known, one per part."""
        ids = pa.nulls(len(self.file), pa.binary(16))
        mask = np.zeros(len(self.file), dtype=np.bool_)
        mask[self._encoded] = True
        table = self._kept.select(["key", "crop", "width", "height", "plain", "extension", "offset", "bytes"])
        table = table.append_column("id", pc.replace_with_mask(ids, pa.array(mask), self._ids))
        rows = np.flatnonzero(self.file < 0)
        rows = rows[np.lexsort((ints(self._kept["offset"])[rows], self._part[rows]))]  # as the tar is read
        self._fresh[rows] = True
        for part in np.unique(self._part[rows]).tolist():
            chosen = rows[self._part[rows] == part]
            self._jobs.append((EncodeJob(self._workspace, self._recipe, part, Rows(table, chosen)), chosen))
        return [job for job, _ in self._jobs]

    def place(self) -> None:
        """Place the images that the jobs have encoded."""
        for job, rows in self._jobs:
            made = parquet.read(self._workspace.path(f"{job.name}.parquet"), _ENCODED)
            if len(made) != len(rows):
                raise UsageError(f"{self._workspace.path(job.name)}.parquet is damaged: delete it and build again")
            self._set(rows, len(self.files), made)
            self.files.append(images_name(job.part))

    def move(self, pending: set[str], all_: set[str]) -> None:
        """Move the shards aside that are written again or go, and have images that are wanted.

        A build that is killed finds them by their digest.
        """
        for digest, number in self._containers.items():
            name = self.files[number]
            if name.startswith("data/") and (name in pending or name not in all_):
                moved = f"pack/{digest}.tar"
                self._workspace.path("pack").mkdir(exist_ok=True)
                os.replace(self._workspace.path(name), self._workspace.path(moved))
                self.files[number] = moved

    def is_fresh(self, rows: Rows) -> int:
        """How many of some rows were encoded in this build."""
        return int(self._fresh[rows._places].sum())

    def known(self, index: pa.Table, digests: Mapping[str, str]) -> pa.Table:
        """The table of schema `_KNOWN` of the finished shards.

        Args:
            index: table of schema `INDEX`.
            digests: SHA-256 by shard.
        """
        rows = pc.index_in(self._kept["key"].take(pa.array(self._encoded)), value_set=index["key"].combine_chunks())
        taken = index.take(rows)
        shard = taken["shard"].combine_chunks().dictionary_encode()
        container = pa.DictionaryArray.from_arrays(
            shard.indices, pa.array([digests[name] for name in shard.dictionary.to_pylist()], pa.string())
        ).cast(pa.string())
        return pa.table([self._ids, container, taken["offset"], taken["size"], taken["sha256"]], schema=_KNOWN)
