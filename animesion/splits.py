"""Assign images to train, val and test.

Strategies: `grouped` (the default: integer shares, hashed order, groups never cut, every class represented),
`legacy-dafre` (the arithmetic of the published DAF:re split, kept for comparison), `published` (the source's own split)
and `single`. Everything here works on keys, classes and groups; nothing reads a file. What makes a group is decided in
`animesion.pipeline.curate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Assignment:
    """The outcome of a split.

    Attributes:
        splits: one of `SPLITS` for each image, in the order given.
        notes: class id and one sentence (that begins `class <id>:`) for each class whose shares could not be met
            because its groups do not allow it.
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

    Val and test get their share rounded down but at least one image each when their share is not zero; train gets
    the rest and is served first: a class of one image is all train, a class of two has one in train and one in val
    (in test when val has no share).

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
    # training comes first: a class that cannot be trained on is of no use in a test
    while n and val + test >= n:
        val, test = (val - 1, test) if val >= test else (val, test - 1)
    return n - val - test, val, test


def hashed_order(seed: int, text: str) -> bytes:
    """A sort key that shuffles texts the same way on every machine."""
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:16]


def legacy_dafre(classes: Sequence[int], order: Sequence[int]) -> Assignment:
    """Split in file order: head of each class to train, middle to val, tail to test; groups are not looked at.

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
    """Split so that no group is cut, shares are met as nearly as the groups allow and every class is represented.

    Groups are placed one at a time: first those that span classes, then larger before smaller, then by the hash of
    their name. Each goes to the split where the classes of its images are furthest below their target. Groups of one
    image come last and fill the remaining quotas exactly.

    Args:
        classes: class id of each image.
        groups: name of the group each image belongs to; a group may span classes.
        percents: integer shares of train, val and test; they add up to 100.
        seed: another seed gives another split.
        fixed: groups that have a split already; the others fill up what these leave of the shares.
    """
    fixed = fixed or {}
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    totals = {c: len(ids) for c, ids in _by_class(classes).items()}
    need = {c: np.array(grouped_sizes(n, percents), dtype=np.int64) for c, n in totals.items()}
    targets = {c: sizes.copy() for c, sizes in need.items()}
    spans = {name: len({classes[i] for i in ids}) for name, ids in members.items()}
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
    """The split with room for the group, else the one whose targets it overruns least."""
    counts: dict[int, int] = {}
    for c in of_class:
        counts[c] = counts.get(c, 0) + 1
    best, best_score = 0, (float("-inf"), float("-inf"))
    for s in range(3):
        # how far the group would overrun the targets of this split (0 when it fits), then how empty the split is
        overrun = -sum(max(0, n - int(need[c][s])) for c, n in counts.items())
        room = sum(n * int(need[c][s]) / max(1, int(targets[c][s])) for c, n in counts.items())
        score = (float(overrun), room)
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
    """Move the smallest suitable group into a split where a class is missing although it should be there."""
    of_class: dict[int, list[str]] = {}
    for name, ids in members.items():
        for c in {classes[i] for i in ids}:
            of_class.setdefault(c, []).append(name)
    for c in sorted(targets):
        for s in (0, 1, 2):
            if targets[c][s] == 0 or placed[c][s] > 0:
                continue
            candidates = sorted(of_class.get(c, ()), key=lambda name: (len(members[name]), hashed_order(seed, name)))
            for name in candidates:
                ids = members[name]
                source = SPLITS.index(splits[ids[0]])
                moved = {k: sum(1 for i in ids if classes[i] == k) for k in {classes[i] for i in ids}}
                # never empty another split of any class that the group touches
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
