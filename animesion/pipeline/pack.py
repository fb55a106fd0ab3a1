"""Stage 4: crop, resize and encode the kept images into shards, and write `index.parquet`.

An image that already has the requested format and size is copied without encoding. The others are encoded in parallel,
part by part, into intermediate files; what an earlier build encoded is read back from its shards, where it is known by
the digest of the original, the crop and the settings (`pack/encoded.parquet`). When all sizes are known, samples are
assigned to shards, by keys and sizes only, and the shards are written in parallel.

Rows stay columns of Arrow; a job makes Python objects of a few hundred at a time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from animesion import splits
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dataset import shards, tags
from animesion.dataset.tags import Members
from animesion.errors import AnimesionError, UsageError
from animesion.executors import Executor
from animesion.images import codec, ends, formats
from animesion.pipeline import thumbnails
from animesion.pipeline.members import SHOWN, ints, sample_fields, sample_sizes
from animesion.pipeline.versions import Parent
from animesion.schemas import CURATED, INDEX
from animesion.storage import checksums, names, parquet
from animesion.storage.workspace import Workspace, atomic_file

CODE = f"pack-4/pillow-{PIL.__version__}{formats.plugin_versions()}"

#: Rows that are Python objects at once.
_BATCH = 256

IntArray = npt.NDArray[np.int64]

#: Columns of `CURATED` that tell where the original of a sample is and how it was decoded.
_ORIGINAL = ("sha256", "plain", "part", "offset", "bytes", "extension")

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
_KNOWN_NAME = "pack/encoded.parquet"


class _CrashedImagesError(AnimesionError):
    """Images that inspect decoded killed their worker in pack; curate has to drop them."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(f"{len(keys)} image(s) kill the decoder: {', '.join(keys)}")
        self.keys = keys

    def __reduce__(self) -> tuple[Any, ...]:
        return _CrashedImagesError, (self.keys,)


class _DamagedShardError(AnimesionError):
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
        for start in range(0, len(self), _BATCH):
            yield from self._table.take(pa.array(self._places[start : start + _BATCH])).to_pylist()


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
            raise _CrashedImagesError(self.crashed)
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


@dataclass(frozen=True)
class ShardJob:
    """Write one shard.

    Attributes:
        shard: path relative to the output folder.
        rows: the samples in the order of the shard: columns of `SHOWN`, `tags` if they carry tags, and `file place size
            packed sample_size`, the place, size and SHA-256 of the encoded image, and the size of the sample in the
            shard.
        files: paths that `file` counts, relative to the output folder.
        members: the part of the JSON with the tags, if samples carry tags.
    """

    workspace: Workspace
    recipe: Recipe
    shard: str
    rows: Rows
    files: tuple[str, ...]
    inputs: dict[str, str]
    members: Members | None = None

    @property
    def name(self) -> str:
        """Unit of the receipt."""
        return _unit(self.shard)

    def run(self) -> int:
        """Write and commit; returns the number of samples."""
        with contextlib.ExitStack() as stack:
            opened: dict[int, IO[bytes]] = {}
            with atomic_file(self.workspace.path(self.shard)) as out:
                for row in self.rows:
                    image = self._image(row, opened, stack)
                    block = shards.sample(row["key"], sample_fields(row, image, self.recipe, self.members))
                    if len(block) != row["sample_size"]:
                        raise RuntimeError(f"{row['key']} has {len(block)} bytes instead of {row['sample_size']}")
                    out.write(block)
                out.write(shards.END)
        facts = {"samples": len(self.rows)}
        self.workspace.commit(self.name, CODE, "", self.inputs, {self.shard: out.sha256}, facts)
        return len(self.rows)

    def _image(self, row: dict[str, Any], opened: dict[int, IO[bytes]], stack: contextlib.ExitStack) -> bytes:
        """The bytes of an encoded image, which are compared with their digest.

        Raises:
            UsageError: an original was changed since it was fetched.
        """
        name = self.files[row["file"]]
        if row["file"] not in opened:
            if len(opened) == _MOST_OPEN:
                opened.pop(next(iter(opened))).close()
            opened[row["file"]] = stack.enter_context(self.workspace.path(name).open("rb"))
        file = opened[row["file"]]
        file.seek(row["place"])
        content = file.read(row["size"])
        if hashlib.sha256(content).hexdigest() != row["packed"]:
            if name.startswith("raw/"):
                raise UsageError(
                    f"{self.workspace.path(name)} was changed after it was fetched: delete it, and run the same "
                    "command again"
                )
            raise _DamagedShardError(f"{self.workspace.path(name)} was changed after it was written")
        return content


