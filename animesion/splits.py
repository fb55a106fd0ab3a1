"""Assign images to train, val and test.

The strategies are `grouped` (the default: integer shares, hashed order, groups never cut, every class represented),
`by-class` (each class in one split, to test on classes that training has not seen) and `legacy-dafre` (the arithmetic
of the published DAF:re split, kept for comparison). `animesion.pipeline.curate` defines groups, and handles the trivial
strategies `published` and `single`. Nothing here reads a file.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
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
#: Words beside a split's name that say nothing of classes, as in `test_images` and `training_set`.
_PLAIN_WORDS = frozenset(
    {
        *(
            "image",
            "images",
            "img",
            "imgs",
            "pic",
            "pics",
            "picture",
            "pictures",
            "photo",
            "photos",
            "jpg",
            "jpeg",
            "png",
        ),
        *("crop", "crops", "cropped", "resized", "raw", "data", "dataset", "set", "split", "folder"),
    }
)
_JOINED_WORD = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:images?|imgs?|data|set)")
_WORD = re.compile(r"[^\W\d_]+|\d+")


def split_in_name(name: str) -> tuple[str, tuple[str, ...]]:
    """The split that a name has among its words, and the other words that may name classes, in lower case.

    `training_set` is `train` with no words, `seg_test` is `test` with `seg`; numbers are no words. The split is empty
    where there is none, or several.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [_JOINED_WORD.sub(r"\1", word) for word in _WORD.findall(spaced.lower())]
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    rest = tuple(
        word for word in words if word not in SPLIT_NAMES and word not in _PLAIN_WORDS and not word.isdecimal()
    )
    return (found.pop(), rest) if len(found) == 1 else ("", rest)


def split_folders(names: Collection[str]) -> dict[str, str]:
    """The folders among others that are named after a split, each with it.

    Names such as `test_images` count where two splits are named, and so do `seg_train` and `seg_test` together. Else
    they may be classes, and `train` and its like count alone.
    """
    exact = {name: SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES}
    parsed = {name: split_in_name(name) for name in names if name not in exact}
    alike: dict[tuple[str, ...], set[str]] = {}
    for split, rest in parsed.values():
        if split:
            alike.setdefault(rest, set()).add(split)
    loose = {name: split for name, (split, rest) in parsed.items() if split and (not rest or len(alike[rest]) > 1)}
    found = exact | loose
    return found if len(set(found.values())) > 1 else exact


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
    classes: Classes,
    names: Sequence[str],
    groups: Classes,
    percents: tuple[int, int, int],
    seed: int = 0,
    fixed: Mapping[str, str] | None = None,
) -> Assignment:
    """Split by class: all images of a class are in one split, so that no class of val or test is trained on.

    The shares are of classes, rounded as in `grouped_sizes`. Classes are taken in the order of the hashes of their
    names: val first, then test, the rest is train. A group may span classes of several splits, such as the faces in one
    illustration. It stays in the split that has most of its images (test before val before train among equals), and
    its images of the other splits are left out: they would be seen in training and in a test.

    Args:
        classes: number of the class of each image, a place in `names`.
        names: names of classes; some may have no images.
        groups: number of the group each image belongs to, at least 0.
        percents: integer shares of train, val and test; they add up to 100.
        seed: seed of the hashes; another seed gives another split.
        fixed: split by name of classes that are already placed; the others fill the rest of the shares.

    Returns:
        The splits, where the choice is -1 for images that are left out.
    """
    of_image = np.asarray(classes, dtype=np.int64)
    present = [names[c] for c in np.unique(of_image).tolist()]
    placed = {name: split for name, split in (fixed or {}).items() if name in set(present)}
    free = sorted((name for name in present if name not in placed), key=lambda name: hashed_order(seed, name))
    counts = list(placed.values())
    _, val, test = (
        max(0, size - counts.count(split))
        for split, size in zip(SPLITS, grouped_sizes(len(present), percents), strict=True)
    )
    split_of = placed | {
        name: "val" if i < val else "test" if i < val + test else "train" for i, name in enumerate(free)
    }
    of_class = np.array([SPLITS.index(split_of.get(name, "train")) for name in names], dtype=np.int8)
    choices = of_class[of_image]
    _, group = np.unique(np.asarray(groups, dtype=np.int64), return_inverse=True)
    images = np.zeros((int(group.max(initial=-1)) + 1, len(SPLITS)), dtype=np.int64)
    np.add.at(images, (group, choices), 1)
    home = len(SPLITS) - 1 - images[:, ::-1].argmax(1)  # the last of equals
    return Assignment(np.where(home[group] == choices, choices, -1).astype(np.int8), [])


