"""Stage 4: crop, resize and encode the kept images into shards, and write `index.parquet`.

Chunks of samples are encoded in parallel into intermediate files. When all sizes are known, samples are assigned to
shards and copied there. The assignment depends on keys and sizes only. An image that already has the requested format
and size is copied without encoding.
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
from animesion.images import codec, ends, formats
from animesion.schemas import CURATED, INDEX
from animesion.storage import checksums, parquet
from animesion.storage.workspace import Workspace, atomic_file

CODE = f"pack-3/pillow-{PIL.__version__}{formats.plugin_versions()}"
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
    """Images that inspect decoded killed their worker in pack; curate has to drop them."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(f"{len(keys)} image(s) kill the decoder: {', '.join(keys)}")
        self.keys = keys

    def __reduce__(self) -> tuple[Any, ...]:
        return _CrashedImagesError, (self.keys,)


@dataclass(frozen=True)
class ChunkJob:
    """Encode the samples of one chunk into an intermediate file.

    Attributes:
        chunk: name of the chunk, such as `train-00000`.
        rows: fields of `CURATED`, in the order of the chunk.
        only: if not None, encode just these keys and write nothing.
        crashed: keys that killed their worker; if there are any, the job only reports them.
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
        """The same encodes for some keys; nothing is written."""
        return replace(self, only=tuple(keys))

    def without(self, keys: Sequence[str]) -> ChunkJob:
        """A job that reports the keys instead of packing, as only curate can drop an image."""
        return replace(self, crashed=tuple(keys))

    def run(self) -> int:
        """Encode, write and commit; returns the number of samples."""
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
                # The image is one of several members; its header is unique in the sample.
                header = shards.header(f"{row['key']}.{self.recipe.pack.format}", len(content))
                image_start = block.index(header) + shards.BLOCK
                entry = {"key": row["key"], "label": row["class_id"], "offset": out.position, "size": len(block)}
                entry |= {"image_offset": image_start, "image_size": len(content)}
                index.append({**entry, "sha256": hashlib.sha256(content).hexdigest()})
                out.write(block)
        name = f"pack/{self.chunk}.parquet"
        outputs = {name: parquet.write(self.workspace.path(name), parquet.table(index, _CHUNK))}
        self.workspace.commit(self.name, CODE, params(self.recipe), self.inputs, outputs, {"samples": out.sha256})
        return len(self.rows)


@dataclass(frozen=True)
class ShardJob:
    """Copy samples from their chunks into one shard.

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
        """Copy, write and commit; returns the number of samples."""
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
    """Path of a chunk's encoded samples, which exists until the shards are written."""
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
    # `plain` also rules out rotation, palettes and alpha, which readers without our decoder would show differently.
    is_final = crop == whole and row["plain"] and row["extension"] == settings.format and _has_size(row, recipe)
    if is_final and settings.keep_original == "auto" and (end := ends.end_of(content, row["extension"])):
        return content[:end]  # what follows the image was not decoded, so it is not published
    decoded = codec.decode(content, codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels), known=True)
    image = codec.resized(decoded.image, None if crop == whole else crop, settings.size, settings.fit)
    return codec.encode(image, settings.format, settings.quality)


