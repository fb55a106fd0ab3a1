"""Read finished shards back: digest and walk each, then look at every sample, in worker processes.

It tells what is there, as compact arrays. Whether that is what should be there is judged in `animesion.verification.checks`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from animesion.dataset import shards
from animesion.images import codec, hashing
from animesion.images.features import compute_features
from animesion.schemas import THUMBNAIL_SIDE
from animesion.storage.workspace import sha256_file

if TYPE_CHECKING:  # workers import this module: what they do not need costs each of them its start
    from animesion.dataset.dataset import Dataset
    from animesion.executors import Executor
    from animesion.progress import Progress

#: Samples of one job: some seconds of work, some megabytes of results.
RANGE_SAMPLES = 2_000

_THUMBNAIL_BYTES = THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3
# a class id is a few digits and a JSON some hundred bytes: anything larger is not ours to load
_MAX_BYTES = {"cls": 64, "json": 1 << 20}


@dataclass
class Walk:
    """What a shard holds.

    Attributes:
        shard: path relative to the dataset.
        damage: one sentence when the shard cannot be read to its end; then there are no samples.
        sha256: of the file, empty when it cannot be read.
        bytes: of the file.
        keys: of the samples, in order.
        fields: names of each sample's members joined by commas, in order.
        places: shape (n, 4, 2): offset and size of image, cls and json (-1 when missing) and of the whole sample.
    """

    shard: str
    damage: str = ""
    sha256: str = ""
    bytes: int = 0
    keys: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    places: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 4, 2), dtype=np.int64))


@dataclass(frozen=True)
class WalkJob:
    """Digest a shard and list its samples without reading them."""

    folder: Path
    shard: str
    image_field: str

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"reading {self.shard}"

    def run(self) -> Walk:
        """Walk to the end marker."""
        walk = Walk(self.shard)
        path = self.folder / self.shard
        try:
            walk.bytes = path.stat().st_size
            walk.sha256 = sha256_file(path)
            found = list(shards.members(path))
        except FileNotFoundError:
            walk.damage = f"{self.shard} is missing"
            return walk
        except OSError as error:
            walk.damage = f"{self.shard} cannot be read ({(error.strerror or 'read error').lower()})"
            return walk
        except shards.ShardError as error:
            walk.damage = str(error).removeprefix(f"{self.folder}/")
            return walk
        places = []
        for key, group in itertools.groupby(found, key=lambda member: member.key):
            members = list(group)
            at = {member.field: (member.offset, member.size) for member in members}
            start, last = members[0].offset - shards.BLOCK, members[-1]
            end = last.offset + last.size + -last.size % shards.BLOCK
            walk.keys.append(key)
            walk.fields.append(",".join(member.field for member in members))
            places.append(
                [*(at.get(name, (-1, 0)) for name in (self.image_field, "cls", "json")), (start, end - start)]
            )
        walk.places = np.array(places, dtype=np.int64).reshape(-1, 4, 2)
        return walk


@dataclass
class ScanResult:
    """What the samples of a range say, one entry a sample; -1 and empty text where it cannot be told.

    Attributes:
        sha256: 32 bytes each, of the image's bytes.
        labels: class ids of the `cls` members.
        json_labels: class ids of the JSON members.
        json_names: class names of the JSON members.
        json_splits: splits of the JSON members.
        json_fields: the JSON members' fields and types; empty when there is no JSON object.
        decoded: whether the image decoded.
        pixels: 32 bytes each, digest of the decoded pixels.
        phash: perceptual hash of the decoded pixels.
        phash_flip: that of their mirror image.
        thumbnails: shape (n, 768).
        faults: position of the sample, name of the check and what is wrong.
    """

    sha256: list[bytes]
    labels: npt.NDArray[np.int64]
    json_labels: npt.NDArray[np.int64]
    json_names: list[str]
    json_splits: list[str]
    json_fields: list[str]
    decoded: npt.NDArray[np.bool_]
    pixels: list[bytes]
    phash: npt.NDArray[np.uint64]
    phash_flip: npt.NDArray[np.uint64]
    thumbnails: npt.NDArray[np.uint8]
    faults: list[tuple[int, str, str]]

    @classmethod
    def blank(cls, n: int) -> ScanResult:
        """Nothing is known yet."""
        return cls(
            sha256=[b""] * n,
            labels=np.full(n, -1, dtype=np.int64),
            json_labels=np.full(n, -1, dtype=np.int64),
            json_names=[""] * n,
            json_splits=[""] * n,
            json_fields=[""] * n,
            decoded=np.zeros(n, dtype=np.bool_),
            pixels=[b""] * n,
            phash=np.zeros(n, dtype=np.uint64),
            phash_flip=np.zeros(n, dtype=np.uint64),
            thumbnails=np.zeros((n, _THUMBNAIL_BYTES), dtype=np.uint8),
            faults=[],
        )

    @classmethod
    def joined(cls, looks: Sequence[ScanResult]) -> ScanResult:
        """Several ranges as one."""
        whole = cls.blank(0)
        for name in (each.name for each in fields(cls) if each.name != "faults"):
            parts = [getattr(look, name) for look in (whole, *looks)]
            joined = (
                [value for part in parts for value in part] if isinstance(parts[0], list) else np.concatenate(parts)
            )
            setattr(whole, name, joined)
        start = 0
        for look in looks:
            whole.faults += [(start + i, check, text) for i, check, text in look.faults]
            start += len(look.sha256)
        return whole


@dataclass(frozen=True)
class ScanJob:
    """Look at a range of samples of one shard.

    Attributes:
        places: of the samples, as in `Walk`.
        limits: for the decoder; None leaves pixels alone.
        only: when not None, decode just these keys.
        crashed: keys that are known to kill the decoder.
    """

    folder: Path
    shard: str
    keys: Sequence[str]
    places: npt.NDArray[np.int64]
    limits: codec.Limits | None
    only: tuple[str, ...] | None = None
    crashed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"looking at {self.shard} from byte {self.places[0, 3, 0]}"

    def probe(self, keys: Sequence[str]) -> ScanJob:
        """The same decodes for some keys."""
        return replace(self, only=tuple(keys))

    def without(self, keys: Sequence[str]) -> ScanJob:
        """The job with some keys recorded as crashing."""
        return replace(self, crashed=(*self.crashed, *keys))

    def run(self) -> ScanResult:
        """Look at all."""
        look = ScanResult.blank(len(self.keys))
        with (self.folder / self.shard).open("rb") as file:
            for i, key in enumerate(self.keys):
                if self.only is not None and key not in self.only:
                    continue
                image, label, described, _ = self.places[i].tolist()
                self._label(look, i, _read(file, label, "cls"))
                self._json(look, i, _read(file, described, "json"))
                content = _read(file, image, "")
                look.sha256[i] = hashlib.sha256(content or b"").digest()
                if self.limits is not None and content is not None:
                    self._decode(look, i, content, self.limits)
        return look

    def _label(self, look: ScanResult, i: int, content: bytes | None) -> None:
        text = (content or b"").strip()
        if text.isdigit() and len(text) < 10:
            look.labels[i] = int(text)
        else:
            look.faults.append((i, "labels", f"its cls {text[:20]!r} is no class id"))

    def _json(self, look: ScanResult, i: int, content: bytes | None) -> None:
        try:
            described = json.loads(content or b"")
        except (ValueError, RecursionError):
            described = None
        if not isinstance(described, dict):
            look.faults.append((i, "labels", "its json is no JSON object"))
            return
        look.json_fields[i] = f"{{{', '.join(f'{name} {_kind(value)}' for name, value in described.items())}}}"
        label = described.get("label")
        look.json_labels[i] = label if type(label) is int and 0 <= label < 10**9 else -1
        look.json_names[i], look.json_splits[i] = str(described.get("name", "")), str(described.get("split", ""))

    def _decode(self, look: ScanResult, i: int, content: bytes, limits: codec.Limits) -> None:
        if self.keys[i] in self.crashed:
            look.faults.append((i, "decode", "its image kills the decoder"))
            return
        try:
            image = codec.decode(content, limits).image
        except codec.RejectedImageError as error:
            look.faults.append((i, "decode", f"its image does not decode ({error})"))
            return
        look.decoded[i] = True
        look.pixels[i] = hashing.of_pixels(image)
        look.phash[i], look.phash_flip[i], thumbnail, _ = compute_features(image)
        look.thumbnails[i] = np.frombuffer(thumbnail, dtype=np.uint8)


def _read(file: IO[bytes], place: list[int], kind: str) -> bytes | None:
    """The bytes of a member, None when it is missing or far larger than its kind can be."""
    offset, size = place
    if offset < 0 or size > _MAX_BYTES.get(kind, size):
        return None
    file.seek(offset)
    return file.read(size)


def _kind(value: Any) -> str:
    """The type that a reader would infer: lists by their first entry."""
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else "empty list"
    return type(value).__name__


@dataclass
class Contents:
    """All samples of the shards that could be read, column by column.

    Attributes:
        walks: by shard, in order.
        look: what the samples say.
        keys: of each sample.
        shards: that each lies in.
        splits: of that shard.
        fields: names of each sample's members joined by commas.
        places: offset and size of the image, then of the whole sample.
        unread: shards that could not be read to their end.
    """

    walks: dict[str, Walk]
    look: ScanResult
    keys: list[str]
    shards: list[str]
    splits: list[str]
    fields: list[str]
    places: list[tuple[int, int, int, int]]
    unread: set[str]

    def where(self, i: int) -> str:
        """What to call a sample in a sentence."""
        return f"sample {self.keys[i]} in {self.shards[i]}"


def read(dataset: Dataset, engine: Executor, limits: codec.Limits | None, progress: Progress) -> Contents:
    """Walk every shard that `dataset.json` lists, then look at every sample.

    Args:
        dataset: whose shards.
        engine: runs the jobs.
        limits: for the decoder; None leaves pixels alone.
        progress: told what happens.
    """
    split_of = {shard.path: split.name for split in dataset.splits.values() for shard in split.shards}
    found: dict[str, Walk] = {}
    progress.started("shards", None)
    engine.run(
        [WalkJob(dataset.path, shard, dataset.image_field) for shard in split_of],
        lambda job, walk: found.update({walk.shard: walk}),
    )
    progress.finished("shards")
    walks = {shard: found[shard] for shard in split_of}
    jobs = [
        ScanJob(dataset.path, shard, walk.keys[start:end], walk.places[start:end], limits)
        for shard, walk in walks.items()
        for start in range(0, len(walk.keys), RANGE_SAMPLES)
        for end in [start + RANGE_SAMPLES]
    ]
    looks: dict[str, ScanResult] = {}

    def finished(job: Any, look: ScanResult) -> None:
        looks[job.name] = look
        progress.advanced(len(job.keys))

    progress.started("samples", sum(len(job.keys) for job in jobs))
    engine.run(jobs, finished)
    progress.finished("samples")
    whole = [(walk, i) for walk in walks.values() for i in range(len(walk.keys))]
    return Contents(
        walks,
        ScanResult.joined([looks[job.name] for job in jobs]),
        [walk.keys[i] for walk, i in whole],
        [walk.shard for walk, _ in whole],
        [split_of[walk.shard] for walk, _ in whole],
        [walk.fields[i] for walk, i in whole],
        [
            (image[0], image[1], start, size)
            for walk in walks.values()
            for image, _, _, (start, size) in walk.places.tolist()
        ],
        {shard for shard, walk in walks.items() if walk.damage},
    )
