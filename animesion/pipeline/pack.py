"""Stage 4: kept images to shards: second decode, crop, resize, encode, and the index.

Chunks of samples are encoded in parallel into intermediate files; when all sizes are known, shards are cut exactly and
copied together. Which sample goes where depends on keys and sizes alone. An image whose own bytes already are what the
recipe asks for is copied, not encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL
import pyarrow as pa

from animesion import splits
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dataset import shards
from animesion.errors import AnimesionError
from animesion.executors import Executor
from animesion.images import codec
from animesion.schemas import CURATED, INDEX
from animesion.storage import checksums, parquet
from animesion.storage.workspace import Workspace, atomic_file

CODE = f"pack-1/pillow-{PIL.__version__}"
CHUNK_SAMPLES = 256

_CHUNK = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),
        ("offset", pa.int64()),  # of the sample in the chunk file
        ("size", pa.int64()),
        ("image_offset", pa.int64()),  # of the image's bytes inside the sample
        ("image_size", pa.int64()),
        ("sha256", pa.string()),
    ]
)


class _CrashedImagesError(AnimesionError):
    """Images that decoded in inspect killed their worker in pack; curate has to drop them."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(f"{len(keys)} image(s) kill the decoder: {', '.join(keys)}")
        self.keys = keys

    def __reduce__(self) -> tuple[Any, ...]:
        return _CrashedImagesError, (self.keys,)


@dataclass(frozen=True)
class ChunkJob:
    """Encode some samples.

    Attributes:
        chunk: name of the chunk, such as `train-00000`.
        rows: fields of `CURATED`, in the order of the chunk.
        class_names: by class id.
        only: when not None, encode just these keys and write nothing.
    """

    workspace: Workspace
    recipe: Recipe
    chunk: str
    rows: list[dict[str, Any]]
    inputs: dict[str, str]
    only: tuple[str, ...] | None = None
    crashed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unit of the receipt."""
        return f"pack/{self.chunk}"

    @property
    def keys(self) -> Sequence[str]:
        """Keys of the samples."""
        return [row["key"] for row in self.rows]

    def probe(self, keys: Sequence[str]) -> ChunkJob:
        """The same decodes for some keys, nothing written."""
        return replace(self, only=tuple(keys))

    def without(self, keys: Sequence[str]) -> ChunkJob:
        """A job that reports the keys instead of packing: dropping them is for curate to decide."""
        return replace(self, crashed=tuple(keys))

    def run(self) -> int:
        """Encode, write, commit; returns the number of samples."""
        if self.crashed:
            raise _CrashedImagesError(self.crashed)
        if self.only is not None:
            for row in self.rows:
                if row["key"] in self.only:
                    packed_image(_original(self.workspace, row), row, self.recipe)
            return 0
        index = []
        with atomic_file(self.workspace.path(samples_name(self.chunk))) as out:
            for row in self.rows:
                content = packed_image(_original(self.workspace, row), row, self.recipe)
                fields = sample_fields(row, content, self.recipe)
                block = shards.sample(row["key"], fields)
                at = block.index(shards.header(f"{row['key']}.{self.recipe.pack.format}", len(content)))
                entry = {"key": row["key"], "label": row["class_id"], "offset": out.position, "size": len(block)}
                entry |= {"image_offset": at + shards.BLOCK, "image_size": len(content)}
                index.append({**entry, "sha256": hashlib.sha256(content).hexdigest()})
                out.write(block)
        name = f"pack/{self.chunk}.parquet"
        outputs = {name: parquet.write(self.workspace.path(name), parquet.table(index, _CHUNK))}
        self.workspace.commit(self.name, CODE, params(self.recipe), self.inputs, outputs, {"samples": out.sha256})
        return len(self.rows)


@dataclass(frozen=True)
class ShardJob:
    """Copy samples together into one shard.

    Attributes:
        shard: path relative to the output folder.
        pieces: chunk, offset and size of each sample, sorted by key.
    """

    workspace: Workspace
    shard: str
    pieces: list[tuple[str, int, int]]
    inputs: dict[str, str]

    @property
    def name(self) -> str:
        """Unit of the receipt."""
        return f"shards/{self.shard.removeprefix('data/').removesuffix('.tar')}"

    def run(self) -> int:
        """Copy, write, commit; returns the number of samples."""
        with contextlib.ExitStack() as stack:
            files = {
                chunk: stack.enter_context(self.workspace.path(samples_name(chunk)).open("rb"))
                for chunk in sorted({chunk for chunk, _, _ in self.pieces})
            }
            with atomic_file(self.workspace.path(self.shard)) as out:
                for chunk, offset, size in self.pieces:
                    files[chunk].seek(offset)
                    out.write(files[chunk].read(size))
                out.write(shards.END)
        facts = {"samples": len(self.pieces)}
        self.workspace.commit(self.name, CODE, "", self.inputs, {self.shard: out.sha256}, facts)
        return len(self.pieces)


def samples_name(chunk: str) -> str:
    """Where a chunk's encoded samples lie until their shards are written."""
    return f"pack/{chunk}.samples"