def sample_fields(row: dict[str, Any], content: bytes, recipe: Recipe) -> dict[str, bytes]:
    """The members of a sample: image, `cls`, `json` and, unless switched off, the caption `txt`.

    The JSON has the same fields with the same types in every sample, without nulls and empty lists, because readers
    infer types from single samples.
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
) -> tuple[str, ...]:
    """Write every shard that has no valid receipt, and `index.parquet`.

    Args:
        workspace: the output folder, curated.
        recipe: the recipe.
        executor: runs the chunks and shards.
        advance: called with the number of images encoded since the last call.
        finished: called with the path of each finished shard, in no fixed order, including shards of an earlier run.

    Returns:
        Keys of images that killed their worker. If there are any, no shard is finished and curate has to drop them.
    """
    try:
        _run(workspace, recipe, executor, advance, finished)
    except _CrashedImagesError as error:
        return error.keys
    return ()


def _run(
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    advance: Callable[[int], None],
    finished: Callable[[str], None],
) -> None:
    curated = parquet.read(workspace.path("curated.parquet"), CURATED)
    kept = curated.filter(curated["kept"]).to_pylist()
    chunks = _chunks(kept, recipe)
    jobs = {name: _chunk_job(workspace, recipe, name, rows) for name, rows in chunks.items()}
    encoded = {name: job for name, job in jobs.items() if workspace.done(job.name, CODE, params(recipe), job.inputs)}
    workspace.forget("pack", {job.name for job in jobs.values()})
    executor.run([job for name, job in jobs.items() if name not in encoded], lambda job, count: advance(count))
    advance(sum(len(job.rows) for job in encoded.values()))

    shard_jobs, index = _assign_to_shards(workspace, recipe, jobs)
    pending = [job for job in shard_jobs if not workspace.done(job.name, CODE, "", job.inputs)]
    if pending:
        checksums.unseal(workspace.root)
    # A finished build deletes its intermediate files; chunks of shards that are written again are encoded again.
    pending_chunks = {chunk for job in pending for chunk, _, _ in job.pieces}
    deleted = {chunk for chunk in pending_chunks if not workspace.path(samples_name(chunk)).exists()}
    executor.run([jobs[chunk] for chunk in sorted(deleted)])
    # Shards of an earlier split or order that no longer exist; readers that list the folder would load them.
    workspace.forget("shards", {job.name for job in shard_jobs})
    shard_of = {job.name: job.shard for job in shard_jobs}
    # Finished shards are reported first, so that an upload starts while the others are written.
    for name in shard_of.keys() - {job.name for job in pending}:
        finished(shard_of[name])
    executor.run(pending, lambda job, _: finished(shard_of[job.name]))
    inputs = {job.shard: params_digest(job.inputs) for job in shard_jobs}
    if not workspace.done("index", CODE, "", inputs):
        outputs = {"index.parquet": parquet.write(workspace.path("index.parquet"), parquet.table(index, INDEX))}
        workspace.commit("index", CODE, "", inputs, outputs)
    for chunk in jobs:
        workspace.path(samples_name(chunk)).unlink(missing_ok=True)


def _chunks(kept: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split in hashed order, cut into chunks, by the chunk's name.

    The hash decides which shard a sample is in, so that every shard has a mix of classes.
    """
    chunks = {}
    for split in splits.SPLITS:
        rows = [row for row in kept if row["split"] == split]
        rows.sort(key=lambda row: splits.hashed_order(recipe.pack.seed, row["key"]))
        for start in range(0, len(rows), CHUNK_SAMPLES):
            chunks[f"{split}-{start // CHUNK_SAMPLES:05d}"] = rows[start : start + CHUNK_SAMPLES]
    return chunks


def _chunk_job(workspace: Workspace, recipe: Recipe, chunk: str, rows: list[dict[str, Any]]) -> ChunkJob:
    # A row has the sha256 of its image, so the raw tars need not be inputs.
    return ChunkJob(workspace, recipe, chunk, rows, {"rows": params_digest(rows)})


def _assign_to_shards(
    workspace: Workspace, recipe: Recipe, jobs: dict[str, ChunkJob]
) -> tuple[list[ShardJob], list[dict[str, Any]]]:
    """Fill shards in the order of chunks up to the recipe's limits; returns shard jobs and the rows of `INDEX`."""
    shard_jobs: list[ShardJob] = []
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

        # The end marker counts towards the limit on bytes; a sample over the limit gets a shard of its own.
        contents: list[list[dict[str, Any]]] = []
        current: list[dict[str, Any]] = []
        total = len(shards.END)
        for entry in entries:
            is_full = len(current) == recipe.pack.shard_samples or total + entry["size"] > recipe.pack.shard_bytes
            if current and is_full:
                contents.append(current)
                current, total = [], len(shards.END)
            current.append(entry)
            total += entry["size"]
        if current:
            contents.append(current)

        for number, members in enumerate(contents):
            shard = f"data/{split}-{number:05d}.tar"
            # By key plus dot, which is the order of the member names: "-" sorts before ".", and "0" after it.
            members.sort(key=lambda entry: entry["key"] + ".")
            pieces = [(entry["chunk"], entry["offset"], entry["size"]) for entry in members]
            inputs = {chunk: digests[chunk] for chunk in sorted({piece[0] for piece in pieces})}
            inputs["pieces"] = params_digest(pieces)
            shard_jobs.append(ShardJob(workspace, shard, pieces, inputs))
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
    return shard_jobs, index


def _has_size(row: dict[str, Any], recipe: Recipe) -> bool:
    """Whether the original already has the size that `pack.size` and `pack.fit` request."""
    size, width, height = recipe.pack.size, row["width"], row["height"]
    if size == 0:
        return True
    if recipe.pack.fit == "stretch":
        return bool(width == height == size)
    fitted_side = min(width, height) if recipe.pack.fit == "short-side" else max(width, height)
    return bool(fitted_side == size)


def _original(workspace: Workspace, row: dict[str, Any]) -> bytes:
    return shards.read(workspace.path(f"raw/part-{row['part']:05d}.tar"), row["offset"], row["bytes"])
