"""Assign images to train, val and test.

The strategies are `grouped` (the default: integer shares, hashed order, groups never cut, every class represented),
`by-class` (each class in one split, to test on classes that training has not seen) and `legacy-dafre` (the arithmetic
of the published DAF:re split, kept for comparison). `animesion.pipeline.curate` defines groups, and handles the trivial
strategies `published` and `single`. Nothing here reads a file.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

SPLITS = ("train", "val", "test")

#: Class ids, or other numbers, of images.
Classes = Sequence[int] | npt.NDArray[np.int64]

#: Names that are hashed at once.
_BATCH = 65_536

#: Name of a split as folders and tables have it, in lower case -> the split.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Assignment:
    """The result of a split.

    Attributes:
        choices: place in `SPLITS` of the split of each image, in the order of the images, shape (n,).
        notes: class id and one sentence, which starts with `class <id>:`, for each class whose groups do not allow the
            requested shares.
    """

    choices: npt.NDArray[np.int8]
    notes: list[tuple[int, str]]

    @property
    def splits(self) -> list[str]:
        """The split of each image."""
        return [SPLITS[choice] for choice in self.choices.tolist()]


def legacy_dafre_sizes(n: int) -> tuple[int, int, int]:
    """Sizes of train, val and test for a class of `n` images in the published DAF:re split.

    The float arithmetic is the original's: `0.7 + 0.1` is just under 0.8, so multiples of ten lose one image to the
    test split (n = 100 gives 70, 10, 20 but n = 20 gives 14, 1, 5). Source: DAF:re (arXiv 2101.08674), label files.
    """
    trainval = int(n * (0.7 + 0.1))
    train = int(n * 0.7)
    return train, trainval - train, n - trainval


def grouped_sizes(n: int, percents: tuple[int, int, int]) -> tuple[int, int, int]:
    """Target sizes of train, val and test for a class of `n` images, in integer arithmetic.

    Val and test get their share rounded down, but at least one image each if their share is not zero; train gets the
    rest. Train comes first in small classes: the only image of a class is in train, and a class of two images has one
    in train and one in val (in test if val has no share).

    Args:
        n: images in the class, at least 0.
        percents: integer shares of train, val and test; they add up to 100.
    """
    _, val_share, test_share = percents
    val = max(1, n * val_share // 100) if val_share else 0
    test = max(1, n * test_share // 100) if test_share else 0
    if n <= 2:
        val = min(val, max(0, n - 1))
        test = min(test, max(0, n - 1) - val)
    # At least one image stays in train, as a class without training images cannot be tested.
    while n and val + test >= n:
        val, test = (val - 1, test) if val >= test else (val, test - 1)
    return n - val - test, val, test


def hashed_order(seed: int, text: str) -> bytes:
    """A sort key that shuffles texts in the same way on every machine."""
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:16]


def legacy_dafre(classes: Classes, order: Classes) -> Assignment:
    """Split in file order: the head of each class to train, the middle to val, the tail to test; ignores groups.

    Args:
        classes: class id of each image.
        order: position of each image in the source's own order.
    """
    of_image = np.asarray(classes, dtype=np.int64)
    queue = np.lexsort((np.asarray(order, dtype=np.int64), of_image))
    _, firsts, totals = np.unique(of_image[queue], return_index=True, return_counts=True)
    choices = np.empty(len(queue), dtype=np.int8)
    for first, total in zip(firsts.tolist(), totals.tolist(), strict=True):
        choices[queue[first : first + total]] = np.repeat(np.arange(3, dtype=np.int8), legacy_dafre_sizes(total))
    return Assignment(choices, [])


def grouped(
    classes: Classes,
    groups: Sequence[str] | pa.DictionaryArray,
    percents: tuple[int, int, int],
    seed: int = 0,
    fixed: Mapping[str, str] | None = None,
) -> Assignment:
    """Split without cutting a group, as close to the shares as the groups allow, with every class in every split.

    Groups are placed one at a time: first those that span classes, then larger before smaller ones, then by the hash of
    their name. Each group goes to the split where the classes of its images are furthest below their target. Groups of
    one image come last and fill the remaining quotas exactly.

    Memory is about 150 bytes per image.

    Args:
        classes: class id of each image, at least 0.
        groups: name of the group each image belongs to; a group may span classes.
        percents: integer shares of train, val and test; they add up to 100.
        seed: seed of the hashes; another seed gives another split.
        fixed: split by name of groups that are already placed; the other groups fill the rest of the shares.
    """
    of_image = np.asarray(classes, dtype=np.int64)
    encoded = groups if isinstance(groups, pa.DictionaryArray) else pa.array(groups, pa.string()).dictionary_encode()
    work = _Groups(of_image, encoded, percents, seed, fixed or {})
    work.place()
    work.represent_every_class()
    return Assignment(work.choices, _notes(work.targets, work.placed))


def by_class(
    classes: Sequence[str],
    groups: Sequence[str],
    percents: tuple[int, int, int],
    seed: int = 0,
    fixed: Mapping[str, str] | None = None,
) -> list[str]:
    """Split by class: all images of a class are in one split, so that no class of val or test is trained on.

    The shares are of classes, rounded as in `grouped_sizes`. Classes are taken in the order of the hashes of their
    names: val first, then test, the rest is train. A group may span classes of several splits, such as the faces in one
    illustration. It stays in the split that has most of its images (test before val before train among equals), and
    its images of the other splits are left out: they would be seen in training and in a test.

    Args:
        classes: class name of each image.
        groups: name of the group each image belongs to.
        percents: integer shares of train, val and test; they add up to 100.
        seed: seed of the hashes; another seed gives another split.
        fixed: split by name of classes that are already placed; the others fill the rest of the shares.

    Returns:
        One of `SPLITS` for each image, in the order of the images; empty for those that are left out.
    """
    names = set(classes)
    placed = {name: split for name, split in (fixed or {}).items() if name in names}
    free = sorted(names - placed.keys(), key=lambda name: hashed_order(seed, name))
    counts = list(placed.values())
    _, val, test = (
        max(0, size - counts.count(split))
        for split, size in zip(SPLITS, grouped_sizes(len(names), percents), strict=True)
    )
    split_of = placed | {
        name: "val" if i < val else "test" if i < val + test else "train" for i, name in enumerate(free)
    }
    home: dict[str, str] = {}
    for group, images in _tally(groups, [split_of[name] for name in classes]).items():
        home[group] = max(SPLITS, key=lambda split: (images.get(split, 0), SPLITS.index(split)))
    return [
        split_of[name] if home[group] == split_of[name] else "" for name, group in zip(classes, groups, strict=True)
    ]


def _tally(groups: Sequence[str], split: Sequence[str]) -> dict[str, dict[str, int]]:
    """Images of each group by split."""
    images: dict[str, dict[str, int]] = {}
    for group, name in zip(groups, split, strict=True):
        counts = images.setdefault(group, {})
        counts[name] = counts.get(name, 0) + 1
    return images


def _by_class(classes: Sequence[int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for i, c in enumerate(classes):
        members.setdefault(c, []).append(i)
    return members


def _best_split(
    counts: Mapping[int, int], need: Mapping[int, Sequence[int]], targets: Mapping[int, Sequence[int]]
) -> int:
    """Index of the split with the most room for a group, or of the split whose targets it exceeds least.

    Args:
        counts: number of images of the group by class.
        need: images still missing by class, for each split; negative if a target is exceeded.
        targets: wanted images by class, for each split.
    """
    best, best_score = 0, (float("-inf"), float("-inf"))
    for s in range(3):
        # First by the number of images over the targets (0 if the group fits), then by the share that is still empty.
        excess = sum(max(0, n - need[c][s]) for c, n in counts.items())
        room = sum(n * need[c][s] / max(1, targets[c][s]) for c, n in counts.items())
        score = (-float(excess), room)
        if score > best_score:
            best, best_score = s, score
    return best


def _notes(targets: Mapping[int, Sequence[int]], placed: Mapping[int, Sequence[int]]) -> list[tuple[int, str]]:
    notes = []
    for c in sorted(targets):
        if max(abs(got - wanted) for got, wanted in zip(placed[c], targets[c], strict=True)) > 1:
            wanted, got = "/".join(map(str, targets[c])), "/".join(map(str, placed[c]))
            notes.append((c, f"class {c}: train/val/test is {got} instead of {wanted}, as its groups cannot be cut"))
    return notes
