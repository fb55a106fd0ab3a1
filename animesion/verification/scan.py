"""Read finished shards back in worker processes: walk and digest each shard, then scan every sample.

The result is the content of the shards as compact arrays. `animesion.verification.checks` compares it with the tables.
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
from PIL import ImageOps

from animesion.dataset import shards, tags
from animesion.dedup.hashes import ImageHashes
from animesion.images import codec, hashing, local_features, other_hashes
from animesion.images.features import compute_features
from animesion.images.windows import window_phashes
from animesion.schemas import THUMBNAIL_SIDE
from animesion.storage.workspace import sha256_file

if TYPE_CHECKING:  # workers import this module: unused imports would slow down the start of each
    from animesion.dataset.dataset import Dataset
    from animesion.executors import Executor
    from animesion.progress import Progress

#: Samples per job: a few seconds of work, a few megabytes of results.
RANGE_SAMPLES = 2_000

_THUMBNAIL_BYTES = THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3
# a class id has a few digits and a JSON member a few hundred bytes: larger members are not read into memory
_MAX_BYTES = {"cls": 64, "json": 1 << 20}


@dataclass
class Walk:
    """Members of a shard, without their content.

    Attributes:
        shard: path relative to the dataset.
        damage: message if the shard cannot be read to its end, else empty; a damaged shard has no samples.
        sha256: digest of the file, empty if it cannot be read.
        bytes: size of the file.
        keys: keys of the samples, in order.
        fields: names of each sample's members joined by commas, in order.
        places: shape (n, 4, 2), offset and size in bytes of image, cls and json (offset -1 if missing) and of the
            whole sample.
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
        """Name of the job in messages."""
        return f"reading {self.shard}"

    def run(self) -> Walk:
        """Walk the shard to its end marker."""
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
            # a sample reaches from its first tar header to the padding after its last member
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
    """Content of n samples, one entry per sample; -1 or an empty string if a value cannot be read.

    Attributes:
        sha256: digests of the images' bytes, 32 bytes each.
        labels: shape (n,), class ids of the `cls` members.
        json_labels: shape (n,), class ids of the JSON members.
        json_names: class names of the JSON members.
        json_splits: splits of the JSON members.
        json_tags: digests of the tags in the JSON members, see `tags.digest`; empty for a member without tags.
        json_fields: fields and types of the JSON members; empty if the member is not a JSON object.
        decoded: shape (n,), whether the image decoded.
        pixels: digests of the decoded pixels, 32 bytes each.
        phash: shape (n,), perceptual hashes of the decoded pixels.
        phash_flip: shape (n,), perceptual hashes of the mirror images.
        thumbnails: shape (n, 768).
        points: local features as bytes, see `animesion.images.local_features`; empty if they are not searched.
        windows: hashes of windows as bytes, likewise.
        hashes: hash of each image and of its mirror image by another algorithm than pHash; empty if none is searched.
        sizes: shape (n, 2), width and height of the images.
        faults: position of the sample, name of the check and message of each fault.
    """

    sha256: list[bytes]
    labels: npt.NDArray[np.int64]
    json_labels: npt.NDArray[np.int64]
    json_names: list[str]
    json_splits: list[str]
    json_tags: list[bytes]
    json_fields: list[str]
    decoded: npt.NDArray[np.bool_]
    pixels: list[bytes]
    phash: npt.NDArray[np.uint64]
    phash_flip: npt.NDArray[np.uint64]
    thumbnails: npt.NDArray[np.uint8]
    points: list[bytes]
    windows: list[bytes]
    hashes: list[tuple[bytes, bytes]]
    sizes: npt.NDArray[np.int64]
    faults: list[tuple[int, str, str]]

    @classmethod
    def blank(cls, n: int) -> ScanResult:
        """A result of n samples without values."""
        return cls(
            sha256=[b""] * n,
            labels=np.full(n, -1, dtype=np.int64),
            json_labels=np.full(n, -1, dtype=np.int64),
            json_names=[""] * n,
            json_splits=[""] * n,
            json_tags=[b""] * n,
            json_fields=[""] * n,
            decoded=np.zeros(n, dtype=np.bool_),
            pixels=[b""] * n,
            phash=np.zeros(n, dtype=np.uint64),
            phash_flip=np.zeros(n, dtype=np.uint64),
            thumbnails=np.zeros((n, _THUMBNAIL_BYTES), dtype=np.uint8),
            points=[b""] * n,
            windows=[b""] * n,
            hashes=[(b"", b"")] * n,
            sizes=np.zeros((n, 2), dtype=np.int64),
            faults=[],
        )

    def image_hashes(self, kind: str) -> ImageHashes:
        """Hashes of all samples, by pHash if `kind` is empty; other kinds have none of an image that did not decode."""
        if not kind:
            return ImageHashes.phashes(self.phash, self.phash_flip)
        return ImageHashes.of_kind(kind, *([pair[side] for pair in self.hashes] for side in (0, 1)))

    @classmethod
    def concatenate(cls, results: Sequence[ScanResult]) -> ScanResult:
        """Concatenate the results of several ranges."""
        whole = cls.blank(0)
        for name in (each.name for each in fields(cls) if each.name != "faults"):
            parts = [getattr(result, name) for result in (whole, *results)]
            joined = (
                [value for part in parts for value in part] if isinstance(parts[0], list) else np.concatenate(parts)
            )
            setattr(whole, name, joined)
        # positions of faults are relative to their range
        start = 0
        for result in results:
            whole.faults += [(start + i, check, text) for i, check, text in result.faults]
            start += len(result.sha256)
        return whole


