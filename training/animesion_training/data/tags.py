"""Tags of the samples of a built dataset as targets of training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from animesion.dataset.tags import Assigned, Vocabulary, read_assigned, read_vocabulary
from animesion.errors import UsageError
from animesion.schemas import TAG_CATEGORIES
from animesion_training.data.seeds import IntArray


@dataclass(frozen=True, eq=False)
class TagLabels:
    """The tags of all splits.

    Attributes:
        names: names of the T tags; those of a category are next to each other.
        categories: category of each.
        assigned: ids of the tags of the samples by split, in the order of the split.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    assigned: Mapping[str, Assigned]

    def __len__(self) -> int:
        return len(self.names)

    def counts(self, split: str) -> IntArray:
        """Count the samples of a split with each tag, shape (T,)."""
        return self.assigned[split].totals(len(self))

    def only(self, categories: Sequence[str]) -> TagLabels:
        """Return the tags of some categories.

        Raises:
            UsageError: none of the tags is in one.
        """
        names = [name for name, category in zip(self.names, self.categories, strict=True) if category in categories]
        if not names:
            there = ", ".join(dict.fromkeys(self.categories))
            raise UsageError(f"tags.categories: the data has no tags in {', '.join(categories)}; it has {there}")
        return self.named(names)

    def named(self, names: Sequence[str]) -> TagLabels:
        """Return these tags in this order, as those of trained weights; tags that the data does not have are never set.

        Raises:
            UsageError: the data has none of them.
        """
        ids = {name: i for i, name in enumerate(names)}
        places = np.array([ids.get(name, -1) for name in self.names], dtype=np.int32)
        if not (places >= 0).any():
            raise UsageError("the data has none of the tags that the weights were trained on: use other data")
        own = dict(zip(self.names, self.categories, strict=True))
        categories = tuple(own.get(name, "") for name in names)
        return TagLabels(
            tuple(names), categories, {split: _moved(each, places) for split, each in self.assigned.items()}
        )


def _moved(assigned: Assigned, places: npt.NDArray[np.int32]) -> Assigned:
    """The tags by their new ids, without those whose new id is -1."""
    ids = places[assigned.ids]
    row = np.repeat(np.arange(len(assigned)), assigned.counts())[ids >= 0]
    ids = ids[ids >= 0]
    order = np.lexsort((ids, row))
    return Assigned(ids[order], np.cumsum(np.bincount(row, minlength=len(assigned))).astype(np.int64))


def read_tags(folder: Path, keys: pa.ChunkedArray, rows: Mapping[str, IntArray]) -> TagLabels:
    """Read the tags of a built dataset.

    Args:
        folder: of the dataset.
        keys: of its samples.
        rows: rows of the samples of each split.

    Raises:
        UsageError: it has no tags, or they are damaged.
    """
    vocabulary: Vocabulary = read_vocabulary(folder)
    every = read_assigned(folder, keys, len(vocabulary))
    return TagLabels(vocabulary.names, vocabulary.categories, {name: every.take(each) for name, each in rows.items()})


def category_counts(categories: Sequence[str]) -> dict[str, int]:
    """Number of tags by category, in the order of `TAG_CATEGORIES`, which is that of the tags."""
    return {name: categories.count(name) for name in TAG_CATEGORIES if name in categories}


class TagTargets:
    """Makes the targets of a batch.

    Args:
        assigned: tags of the samples of a split.
        tags: T, number of tags.
        device: of the targets.
    """

    def __init__(self, assigned: Assigned, tags: int, device: torch.device | str = "cpu") -> None:
        self.tags = tags
        counts = assigned.counts()
        # padded by T, so that a batch is taken without waiting for the device
        table = np.full((len(assigned), max(1, int(counts.max(initial=0)))), tags, dtype=np.int32)
        table[
            np.repeat(np.arange(len(assigned)), counts),
            np.arange(len(assigned.ids)) - np.repeat(assigned.ends - counts, counts),
        ] = assigned.ids
        self._table = torch.from_numpy(table).to(device)

    def __call__(self, indices: Tensor) -> Tensor:
        """Return the targets of samples at these positions (B,) in the split: float32 (B, T) of zeros and ones."""
        ids = self._table[indices.to(self._table.device)].long()
        return torch.zeros(len(indices), self.tags + 1, device=ids.device).scatter_(1, ids, 1.0)[:, :-1]
