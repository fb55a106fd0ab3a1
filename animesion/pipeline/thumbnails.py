"""Thumbnails of the report's class samples: made by workers, and kept by the digest of the packed image.

The choice is that of `animesion.report.facts`: every class gets its first image before any gets its second, until the
budget is spent. What is missing here is made when the report is written, so a different choice costs time only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from animesion import splits
from animesion.executors import Executor
from animesion.images import codec
from animesion.report import images
from animesion.report.facts import CLASS_SAMPLES, SAMPLE_BYTES
from animesion.storage import parquet
from animesion.storage.workspace import Workspace

#: Where they are kept, relative to the output folder.
NAME = "pack/thumbnails.parquet"

_SCHEMA = pa.schema([("sha256", pa.string()), ("side", pa.int32()), ("webp", pa.binary())])
_UNIT = "thumbnails"
_JOB = 128
#: Jobs that are started before the bytes of their thumbnails are counted.
_ROUND = 8


@dataclass(frozen=True)
class ThumbnailJob:
    """Make thumbnails of packed images.

    Attributes:
        places: shard, offset and size in bytes of each image.
    """

    workspace: Workspace
    places: tuple[tuple[str, int, int], ...]
    first: int

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"thumbnails {self.first} to {self.first + len(self.places) - 1}"

    def run(self) -> list[bytes]:
        """The thumbnails; empty bytes for an image that cannot be read, which `animesion verify` reports."""
        found = []
        for shard, offset, size in self.places:
            with self.workspace.path(shard).open("rb") as file:
                file.seek(offset)
                content = file.read(size)
            try:
                found.append(images.reduced(codec.decode(content, codec.Limits()).image))
            except codec.RejectedImageError:
                found.append(b"")
        return found


def make(workspace: Workspace, index: pa.Table, executor: Executor, code: str) -> dict[tuple[str, int], bytes]:
    """The thumbnails of the report's class samples, by key and side.

    Args:
        workspace: the output folder, with its shards.
        index: table of schema `INDEX`.
        executor: runs the jobs.
        code: version of what thumbnails depend on.
    """
    order = _order(index)
    known = _known(workspace, code)
    made: dict[str, bytes] = {}
    ready: dict[tuple[str, int], bytes] = {}
    spent: set[bytes] = set()
    for start in range(0, len(order), _JOB * _ROUND):
        if sum(map(len, spent)) > SAMPLE_BYTES:
            break
        rows = index.take(pa.array(order[start : start + _JOB * _ROUND])).to_pylist()
        missing = [row for row in rows if row["sha256"] not in known]
        jobs = [
            ThumbnailJob(workspace, tuple((row["shard"], row["offset"], row["size"]) for row in some), first)
            for first in range(0, len(missing), _JOB)
            if (some := missing[first : first + _JOB])
        ]
        firsts = {job.name: job.first for job in jobs}

        def keep(job: object, found: Sequence[bytes], rows: list[dict[str, str]] = missing,
                 firsts: dict[str, int] = firsts) -> None:  # fmt: skip
            first = firsts[job.name]  # type: ignore[attr-defined]
            known.update({row["sha256"]: each for row, each in zip(rows[first:], found, strict=False)})

        executor.run(jobs, keep)
        for row in rows:
            if content := known[row["sha256"]]:
                made[row["sha256"]] = ready[row["key"], images.SIDE] = content
                spent.add(content)
    _keep(workspace, code, made)
    return ready


def _order(index: pa.Table) -> npt.NDArray[np.int64]:
    """The rows of the index that the report may show, first those that it shows first."""
    keys = index["key"].to_pylist()
    label = index["label"].to_numpy()
    hashed = np.frombuffer(b"".join(splits.hashed_order(0, key) for key in keys), dtype=">u8").reshape(-1, 2)
    order = np.lexsort((hashed[:, 1], hashed[:, 0], label))
    # the turn of each row within its class
    begins = np.flatnonzero(np.diff(label[order], prepend=-1))
    sizes = np.diff(begins, append=len(order))
    turn = np.arange(len(order)) - np.repeat(begins, sizes)
    chosen = turn < CLASS_SAMPLES
    order, turn = order[chosen], turn[chosen]
    return order[np.lexsort((label[order], turn))].astype(np.int64)


def _known(workspace: Workspace, code: str) -> dict[str, bytes]:
    """Thumbnails of the last build by the digest of the packed image."""
    if workspace.done(_UNIT, code, "", {}) is None:
        return {}
    try:
        table = parquet.read(workspace.path(NAME), _SCHEMA)
    except parquet.DamagedTableError:
        return {}
    rows = zip(*(table[name].to_pylist() for name in _SCHEMA.names), strict=True)
    return {digest: content for digest, side, content in rows if side == images.SIDE and content}


def _keep(workspace: Workspace, code: str, made: dict[str, bytes]) -> None:
    digests = sorted(made)
    columns = [digests, [images.SIDE] * len(digests), [made[digest] for digest in digests]]
    table = pa.table([pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
    outputs = {NAME: parquet.write(workspace.path(NAME), table)}
    workspace.commit(_UNIT, code, "", {}, outputs)
