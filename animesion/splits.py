"""Assign images to train, val and test.

The strategies are `grouped` (the default: integer shares, hashed order, groups never cut, every class represented) and
`legacy-dafre` (the arithmetic of the published DAF:re split, kept for comparison). `animesion.pipeline.curate` defines
groups, and handles the trivial strategies `published` and `single`. Nothing here reads a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "val", "test")

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
        splits: one of `SPLITS` for each image, in the order of the images.
        notes: class id and one sentence, which starts with `class <id>:`, for each class whose groups do not allow the
            requested shares.
    """

    splits: list[str]
    notes: list[tuple[int, str]]


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


def legacy_dafre(classes: Sequence[int], order: Sequence[int]) -> Assignment:
    """Split in file order: the head of each class to train, the middle to val, the tail to test; ignores groups.

    Args:
        classes: class id of each image.
        order: position of each image in the source's own order.
    """
    splits = [""] * len(classes)
    for members in _by_class(classes).values():
        members.sort(key=lambda i: order[i])
        train, val, _ = legacy_dafre_sizes(len(members))
        for rank, i in enumerate(members):
            splits[i] = "train" if rank < train else "val" if rank < train + val else "test"
    return Assignment(splits, [])


def grouped(
    classes: Sequence[int],
    groups: Sequence[str],
    percents: tuple[int, int, int],
    seed: int = 0,
    fixed: Mapping[str, str] | None = None,
) -> Assignment:
    """Split without cutting a group, as close to the shares as the groups allow, with every class in every split.

    Groups are placed one at a time: first those that span classes, then larger before smaller ones, then by the hash of
    their name. Each group goes to the split where the classes of its images are furthest below their target. Groups of
    one image come last and fill the remaining quotas exactly.

    Args:
        classes: class id of each image.
        groups: name of the group each image belongs to; a group may span classes.
        percents: integer shares of train, val and test; they add up to 100.
        seed: seed of the hashes; another seed gives another split.
        fixed: split by name of groups that are already placed; the other groups fill the rest of the shares.
    """
    fixed = fixed or {}
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    totals = {c: len(ids) for c, ids in _by_class(classes).items()}
    # Shape (3,) for each class: images still missing in each split, and images wanted in total.
    need = {c: np.array(grouped_sizes(n, percents), dtype=np.int64) for c, n in totals.items()}
    targets = {c: sizes.copy() for c, sizes in need.items()}
    spans = {name: len({classes[i] for i in ids}) for name, ids in members.items()}
    # Groups that span classes or are large have the fewest splits that fit them, so they choose first.
    queue = sorted(
        members, key=lambda name: (name not in fixed, -spans[name], -len(members[name]), hashed_order(seed, name))
    )
    splits = [""] * len(classes)
    placed = {c: np.zeros(3, dtype=np.int64) for c in totals}
    for name in queue:
        ids = members[name]
        choice = SPLITS.index(fixed[name]) if name in fixed else _best_split([classes[i] for i in ids], need, targets)
        for i in ids:
            splits[i] = SPLITS[choice]
            need[classes[i]][choice] -= 1
            placed[classes[i]][choice] += 1
    free = {name: ids for name, ids in members.items() if name not in fixed}
    _represent_every_class(classes, free, splits, targets, placed, seed)
    return Assignment(splits, _notes(targets, placed))


def _by_class(classes: Sequence[int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for i, c in enumerate(classes):
        members.setdefault(c, []).append(i)
    return members


def _best_split(
    of_class: Sequence[int],
    need: Mapping[int, npt.NDArray[np.int64]],
    targets: Mapping[int, npt.NDArray[np.int64]],
) -> int:
    """Index of the split with the most room for a group, or of the split whose targets it exceeds least.

    Args:
        of_class: class id of each image of the group.
        need: images still missing by class, shape (3,) each; negative if a target is exceeded.
        targets: wanted images by class, shape (3,) each.
    """
    counts: dict[int, int] = {}
    for c in of_class:
        counts[c] = counts.get(c, 0) + 1
    best, best_score = 0, (float("-inf"), float("-inf"))
    for s in range(3):
        # First by the number of images over the targets (0 if the group fits), then by the share that is still empty.
        excess = sum(max(0, n - int(need[c][s])) for c, n in counts.items())
        room = sum(n * int(need[c][s]) / max(1, int(targets[c][s])) for c, n in counts.items())
        score = (-float(excess), room)
        if score > best_score:
            best, best_score = s, score
    return best


def _represent_every_class(
    classes: Sequence[int],
    members: Mapping[str, list[int]],
    splits: list[str],
    targets: Mapping[int, npt.NDArray[np.int64]],
    placed: Mapping[int, npt.NDArray[np.int64]],
    seed: int,
) -> None:
    """Move the smallest suitable group into each split that has a target but no image of a class, in place."""
    of_class: dict[int, list[str]] = {}
    for name, ids in members.items():
        for c in {classes[i] for i in ids}:
            of_class.setdefault(c, []).append(name)
    for c in sorted(targets):
        for s in (0, 1, 2):
            if targets[c][s] == 0 or placed[c][s] > 0:
                continue
            # The smallest group first, as moving it changes the shares least.
            candidates = sorted(of_class.get(c, ()), key=lambda name: (len(members[name]), hashed_order(seed, name)))
            for name in candidates:
                ids = members[name]
                source = SPLITS.index(splits[ids[0]])
                moved = {k: sum(1 for i in ids if classes[i] == k) for k in {classes[i] for i in ids}}
                # The move must not empty the split that the group leaves, for any class of the group.
                if source != s and all(placed[k][source] > n or targets[k][source] == 0 for k, n in moved.items()):
                    for i in ids:
                        splits[i] = SPLITS[s]
                        placed[classes[i]][source] -= 1
                        placed[classes[i]][s] += 1
                    break


def _notes(
    targets: Mapping[int, npt.NDArray[np.int64]], placed: Mapping[int, npt.NDArray[np.int64]]
) -> list[tuple[int, str]]:
    notes = []
    for c in sorted(targets):
        off = placed[c] - targets[c]
        if np.abs(off).max() > 1:
            wanted, got = "/".join(map(str, targets[c])), "/".join(map(str, placed[c]))
            notes.append((c, f"class {c}: train/val/test is {got} instead of {wanted}, as its groups cannot be cut"))
    return notes