#: Files that a job keeps open; a shard has images of every part.
_MOST_OPEN = 500


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


def run(
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    advance: Callable[[int], None],
    finished: Callable[[str], None] = lambda shard: None,
    parent: Parent | None = None,
) -> tuple[str, ...]:
    """Write every shard that has no valid receipt, and `index.parquet`.

    Args:
        workspace: the output folder, curated.
        recipe: the recipe.
        executor: runs the encodes and shards.
        advance: called with the number of images packed since the last call.
        finished: called with the path of each finished shard, in no fixed order, including shards of an earlier run.
        parent: the version whose samples keep their shards.

    Returns:
        Keys of images that killed their worker. If there are any, no shard is finished and curate has to drop them.
    """
    try:
        if not _is_packed(workspace, recipe, parent, advance, finished):
            try:
                _run(workspace, recipe, executor, parent, advance, finished)
            except _DamagedShardError:  # what it had is encoded again
                workspace.path(_KNOWN_NAME).unlink(missing_ok=True)
                _run(workspace, recipe, executor, parent, lambda count: None, finished)
    except _CrashedImagesError as error:
        return error.keys
    return ()


def _inputs(workspace: Workspace, parent: Parent | None) -> dict[str, str]:
    curate = workspace.receipt("curate")
    assert curate is not None
    inputs = {"curated": curate.outputs["curated.parquet"]["sha256"]}
    if parent:
        inputs["parent"] = "" if parent.compact else parent.digest
    if tags_receipt := workspace.receipt("tags"):
        inputs["tags"] = tags_receipt.outputs[tags.ASSIGNED]["sha256"]
        inputs["vocabulary"] = tags_receipt.outputs[tags.VOCABULARY]["sha256"]
    return inputs


def _is_packed(
    workspace: Workspace,
    recipe: Recipe,
    parent: Parent | None,
    advance: Callable[[int], None],
    finished: Callable[[str], None],
) -> bool:
    """Whether all shards and the index are there, by their receipts alone."""
    index = workspace.done("index", CODE, params(recipe), _inputs(workspace, parent))
    if index is None:
        return False
    found = {shard: workspace.receipt(_unit(shard)) for shard in index.facts["shards"]}
    for shard, digest in index.facts["shards"].items():
        receipt = found[shard]
        if receipt is None or receipt.outputs[shard]["sha256"] != digest or not workspace.intact(receipt):
            return False
    _clean(workspace)
    for shard, receipt in found.items():
        finished(shard)
        advance(receipt.facts["samples"] if receipt else 0)
    return True