def packed_image(content: bytes, row: dict[str, Any], recipe: Recipe) -> bytes:
    """The bytes of the image as it goes into the shard.

    Args:
        content: bytes of the original.
        row: fields of `CURATED`.
        recipe: its `pack` and `filter` sections matter.
    """
    settings = recipe.pack
    whole = (0, 0, row["width"], row["height"])
    crop = tuple(row["crop"])
    fits = crop == whole and row["plain"] and row["extension"] == settings.format and _has_size(row, recipe)
    if fits and settings.keep_original == "auto":
        return content
    decoded = codec.decode(content, codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels))
    image = codec.resized(decoded.image, None if crop == whole else crop, settings.size, settings.fit)
    return codec.encode(image, settings.format, settings.quality)


def sample_fields(row: dict[str, Any], content: bytes, recipe: Recipe) -> dict[str, bytes]:
    """The members of a sample: image, `cls`, `json` and, unless switched off, a caption.

    The JSON has the same fields with the same types in every sample: no nulls, no empty lists, as readers infer types.
    """
    provenance = {
        "label": row["class_id"],
        "name": row["label"],
        "split": row["split"],
        "source": row["source"],
        "source_id": row["source_id"],
        "page_url": row["page_url"],
        "file_url": row["file_url"],
        "licence": row["licence"],
        "author": row["author"],
        "rating": row["rating"],
        "md5": row["md5"],
        "width": row["width"],
        "height": row["height"],
        "box": row["crop"],
        "group": row["group"],
    }
    fields = {
        recipe.pack.format: content,
        "cls": str(row["class_id"]).encode(),
        "json": json.dumps(provenance, ensure_ascii=False, separators=(",", ":")).encode(),
    }
    if recipe.pack.caption:
        fields["txt"] = recipe.pack.caption.replace("{name}", row["label"].replace("_", " ")).encode()
    return fields


def params(recipe: Recipe) -> str:
    """Digest of what the stage takes from the recipe."""
    values = recipe.model_dump(mode="json", include={"pack", "filter"})
    limits = {name: values["filter"][name] for name in ("max_side", "max_pixels")}
    return params_digest({"pack": values["pack"], "limits": limits})


def run(
    workspace: Workspace,
    recipe: Recipe,
    engine: Executor,
    advance: Callable[[int], None],
    finished: Callable[[str], None] = lambda shard: None,
) -> tuple[str, ...]:
    """Write every shard that has no valid receipt, and `index.parquet`.

    Args:
        workspace: the output folder, curated.
        recipe: the recipe.
        engine: runs the chunks and shards.
        advance: told how many images are done.
        finished: told the path of each shard that is done, in no fixed order; those of an earlier run too.

    Returns:
        Keys of images that killed their worker: curate has to drop them first, nothing is finished then.
    """
    try:
        _run(workspace, recipe, engine, advance, finished)
    except _CrashedImagesError as error:
        return error.keys
    return ()


