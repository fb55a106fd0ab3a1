"""Thumbnails of the report: those of class samples are made by workers, and all are kept by the digest of the image.

Thumbnails of dropped images and strips of pairs are kept by the digests of the originals and by how they are drawn.

The report chooses what it shows (`animesion.report.facts`). Workers make the first images of each class in the order in
which it asks for them, until its budget is spent; what is missing then is made when the report is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import PIL
import pyarrow as pa
import pyarrow.compute as pc

from animesion.executors import Executor
from animesion.images import codec
from animesion.report import images as report_images
from animesion.report.facts import CLASS_SAMPLES, SAMPLE_BYTES, Members, sample_side
from animesion.report.images import Images
from animesion.storage import parquet
from animesion.storage.workspace import Workspace

#: Where they are kept, relative to the output folder.
NAME = "pack/thumbnails.parquet"

#: The digest of a packed image and a side, or the `drawn_id` of something else and 0.
_SCHEMA = pa.schema([("sha256", pa.string()), ("side", pa.int32()), ("webp", pa.binary())])
_UNIT, _CODE = "thumbnails", f"thumbnails-2/pillow-{PIL.__version__}"

#: Images of a job, and images of the jobs that run before their bytes are counted.
_JOB, _ROUND = 64, 1024

Thumbnails = MutableMapping[tuple[str, int], bytes]
"""Thumbnails as WebP by key and side."""


@dataclass(frozen=True)
class ThumbnailJob:
    """Make thumbnails of packed images.

    Attributes:
        side: longest side in pixels.
        places: key, shard, offset and size in bytes of each image.
    """

    workspace: Workspace
    side: int
    places: tuple[tuple[str, str, int, int], ...]

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"thumbnails from {self.places[0][0]}"

    def run(self) -> Thumbnails:
        """The thumbnails, but of images that cannot be read."""
        found: Thumbnails = {}
        for key, shard, offset, size in self.places:
            with self.workspace.path(shard).open("rb") as file:
                file.seek(offset)
                content = file.read(size)
            try:
                found[key, self.side] = report_images.encoded(codec.decode(content, codec.Limits()).image, self.side)
            except codec.RejectedImageError:  # `animesion verify` reports it
                continue
        return found


def known(workspace: Workspace, index: pa.Table) -> tuple[Thumbnails, dict[str, bytes]]:
    """The thumbnails of the last build whose images are the same, and what else it drew, by `drawn_id`.

    Args:
        workspace: the output folder.
        index: table of schema `INDEX`.
    """
    if workspace.done(_UNIT, _CODE, "", {}) is None:
        return {}, {}
    try:
        table = parquet.read(workspace.path(NAME), _SCHEMA)
    except parquet.DamagedTableError:
        return {}, {}
    columns = [table[name].to_pylist() for name in ("sha256", "side", "webp")]
    drawn = {name: content for name, side, content in zip(*columns, strict=True) if name and side == 0 and content}
    rows = pc.index_in(table["sha256"], value_set=index["sha256"].combine_chunks())
    keys = index["key"].take(rows).to_pylist()
    values = zip(keys, *columns[1:], strict=True)
    return {(key, side): content for key, side, content in values if key and side and content}, drawn


def make(workspace: Workspace, index: pa.Table, images: Images, ready: Thumbnails, executor: Executor) -> None:
    """Make what is missing of the report's class samples.

    Args:
        workspace: the output folder, with its shards.
        index: table of schema `INDEX`.
        images: the images of the build, which look for thumbnails in `ready`.
        ready: the thumbnails that there are; others are added.
        executor: runs the jobs.
    """
    of_class = Members(images.rows, len(images.dataset.classes))
    firsts = [int(of_class[label][0]) for label in range(len(of_class)) if len(of_class[label])]
    side = sample_side(images, firsts)
    keys = images.rows.column("key")
    spent: set[bytes] = set()
    rows = _in_turn(of_class)
    while some := [row for row, _ in zip(rows, range(_ROUND), strict=False)]:
        named = keys.take(pa.array(some)).to_pylist()
        places = index.select(["key", "shard", "offset", "size"])
        missing = pa.array([key for key in named if (key, side) not in ready], pa.string())
        values = places.filter(pc.is_in(places["key"], value_set=missing)).to_pylist()
        listed = [tuple(row.values()) for row in values]
        jobs = [ThumbnailJob(workspace, side, tuple(listed[i : i + _JOB])) for i in range(0, len(listed), _JOB)]
        executor.run(jobs, lambda job, found: ready.update(found))
        spent.update(content for key in named if (content := ready.get((key, side))))
        if sum(map(len, spent)) > SAMPLE_BYTES:
            break


def _in_turn(of_class: Members) -> Iterator[int]:
    """The rows that the report may show, in the order in which it asks for them."""
    for turn in range(CLASS_SAMPLES):
        for label in range(len(of_class)):
            members = of_class[label]
            if turn < len(members):
                yield int(members[turn])


def keep(
    workspace: Workspace,
    index: pa.Table,
    ready: Mapping[tuple[str, int], bytes],
    drawn: Mapping[str, bytes],
    shown: set[bytes],
) -> None:
    """Store the thumbnails that the report shows.

    Args:
        workspace: the output folder.
        index: table of schema `INDEX`.
        ready: the thumbnails of kept images.
        drawn: what else the report may show, by `drawn_id`.
        shown: the thumbnails in the report.
    """
    chosen = sorted(place for place, content in ready.items() if content in shown)
    rows = pc.index_in(pa.array([key for key, _ in chosen], pa.string()), value_set=index["key"].combine_chunks())
    others = sorted(name for name, content in drawn.items() if content in shown)
    columns: list[Any] = [
        pa.array([*index["sha256"].take(rows).to_pylist(), *others], pa.string()),
        pa.array([*(side for _, side in chosen), *(0 for _ in others)], pa.int32()),
        pa.array([*(ready[place] for place in chosen), *(drawn[name] for name in others)], pa.binary()),
    ]
    outputs = {NAME: parquet.write(workspace.path(NAME), pa.table(columns, schema=_SCHEMA))}
    workspace.commit(_UNIT, _CODE, "", {}, outputs)