class _Groups:
    """Images by class and by group, and the splits that they are placed in.

    Attributes:
        choices: shape (n,), place in `SPLITS` of each image.
        need: by class, images that are still missing in each split; negative if a target is exceeded.
        targets: by class, images that are wanted in each split.
        placed: by class, images in each split.
    """

    def __init__(
        self,
        classes: npt.NDArray[np.int64],
        groups: pa.DictionaryArray,
        percents: tuple[int, int, int],
        seed: int,
        fixed: Mapping[str, str],
    ) -> None:
        self.classes = classes
        self.group = groups.indices.to_numpy().astype(np.int64)
        names = groups.dictionary
        self.size = np.bincount(self.group, minlength=len(names))
        # the images of group g are `members[starts[g] : starts[g + 1]]`, ascending
        self.members = np.argsort(self.group, kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(self.size)])
        self.choices = np.full(len(classes), -1, dtype=np.int8)
        numbers, totals = np.unique(classes, return_counts=True)
        self.targets = {
            c: [*grouped_sizes(n, percents)] for c, n in zip(numbers.tolist(), totals.tolist(), strict=True)
        }
        self.need = {c: [*sizes] for c, sizes in self.targets.items()}
        self.placed = {c: [0, 0, 0] for c in self.targets}
        self.fixed = {i: SPLITS.index(fixed[name]) for i, name in _places(names, fixed)}
        self.hashes = np.empty((len(names), 2), dtype=np.uint64)
        for start in range(0, len(names), _BATCH):
            some = b"".join(hashed_order(seed, name) for name in names.slice(start, _BATCH).to_pylist())
            # first byte highest, so that the numbers are in the order of the hashes
            self.hashes[start : start + _BATCH] = np.frombuffer(some, dtype=">u8").reshape(-1, 2)

    def images(self, group: int) -> npt.NDArray[np.int64]:
        """The images of a group, ascending."""
        return self.members[self.starts[group] : self.starts[group + 1]]

    def place(self) -> None:
        """Place every group."""
        is_fixed = np.zeros(len(self.size), dtype=np.bool_)
        is_fixed[list(self.fixed)] = True
        is_several = (self.size > 1) | (is_fixed & (self.size > 0))
        several = np.flatnonzero(is_several)
        # number of different classes in each group
        images = np.flatnonzero(is_several[self.group])
        classes = int(self.classes.max(initial=0)) + 1
        span = np.bincount(
            np.unique(self.group[images] * classes + self.classes[images]) // classes, minlength=len(self.size)
        )
        # Groups that span classes or are large have the fewest splits that fit them, so they choose first.
        queue = np.lexsort((*self.hashes[several].T[::-1], -self.size[several], -span[several], ~is_fixed[several]))
        for group in several[queue].tolist():
            counts = Counter(self.classes[self.images(group)].tolist())
            self._put(
                group,
                self.fixed[group] if group in self.fixed else _best_split(counts, self.need, self.targets),
                counts,
            )
        # Single images follow, and those of one class do not depend on those of another.
        single = np.flatnonzero((self.size == 1) & ~is_fixed)
        alone = self.members[self.starts[single]]
        queue = np.lexsort((*self.hashes[single].T[::-1], self.classes[alone]))
        alone = alone[queue]
        firsts = np.flatnonzero(np.diff(self.classes[alone], prepend=-1))
        for first, last in itertools.pairwise([*firsts.tolist(), len(alone)]):
            c = int(self.classes[alone[first]])
            need, targets = self.need[c], self.targets[c]
            chosen = np.empty(last - first, dtype=np.int8)
            for i in range(last - first):
                chosen[i] = s = _best_split({c: 1}, {c: need}, {c: targets})
                need[s] -= 1
            self.choices[alone[first:last]] = chosen
            for s, count in enumerate(np.bincount(chosen, minlength=3).tolist()):
                self.placed[c][s] += count

    def _put(self, group: int, split: int, counts: Mapping[int, int]) -> None:
        self.choices[self.images(group)] = split
        for c, count in counts.items():
            self.need[c][split] -= count
            self.placed[c][split] += count

    def represent_every_class(self) -> None:
        """Move the smallest suitable group into each split that has a target but no image of a class."""
        for c in sorted(self.targets):
            for s in (0, 1, 2):
                if self.targets[c][s] == 0 or self.placed[c][s] > 0:
                    continue
                candidates = np.unique(self.group[self.classes == c])
                candidates = candidates[[group not in self.fixed for group in candidates.tolist()]]
                # The smallest group first, as moving it changes the shares least.
                queue = np.lexsort((*self.hashes[candidates].T[::-1], self.size[candidates]))
                for group in candidates[queue].tolist():
                    images = self.images(group)
                    source = int(self.choices[images[0]])
                    moved = Counter(self.classes[images].tolist())
                    # The move must not empty the split that the group leaves, for any class of the group.
                    if source != s and all(
                        self.placed[k][source] > n or self.targets[k][source] == 0 for k, n in moved.items()
                    ):
                        self.choices[images] = s
                        for k, n in moved.items():
                            self.placed[k][source] -= n
                            self.placed[k][s] += n
                        break


def _places(names: pa.Array, wanted: Iterable[str]) -> list[tuple[int, str]]:
    """The places of some texts in an array, with the texts."""
    found = pc.is_in(names, value_set=pa.array(list(wanted), names.type)).to_numpy(zero_copy_only=False)
    places = np.flatnonzero(found)
    return list(zip(places.tolist(), names.take(pa.array(places)).to_pylist(), strict=True))


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