@dataclass(frozen=True)
class ScanJob:
    """Scan a range of samples of one shard.

    Attributes:
        folder: folder of the dataset.
        shard: path relative to it.
        keys: keys of the n samples.
        places: shape (n, 4, 2), as in `Walk`.
        limits: limits of the decoder; None skips decoding.
        copies: how copies are searched: `local`, `hash` or `off`.
        hash_kind: another hash than pHash; empty for none.
        only: scan just these keys; None for all.
        crashed: keys whose image is known to crash the decoder.
    """

    folder: Path
    shard: str
    keys: Sequence[str]
    places: npt.NDArray[np.int64]
    limits: codec.Limits | None
    copies: str = "off"
    hash_kind: str = ""
    only: tuple[str, ...] | None = None
    crashed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the job in messages."""
        return f"scanning {self.shard} from byte {self.places[0, 3, 0]}"

    def probe(self, keys: Sequence[str]) -> ScanJob:
        """The job for some keys only."""
        return replace(self, only=tuple(keys))

    def without(self, keys: Sequence[str]) -> ScanJob:
        """The job with some keys recorded as crashing."""
        return replace(self, crashed=(*self.crashed, *keys))

    def run(self) -> ScanResult:
        """Scan the samples."""
        result = ScanResult.blank(len(self.keys))
        with (self.folder / self.shard).open("rb") as file:
            for i, key in enumerate(self.keys):
                if self.only is not None and key not in self.only:
                    continue
                image, label, described, _ = self.places[i].tolist()
                self._label(result, i, _read(file, label, "cls"))
                self._json(result, i, _read(file, described, "json"))
                content = _read(file, image, "")
                result.sha256[i] = hashlib.sha256(content or b"").digest()
                if self.limits is not None and content is not None:
                    self._decode(result, i, content, self.limits)
        return result

    def _label(self, result: ScanResult, i: int, content: bytes | None) -> None:
        text = (content or b"").strip()
        if text.isdigit() and len(text) < 10:
            result.labels[i] = int(text)
        else:
            result.faults.append((i, "labels", f"its cls {text[:20]!r} is not a class id"))

    def _json(self, result: ScanResult, i: int, content: bytes | None) -> None:
        try:
            described = json.loads(content or b"")
        except (ValueError, RecursionError):
            described = None
        if not isinstance(described, dict):
            result.faults.append((i, "labels", "its json is not a JSON object"))
            return
        result.json_fields[i] = f"{{{', '.join(f'{name} {_kind(value)}' for name, value in described.items())}}}"
        label = described.get("label")
        result.json_labels[i] = label if type(label) is int and 0 <= label < 10**9 else -1
        result.json_tags[i] = tags.digest(described["tags"]) if "tags" in described else b""
        result.json_names[i], result.json_splits[i] = str(described.get("name", "")), str(described.get("split", ""))

    def _decode(self, result: ScanResult, i: int, content: bytes, limits: codec.Limits) -> None:
        if self.keys[i] in self.crashed:
            result.faults.append((i, "decode", "its image crashes the decoder"))
            return
        try:
            image = codec.decode(content, limits).image
        except codec.RejectedImageError as error:
            result.faults.append((i, "decode", f"its image does not decode ({error})"))
            return
        result.decoded[i] = True
        result.pixels[i] = hashing.of_pixels(image)
        result.phash[i], result.phash_flip[i], thumbnail, _ = compute_features(image)
        result.thumbnails[i] = np.frombuffer(thumbnail, dtype=np.uint8)
        result.sizes[i] = image.size
        if self.copies == "local":
            result.points[i] = local_features.extract(image).tobytes()
        elif self.copies == "hash":
            result.windows[i] = window_phashes(image.convert("L")).tobytes()
        if kind := self.hash_kind:
            result.hashes[i] = other_hashes.compute(kind, image), other_hashes.compute(kind, ImageOps.mirror(image))


def _read(file: IO[bytes], place: list[int], kind: str) -> bytes | None:
    """The bytes of a member; None if it is missing or larger than any valid member of its kind."""
    offset, size = place
    if offset < 0 or size > _MAX_BYTES.get(kind, size):
        return None
    file.seek(offset)
    return file.read(size)


def _kind(value: Any) -> str:
    """The type that a reader would infer; for lists, from their first entry."""
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else "empty list"
    return type(value).__name__


@dataclass
class Contents:
    """All samples of the shards that could be read, column by column.

    Attributes:
        walks: shard -> its members, in order.
        result: content of the samples.
        keys: key of each sample.
        shards: shard of each sample.
        splits: split of that shard.
        fields: names of each sample's members joined by commas.
        places: offset and size of the image, then of the whole sample, in bytes.
        unread: shards that could not be read to their end.
    """

    walks: dict[str, Walk]
    result: ScanResult
    keys: list[str]
    shards: list[str]
    splits: list[str]
    fields: list[str]
    places: list[tuple[int, int, int, int]]
    unread: set[str]

    def where(self, i: int) -> str:
        """Description of a sample for messages."""
        return f"sample {self.keys[i]} in {self.shards[i]}"


def read(
    dataset: Dataset,
    engine: Executor,
    limits: codec.Limits | None,
    progress: Progress,
    copies: str = "off",
    hash_kind: str = "",
) -> Contents:
    """Walk every shard that `dataset.json` lists, then scan every sample.

    Args:
        dataset: dataset to read.
        engine: runs the jobs.
        limits: limits of the decoder; None skips decoding.
        progress: receives progress events.
        copies: how copies are searched: `local`, `hash` or `off`.
        hash_kind: another hash than pHash; empty for none.
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
    # jobs finish in any order: results are stored by the job's name and concatenated in the order of the jobs
    jobs = [
        ScanJob(dataset.path, shard, walk.keys[start:end], walk.places[start:end], limits, copies, hash_kind)
        for shard, walk in walks.items()
        for start in range(0, len(walk.keys), RANGE_SAMPLES)
        for end in [start + RANGE_SAMPLES]
    ]
    results: dict[str, ScanResult] = {}

    def finished(job: Any, result: ScanResult) -> None:
        results[job.name] = result
        progress.advanced(len(job.keys))

    progress.started("samples", sum(len(job.keys) for job in jobs))
    engine.run(jobs, finished)
    progress.finished("samples")
    # one entry per sample, in the order of the shards: the same order as the concatenated results
    whole = [(walk, i) for walk in walks.values() for i in range(len(walk.keys))]
    return Contents(
        walks,
        ScanResult.concatenate([results[job.name] for job in jobs]),
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