def _run(
    workspace: Workspace,
    recipe: Recipe,
    engine: Executor,
    advance: Callable[[int], None],
    finished: Callable[[str], None],
) -> None:
    curated = parquet.read(workspace.path("curated.parquet"), CURATED)
    kept = curated.filter(curated["kept"]).to_pylist()
    chunks = _chunks(kept, recipe)
    jobs = {name: _chunk_job(workspace, recipe, name, rows) for name, rows in chunks.items()}
    sized = {name: job for name, job in jobs.items() if workspace.done(job.name, CODE, params(recipe), job.inputs)}
    workspace.forget("pack", {job.name for job in jobs.values()})
    engine.run([job for name, job in jobs.items() if name not in sized], lambda job, count: advance(count))
    advance(sum(len(job.rows) for job in sized.values()))

    plan, index = _cut(workspace, recipe, jobs)
    if any(not workspace.done(job.name, CODE, "", job.inputs) for job in plan):
        checksums.unseal(workspace.root)
    missing = [job for job in plan if not workspace.done(job.name, CODE, "", job.inputs)]
    lost = {chunk for job in missing for chunk, _, _ in job.pieces if not workspace.path(samples_name(chunk)).exists()}
    engine.run([jobs[chunk] for chunk in sorted(lost)])
    workspace.forget("shards", {job.name for job in plan})
    shard_of = {job.name: job.shard for job in plan}
    for name in shard_of.keys() - {job.name for job in missing}:
        finished(shard_of[name])
    engine.run(missing, lambda job, _: finished(shard_of[job.name]))
    inputs = {job.shard: params_digest(job.inputs) for job in plan}
    if not workspace.done("index", CODE, "", inputs):
        outputs = {"index.parquet": parquet.write(workspace.path("index.parquet"), parquet.table(index, INDEX))}
        workspace.commit("index", CODE, "", inputs, outputs)
    for chunk in jobs:
        workspace.path(samples_name(chunk)).unlink(missing_ok=True)


def _chunks(kept: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Samples of each split in hashed order, cut into chunks."""
    chunks = {}
    for split in splits.SPLITS:
        rows = [row for row in kept if row["split"] == split]
        rows.sort(key=lambda row: splits.hashed_order(recipe.pack.seed, row["key"]))
        for start in range(0, len(rows), CHUNK_SAMPLES):
            chunks[f"{split}-{start // CHUNK_SAMPLES:05d}"] = rows[start : start + CHUNK_SAMPLES]
    return chunks


def _chunk_job(workspace: Workspace, recipe: Recipe, chunk: str, rows: list[dict[str, Any]]) -> ChunkJob:
    # a row names its image by sha256, so the raw tars need not be inputs
    return ChunkJob(workspace, recipe, chunk, rows, {"rows": params_digest(rows)})


def _cut(
    workspace: Workspace, recipe: Recipe, jobs: dict[str, ChunkJob]
) -> tuple[list[ShardJob], list[dict[str, Any]]]:
    """Fill shards in order up to the limits; inside a shard samples are sorted by key."""
    plan: list[ShardJob] = []
    index: list[dict[str, Any]] = []
    for split in splits.SPLITS:
        entries = []
        digests = {}
        for chunk in sorted(name for name in jobs if name.rpartition("-")[0] == split):
            receipt = workspace.receipt(f"pack/{chunk}")
            assert receipt is not None
            digests[chunk] = receipt.facts["samples"]
            rows = parquet.read(workspace.path(f"pack/{chunk}.parquet"), _CHUNK).to_pylist()
            entries += [{**row, "chunk": chunk} for row in rows]
        filled: list[dict[str, Any]] = []
        total = len(shards.END)
        full: list[list[dict[str, Any]]] = []
        for entry in entries:
            if filled and (len(filled) == recipe.pack.shard_samples or total + entry["size"] > recipe.pack.shard_bytes):
                full.append(filled)
                filled, total = [], len(shards.END)
            filled.append(entry)
            total += entry["size"]
        if filled:
            full.append(filled)
        for number, members in enumerate(full):
            shard = f"data/{split}-{number:05d}.tar"
            members.sort(key=lambda entry: entry["key"] + ".")  # as their member names sort
            pieces = [(entry["chunk"], entry["offset"], entry["size"]) for entry in members]
            inputs = {chunk: digests[chunk] for chunk in sorted({piece[0] for piece in pieces})}
            inputs["pieces"] = params_digest(pieces)
            plan.append(ShardJob(workspace, shard, pieces, inputs))
            position = 0
            for entry in members:
                index.append(
                    {
                        "key": entry["key"],
                        "split": split,
                        "shard": shard,
                        "offset": position + entry["image_offset"],
                        "size": entry["image_size"],
                        "label": entry["label"],
                        "sample_offset": position,
                        "sample_size": entry["size"],
                        "sha256": entry["sha256"],
                    }
                )
                position += entry["size"]
    return plan, index


def _has_size(row: dict[str, Any], recipe: Recipe) -> bool:
    size, width, height = recipe.pack.size, row["width"], row["height"]
    if size == 0:
        return True
    if recipe.pack.fit == "stretch":
        return bool(width == height == size)
    return bool(size == (min(width, height) if recipe.pack.fit == "short-side" else max(width, height)))


def _original(workspace: Workspace, row: dict[str, Any]) -> bytes:
    return shards.read(workspace.path(f"raw/part-{row['part']:05d}.tar"), row["offset"], row["bytes"])