def _run(
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    parent: Parent | None,
    advance: Callable[[int], None],
    finished: Callable[[str], None],
) -> None:
    kept = _kept(workspace)
    images = _Images(workspace, recipe, kept)
    jobs = images.jobs()
    encoded = [job for job in jobs if workspace.done(job.name, CODE, params(recipe), job.inputs)]
    workspace.forget("pack", {job.name for job in jobs})
    names_of_encoded = {job.name for job in encoded}
    executor.run([job for job in jobs if job.name not in names_of_encoded], lambda job, count: advance(count))
    advance(sum(len(job.rows) for job in encoded))
    images.place()

    shard_jobs, index = _assign_to_shards(workspace, recipe, kept, images, parent)
    pending = [job for job in shard_jobs if not workspace.done(job.name, CODE, "", job.inputs)]
    waiting = {job.shard for job in pending}
    if pending:
        checksums.unseal(workspace.root)
        images.move(waiting, {job.shard for job in shard_jobs})
        pending = [replace(job, files=tuple(images.files)) for job in pending]
    # Shards of an earlier split or order that no longer exist; readers that list the folder would load them.
    workspace.forget("shards", {job.name for job in shard_jobs})
    fresh = {job.shard: images.is_fresh(job.rows) for job in shard_jobs}

    def done(shard: str, samples: int) -> None:
        finished(shard)
        advance(samples - fresh[shard])

    # Finished shards are reported first, so that an upload starts while the others are written.
    for job in shard_jobs:
        if job.shard not in waiting:
            done(job.shard, len(job.rows))
    shard_of = {job.name: job.shard for job in pending}
    executor.run(pending, lambda job, samples: done(shard_of[job.name], samples))
    digests = {}
    for job in shard_jobs:
        receipt = workspace.receipt(job.name)
        assert receipt is not None
        digests[job.shard] = receipt.outputs[job.shard]["sha256"]
    outputs = {
        "index.parquet": parquet.write(workspace.path("index.parquet"), index),
        _KNOWN_NAME: parquet.write(workspace.path(_KNOWN_NAME), images.known(index, digests)),
    }
    workspace.commit("index", CODE, params(recipe), _inputs(workspace, parent), outputs, {"shards": digests})
    _clean(workspace)


def _clean(workspace: Workspace) -> None:
    """Remove the intermediate files of a finished stage."""
    workspace.forget("pack", set())
    folder = workspace.path("pack")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if f"pack/{path.name}" not in (_KNOWN_NAME, thumbnails.NAME):
            path.unlink()


def _kept(workspace: Workspace) -> pa.Table:
    """The kept rows, by key."""
    columns = ["kept", "reason", *SHOWN, *_ORIGINAL]
    curated = parquet.read(workspace.path("curated.parquet"), CURATED, columns)
    return curated.filter(curated["kept"]).drop_columns(["kept", "reason"]).combine_chunks()


def _unit(shard: str) -> str:
    return f"shards/{shard.removeprefix('data/').removesuffix('.tar')}"


class _Images:
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
        for begin in range(0, len(self._encoded), _BATCH):
            rows = self._encoded[begin : begin + _BATCH]
            digests = self._kept["sha256"].take(pa.array(rows)).to_pylist()
            for digest, crop in zip(digests, self._crop[rows].tolist(), strict=True):
                one = start.copy()
                one.update(f"{digest} {crop}".encode())
                ids.append(one.digest())
        return pa.array(ids, pa.binary(16))

    def _find_known(self) -> None:
        """Place the images that the shards of an earlier build have."""
        index = self._workspace.receipt("index")
        output = index.outputs.get(_KNOWN_NAME) if index else None
        if output is None or not self._workspace.has(_KNOWN_NAME, output):
            return
        known = parquet.read(self._workspace.path(_KNOWN_NAME), _KNOWN)
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


