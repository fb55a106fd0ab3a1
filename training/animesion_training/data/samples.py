"""The samples of a split as arrays with a thread-safe `read`, and the splits of a dataset with their class map.

`sources` finds samples on disk, `files` reads bytes, `decode` decodes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from animesion.errors import UsageError
from animesion_training.data import seeds
from animesion_training.data.files import Files
from animesion_training.data.seeds import IntArray
from animesion_training.data.tags import TagLabels

#: Bytes from which on the interpreter lock is released to hash them: 10 microseconds.
_LONG = 2**14


class Part(NamedTuple):
    """Number of samples of one dataset in a blend, and how many an epoch draws; see `animesion_training.data.blend`."""

    samples: int
    draws: int


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a split.

    Attributes:
        split: name of the split.
        labels: class ids, shape (N,), int64.
        files: number of the file that contains each sample, shape (N,), int64.
        offsets: offsets in the file in bytes, shape (N,), int64.
        sizes: sizes in bytes, shape (N,), int64; -1 for the whole file.
        keys: unique names, N of them.
        source: the files.
        digests: SHA-256 of each, shape (N, 32), uint8; None when unknown. A sample is verified when first read.
        remote: whether files are downloaded before they are read.
        blocks: the block of each sample, shape (N,), int64, see `animesion_training.data.blocks`; by default a file.
        parts: of the datasets that are blended, in the order of the samples; none for one dataset.
    """

    split: str
    labels: IntArray
    files: IntArray
    offsets: IntArray
    sizes: IntArray
    keys: Sequence[str]
    source: Files
    digests: npt.NDArray[np.uint8] | None = None
    remote: bool = False
    blocks: IntArray = None  # type: ignore[assignment]
    parts: tuple[Part, ...] = ()
    _verified: bytearray = field(default_factory=bytearray, repr=False)
    #: Width and height of verified plain JPEGs, (N, 2), 0 while unknown: their headers are read once.
    plain: npt.NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", np.zeros((len(self.labels), 2), dtype=np.int32))
        self._verified.extend(bytes(len(self.labels)))
        if self.blocks is None:
            object.__setattr__(self, "blocks", self.files)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def draws(self) -> int:
        """Number of samples in an epoch of training."""
        return sum(part.draws for part in self.parts) or len(self)

    def read(self, i: int, *, checked: bool = False) -> bytes | memoryview:
        """Read the image file of a sample. Thread-safe.

        Args:
            i: position in the split.
            checked: whether `check` has just accepted the file, so that a verified sample need not be copied.

        Raises:
            UsageError: the file cannot be read, is too short, or its content differs from the index.
        """
        return self.read_at(i, int(self.files[i]), int(self.offsets[i]), int(self.sizes[i]), checked=checked)

    def read_at(self, i: int, file: int, offset: int, size: int, *, checked: bool) -> bytes | memoryview:
        """See `read`, for a sample whose `files`, `offsets` and `sizes` are known: single ones are slow to look up."""
        # blocks of remote files are in memory, local ones may have to be read from the disk: with the lock released
        read = self.source.view if checked and (self.remote or self._verified[i]) else self.source.read
        try:
            content = read(file, offset, size)
        except OSError as error:
            reason = (error.strerror or str(error) or "read error").lower()
            raise UsageError(
                f"cannot read {self.place(i)} ({reason}): restore the file; "
                "--images is the root of the paths in label CSVs"
            ) from None
        if size >= 0 and len(content) != size:
            raise UsageError(f"{self.place(i)} is truncated: copy the file again or rebuild the dataset")
        if self.digests is not None and not self._verified[i]:
            if not self._intact(i, content):
                if self.source.discard(file, offset):  # a damaged copy in a cache
                    content = self.source.read(file, offset, size)
                if not self._intact(i, content):
                    raise UsageError(
                        f"{self.place(i)} differs from its digest in the index: copy the file again or rebuild the "
                        "dataset"
                    )
            self._verified[i] = 1
        return content

    def _intact(self, i: int, content: bytes | memoryview) -> bool:
        assert self.digests is not None
        expected: bytes = self.digests[i].tobytes()
        return _sha256(content) == expected

    def place(self, i: int) -> str:
        """Return the key and file of a sample, for messages."""
        name = self.source.name(int(self.files[i]))
        return f"sample {self.keys[i]} in {name}" if self.sizes[i] >= 0 else name

    def check(self, indices: IntArray | None = None) -> None:
        """Compare the lengths of files with the index, without reading them.

        Args:
            indices: samples whose files are checked; all by default.

        Raises:
            UsageError: a file is missing or has another length.
        """
        self.source.check(np.unique(self.files if indices is None else self.files[indices]))

    def fingerprint(self) -> str:
        """Compute a hex digest of keys and labels in their order, and of the bytes if their digests are known."""
        digest = hashlib.sha256(self.labels.tobytes())
        if self.digests is not None:
            digest.update(np.ascontiguousarray(self.digests).tobytes())
        digest.update("\n".join(self.keys).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class DataSplits:
    """The splits of labelled images.

    Attributes:
        path: path or URL that was opened.
        classes: names by class id, the same for all splits.
        splits: samples by split name.
        tags: tags of the samples; None if they were not asked for.
    """

    path: str
    classes: tuple[str, ...]
    splits: Mapping[str, Samples]
    tags: TagLabels | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes in the map, with or without samples."""
        return len(self.classes)

    def select(self, split: str) -> Samples:
        """Return the samples of a split.

        Raises:
            UsageError: an unknown or empty split.
        """
        if split not in self.splits:
            raise UsageError(f"{self.path} has no split '{split}'; it has {', '.join(self.splits)}")
        if not len(self.splits[split]):
            raise UsageError(f"the split '{split}' of {self.path} is empty; choose another")
        return self.splits[split]


def _sha256(content: bytes | memoryview) -> bytes:
    if len(content) > _LONG:
        return hashlib.sha256(content).digest()
    # hashlib releases the interpreter lock for 2,048 bytes or more at a time; to get it back from the other threads
    # takes longer than to hash a small image
    pieces, digest = memoryview(content), hashlib.sha256()
    for start in range(0, len(content), 2047):
        digest.update(pieces[start : start + 2047])
    return digest.digest()


def divide_split(data: DataSplits, split: str, parts: Mapping[str, float], *, seed: int = 0) -> DataSplits:
    """Divide one split into several, stratified by class, for data without splits.

    Near-duplicates may end up in different splits; for reliable test scores, build a dataset with a grouped split.

    Args:
        data: the data.
        split: the split to divide.
        parts: shares by name of the new splits, such as `{"train": 0.8, "val": 0.1, "test": 0.1}`; they sum to 1.
        seed: of the division, which depends on the keys of the samples and not on their order.

    Raises:
        UsageError: an unknown split, or shares that do not sum to 1.
    """
    if not parts or min(parts.values()) < 0 or abs(sum(parts.values()) - 1) > 1e-6:
        raise UsageError(f"the shares {dict(parts)} are not positive numbers that sum to 1; correct them")
    whole = data.select(split)
    digests = [hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=7).digest() for key in whole.keys]
    # hashes of keys, so that a division does not depend on the order of samples
    identity = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.int64)
    order = np.lexsort((seeds.hashes(seed, seeds.DIVISION, 0, identity), whole.labels))
    counts = np.bincount(whole.labels)
    # rank of each sample within its class, in the order of the hashes
    ranks = np.arange(len(order)) - (np.cumsum(counts) - counts)[whole.labels[order]]
    # the middle of the rank, so that a class with one sample joins the part that covers the median
    quantiles = (ranks + 0.5) / counts[whole.labels[order]]
    bounds = np.cumsum(list(parts.values()))[:-1]
    part_of = np.empty(len(order), dtype=np.int64)
    part_of[order] = np.searchsorted(bounds, quantiles, side="right")
    return DataSplits(
        data.path,
        data.classes,
        {name: take(whole, name, np.flatnonzero(part_of == i)) for i, name in enumerate(parts)},
    )


def take(samples: Samples, split: str, rows: IntArray, labels: IntArray | None = None) -> Samples:
    """Return some samples of a split as a split of their own, without `parts`; `labels`, (N,), replaces all labels."""
    return Samples(
        split,
        (samples.labels if labels is None else labels)[rows],
        samples.files[rows],
        samples.offsets[rows],
        samples.sizes[rows],
        [samples.keys[i] for i in rows],
        samples.source,
        None if samples.digests is None else samples.digests[rows],
        samples.remote,
        samples.blocks[rows],
    )
