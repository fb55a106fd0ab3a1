"""The samples of a split as arrays with one thread-safe `read`, and a set of splits with its class map.

How they are found on disk is left to `sources`, the bytes to `files`, decoding to `decode`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from animesion.errors import UsageError
from animesion_training.data import seeds
from animesion_training.data.files import Files
from animesion_training.data.seeds import IntArray


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a split.

    Attributes:
        split: its name.
        labels: class ids, shape (N,), int64.
        files: which file each lies in, shape (N,), int64.
        offsets: where in the file, bytes, shape (N,), int64.
        sizes: bytes, shape (N,), int64; -1 for the whole file.
        keys: unique names, as long as the arrays.
        source: the files.
        digests: SHA-256 of each, shape (N, 32), uint8; None when not known. A sample is checked when first read.
        remote: whether files are fetched whole before they are read.
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
    _sound: bytearray = field(default_factory=bytearray, repr=False)

    def __post_init__(self) -> None:
        self._sound.extend(bytes(len(self.labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int, *, checked: bool = False) -> bytes | memoryview:
        """The bytes of a sample's image. Thread-safe.

        Args:
            i: position in the split.
            checked: the file was just checked, so that a sample found sound before need not be copied.

        Raises:
            UsageError: the file cannot be read, is too short, or holds other bytes than the index says.
        """
        file, offset, size = int(self.files[i]), int(self.offsets[i]), int(self.sizes[i])
        try:
            content = (self.source.view if checked and self._sound[i] else self.source.read)(file, offset, size)
        except OSError as error:
            why = (error.strerror or str(error) or "read error").lower()
            raise UsageError(f"cannot read {self.place(i)} ({why}): put the file back") from None
        if size >= 0 and len(content) != size:
            raise UsageError(f"{self.place(i)} is cut off: the file is too short; copy it again or rebuild the dataset")
        if self.digests is not None and not self._sound[i]:
            if hashlib.sha256(content).digest() != self.digests[i].tobytes():
                raise UsageError(
                    f"{self.place(i)} holds other bytes than the index says; copy the file again or rebuild the dataset"
                )
            self._sound[i] = 1
        return content

    def place(self, i: int) -> str:
        """A sample's key and file, for messages."""
        name = self.source.name(int(self.files[i]))
        return f"sample {self.keys[i]} in {name}" if self.sizes[i] >= 0 else name

    def check(self, indices: IntArray | None = None) -> None:
        """Compare the lengths of files with the index, without reading them.

        Args:
            indices: check the files of these samples; of all by default.

        Raises:
            UsageError: one is missing or has another length.
        """
        self.source.check(np.unique(self.files if indices is None else self.files[indices]))

    def fingerprint(self) -> str:
        """Hex digest of what the samples are: keys and labels in their order."""
        digest = hashlib.sha256(self.labels.tobytes())
        digest.update("\n".join(self.keys).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Labelled images.

    Attributes:
        path: what was opened.
        classes: names by class id, the same for all splits.
        splits: samples by split name.
    """

    path: str
    classes: tuple[str, ...]
    splits: Mapping[str, Samples]

    @property
    def num_classes(self) -> int:
        """Classes in the map, whether or not they have samples."""
        return len(self.classes)

    def select(self, split: str) -> Samples:
        """The samples of a split.

        Raises:
            UsageError: there is no such split, or it is empty.
        """
        if split not in self.splits:
            raise UsageError(f"{self.path} has no split '{split}'; it has {', '.join(self.splits)}")
        if not len(self.splits[split]):
            raise UsageError(f"the split '{split}' of {self.path} is empty; choose another")
        return self.splits[split]


def divided(data: DataSplits, split: str, parts: Mapping[str, float], *, seed: int = 0) -> DataSplits:
    """Divide one split into several, class by class, for data that come without splits.

    Near-duplicates may land on both sides: a built dataset with a grouped split is the honest way to a test score.

    Args:
        data: the data.
        split: which split to divide.
        parts: shares by the new splits' names, such as `{"train": 0.8, "val": 0.1, "test": 0.1}`; they sum to 1.
        seed: another seed, another division; it depends on the samples' keys, not on their order.

    Raises:
        UsageError: no such split, or the shares do not sum to 1.
    """
    if not parts or min(parts.values()) < 0 or abs(sum(parts.values()) - 1) > 1e-6:
        raise UsageError(f"the shares {dict(parts)} are not positive numbers that sum to 1; correct them")
    whole = data.select(split)
    digests = [hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=7).digest() for key in whole.keys]
    identity = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.int64)
    order = np.lexsort((seeds.hashes(seed, seeds.DIVISION, 0, identity), whole.labels))
    counts = np.bincount(whole.labels)
    ranks = np.arange(len(order)) - (np.cumsum(counts) - counts)[whole.labels[order]]
    # the middle of a sample's rank: classes of one go where most of the weight is
    quantiles = (ranks + 0.5) / counts[whole.labels[order]]
    bounds = np.cumsum(list(parts.values()))[:-1]
    chosen = np.empty(len(order), dtype=np.int64)
    chosen[order] = np.searchsorted(bounds, quantiles, side="right")
    return DataSplits(
        data.path,
        data.classes,
        {name: _taken(whole, name, np.flatnonzero(chosen == i)) for i, name in enumerate(parts)},
    )


def _taken(samples: Samples, split: str, rows: IntArray) -> Samples:
    return Samples(
        split,
        samples.labels[rows],
        samples.files[rows],
        samples.offsets[rows],
        samples.sizes[rows],
        [samples.keys[i] for i in rows],
        samples.source,
        None if samples.digests is None else samples.digests[rows],
        samples.remote,
    )