def _assign_to_shards(
    workspace: Workspace, recipe: Recipe, kept: pa.Table, images: _Images, parent: Parent | None
) -> tuple[list[ShardJob], pa.Table]:
    """Fill shards in hashed order up to the recipe's limits; returns shard jobs and a table of schema `INDEX`.

    The hash decides which shard a sample is in, so that every shard has a mix of classes. Samples of the parent stay in
    their shards, and new shards follow those.
    """
    table = kept.select(SHOWN)
    vocabulary = tags.read_vocabulary(workspace.root) if workspace.receipt("tags") else None
    of_tags = None if vocabulary is None else tags.Members(vocabulary)
    if vocabulary:
        found = tags.read_assigned(workspace.root, kept["key"], len(vocabulary))
        table = table.append_column("tags", found.column())
    sizes, starts = sample_sizes(table, images.size, recipe, of_tags)
    order = _hashed_order(recipe.pack.seed, kept["key"])
    table = table.append_column("packed", images.sha256)
    shown = table.column_names
    for name, values in (("file", images.file), ("place", images.offset), ("size", images.size)):
        table = table.append_column(name, pa.array(values))
    table = table.append_column("sample_size", pa.array(sizes))
    code = params_digest([recipe.pack.format, recipe.pack.caption])
    settings = {"settings": code}
    if vocabulary:
        settings["tags"] = params_digest([vocabulary.names, vocabulary.categories])
    jobs: list[ShardJob] = []
    pieces = []
    for split in splits.SPLITS:
        chosen = pc.equal(kept["split"], split).to_numpy()
        contents, first = _placed(kept, split, parent) if parent else ({}, 0)
        for members in contents.values():
            chosen[members] = False
        filled = _filled(order[chosen[order]], sizes, recipe)
        contents |= {f"data/{split}-{number:05d}.tar": members for number, members in enumerate(filled, first)}
        for shard, members in contents.items():
            keys = kept["key"].take(pa.array(members)).to_pylist()
            # By key plus dot, which is the order of the member names: "-" sorts before ".", and "0" after it.
            places = members[sorted(range(len(members)), key=lambda i: keys[i] + ".")]
            rows = Rows(table, places)
            inputs = {"samples": _table_digest(rows.taken(shown)), **settings}
            jobs.append(ShardJob(workspace, recipe, shard, rows, tuple(images.files), inputs, of_tags))
            at = np.cumsum(sizes[places]) - sizes[places]
            taken = rows.taken(["key", "split", "class_id", "packed"])
            columns = {
                "key": taken["key"],
                "split": taken["split"],
                "shard": pa.repeat(pa.scalar(shard), len(places)),
                "offset": pa.array(at + starts[places]),
                "size": pa.array(images.size[places]),
                "label": taken["class_id"],
                "sample_offset": pa.array(at),
                "sample_size": pa.array(sizes[places]),
                "sha256": taken["packed"],
            }
            pieces.append(pa.table(list(columns.values()), schema=INDEX))
    return jobs, pa.concat_tables(pieces).combine_chunks()


def _placed(kept: pa.Table, split: str, parent: Parent) -> tuple[dict[str, IntArray], int]:
    """The rows of a split by the shard that they are in, and the number of the first new shard."""
    pattern = re.compile(rf"data/{split}-(\d{{5,}})\.tar")
    numbers = [int(match[1]) for name in parent.shards if (match := pattern.fullmatch(name))]
    places = parent.places
    places = places.filter(pc.equal(places["split"], split))
    at = pc.index_in(kept["key"], value_set=places["key"].combine_chunks())
    there = np.flatnonzero(pc.and_(at.is_valid(), pc.equal(kept["split"], split)).to_numpy())
    shard = places["shard"].take(at.take(pa.array(there))).combine_chunks().dictionary_encode()
    codes = shard.indices.to_numpy()
    names_ = shard.dictionary.to_pylist()
    found = {name: there[codes == code].astype(np.int64) for code, name in enumerate(names_)}
    return {name: found[name] for name in sorted(found) if pattern.fullmatch(name)}, max(numbers, default=-1) + 1


def _hashed_order(seed: int, keys: pa.ChunkedArray) -> IntArray:
    """The rows in the order of `animesion.splits.hashed_order`."""
    digests = bytearray()
    for start in range(0, len(keys), _BATCH):
        digests += b"".join(splits.hashed_order(seed, key) for key in keys.slice(start, _BATCH).to_pylist())
    halves = np.frombuffer(bytes(digests), dtype=">u8").reshape(-1, 2)
    return np.lexsort((halves[:, 1], halves[:, 0])).astype(np.int64)


def _filled(order: IntArray, sizes: IntArray, recipe: Recipe) -> list[IntArray]:
    """The rows of each shard: as many as fit, in their order.

    The end marker counts towards the limit on bytes; a sample over the limit gets a shard of its own.
    """
    ends = []
    count, total = 0, len(shards.END)
    for position, size in enumerate(sizes[order].tolist()):
        if count and (count == recipe.pack.shard_samples or total + size > recipe.pack.shard_bytes):
            ends.append(position)
            count, total = 0, len(shards.END)
        count, total = count + 1, total + size
    return np.split(order, ends) if len(order) else []


def _table_digest(table: pa.Table) -> str:
    """A digest of the values of a table."""
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return hashlib.sha256(out.getvalue()).hexdigest()
