"""Stage 4: crop, resize and encode the kept images into shards, and write `index.parquet`.

`animesion.pipeline.encoded` knows where the bytes of each image are, or encodes it. When all sizes are known, samples
are assigned to shards, by keys and sizes only, and the shards are written in parallel.

Rows stay columns of Arrow; a job makes Python objects of a few hundred at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from animesion import splits
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dataset import shards, tags
from animesion.dataset.tags import Members
from animesion.errors import UsageError
from animesion.executors import Executor
from animesion.pipeline import encoded, thumbnails
from animesion.pipeline.encoded import (
    BATCH,
    KNOWN_NAME,
    CrashedImagesError,
    DamagedShardError,
    Images,
    IntArray,
    Rows,
    params,
)
from animesion.pipeline.members import SHOWN, sample_fields, sample_sizes
from animesion.pipeline.versions import Parent
from animesion.schemas import CURATED, INDEX
from animesion.storage import checksums, parquet
from animesion.storage.workspace import Workspace, atomic_file

CODE = encoded.CODE

#: Columns of `CURATED` that tell where the original of a sample is and how it was decoded.
_ORIGINAL = ("sha256", "plain", "part", "offset", "bytes", "extension")


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
            raise DamagedShardError(f"{self.workspace.path(name)} was changed after it was written")
        return content


#: Bytes of shards that are written in about the time that a worker takes to start.
_LIGHT = 1 << 27

#: Files that a job keeps open; a shard has images of every part.
_MOST_OPEN = 500


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
            except DamagedShardError:  # what it had is encoded again
                workspace.path(KNOWN_NAME).unlink(missing_ok=True)
                _run(workspace, recipe, executor, parent, lambda count: None, finished)
    except CrashedImagesError as error:
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
    images = Images(workspace, recipe, kept)
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
    is_written = pc.is_in(index["shard"], value_set=pa.array(sorted(waiting), pa.string()))
    light = (pc.sum(index["sample_size"].filter(is_written)).as_py() or 0) <= _LIGHT
    executor.run(pending, lambda job, samples: done(shard_of[job.name], samples), light=light)
    digests = {}
    for job in shard_jobs:
        receipt = workspace.receipt(job.name)
        assert receipt is not None
        digests[job.shard] = receipt.outputs[job.shard]["sha256"]
    outputs = {
        "index.parquet": parquet.write(workspace.path("index.parquet"), index),
        KNOWN_NAME: parquet.write(workspace.path(KNOWN_NAME), images.known(index, digests)),
    }
    workspace.commit("index", CODE, params(recipe), _inputs(workspace, parent), outputs, {"shards": digests})
    _clean(workspace)


def _clean(workspace: Workspace) -> None:
    """Remove the intermediate files of a finished stage."""
    workspace.forget("pack", set())
    folder = workspace.path("pack")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if f"pack/{path.name}" not in (KNOWN_NAME, thumbnails.NAME):
            path.unlink()


def _kept(workspace: Workspace) -> pa.Table:
    """The kept rows, by key."""
    columns = ["kept", "reason", *SHOWN, *_ORIGINAL]
    curated = parquet.read(workspace.path("curated.parquet"), CURATED, columns)
    return curated.filter(curated["kept"]).drop_columns(["kept", "reason"]).combine_chunks()


def _unit(shard: str) -> str:
    return f"shards/{shard.removeprefix('data/').removesuffix('.tar')}"


def _assign_to_shards(
    workspace: Workspace, recipe: Recipe, kept: pa.Table, images: Images, parent: Parent | None
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
    for start in range(0, len(keys), BATCH):
        digests += b"".join(splits.hashed_order(seed, key) for key in keys.slice(start, BATCH).to_pylist())
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
