"""Find images whose names look like variants of one image: names that differ in a counter or an affix only.

`animesion.sources.families` knows common forms of such names. This module learns other forms from all names of a class,
for a note; it never changes a split.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

#: How a name may be divided into base and affix.
_FORMS = tuple(
    map(
        re.compile,
        (
            r"(?P<base>.*[^-_ .~(])[-_ .~(]+(?P<affix>[^-_ .~()]+)\)?",  # leaf7_a, leaf7 (a)
            r"(?P<base>.*[^-_ .~])[-_ .~]+(?P<affix>[^-_ .~]+[-_ .~]+[^-_ .~]+)",  # leaf7_turned_90
            r"(?P<base>.*[0-9])(?P<affix>[A-Za-z]{1,2})",  # 7a
            r"(?P<affix>[^-_ .~]+)[-_ .~]+(?P<base>[^-_ .~].*)",  # a_leaf7
            r"(?P<affix>[^-_ .~]+[-_ .~]+[^-_ .~]+)[-_ .~]+(?P<base>[^-_ .~].*)",  # turned_90_leaf7
        ),
    )
)

#: A digest or random id that differs in every name; all count as one affix.
_RANDOM = re.compile(r"(?=.*[0-9])(?=.*[a-f])[0-9a-f]{6,}", re.IGNORECASE)
_SEPARATORS = re.compile(r"[-_ .~]+")
_SPLIT = re.compile(r"(?:train|training|val|valid|validation|dev|test|testing)[-_ .~]+(?=.)", re.IGNORECASE)

_LEAST_SHARE = 0.2
"""Share of a class, from which a pattern counts in a class of any size."""
_LEAST_IMAGES = 20
"""Images of all classes, from which a pattern counts whatever its share."""
_LEAST_BASES = 3
"""Images of a class with variants, below which names with a common beginning are ordinary numbering."""
_LEAST_WORDS = 10
"""The same where bases are words and affixes are numbers, as in `IMG_1`, `DSC_1` of several cameras."""
_MOST_MEMBERS = 32
"""Variants of an image on average, above which names with a common beginning are ordinary numbering."""
_LONGEST = 200
"""Characters of the longest name that is compared."""
_LONG_NUMBER = 5
"""Digits from which a number may be the id of an image; shorter ones are counters."""


@dataclass(frozen=True)
class Variants:
    """Groups of images whose names differ in a counter or an affix only.

    Attributes:
        groups: positions of the images of each group, ascending; each image is in one group at most.
    """

    groups: list[list[int]]

    def straddling(self, splits: Sequence[str] | npt.NDArray[np.int8]) -> int:
        """Number of groups with images of several splits."""
        return sum(len({splits[i] for i in group}) > 1 for group in self.groups)


def find(source_ids: Sequence[str] | pa.Array, labels: Sequence[str] | npt.NDArray[np.int32]) -> Variants:
    """Find the groups, in time that grows linearly with the number of names.

    A class counts if several names (bases) have two or more variants each, and the affixes are shared: `leaf7_a`,
    `leaf7_b`, `leaf8_a` differ in `a` and `b`, while `img_0001` and `img_0002` have one base, and the time in
    `20250523_161731` differs in every name.

    Args:
        source_ids: the source's id of each image, such as its path; of an Arrow array, the names of one class at a time
            become Python objects.
        labels: label of each image, or its code; names are compared within a label.
    """
    ids = source_ids if isinstance(source_ids, pa.Array) else pa.array(source_ids, pa.string())
    _, codes, sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    by_label = np.argsort(codes, kind="stable")
    found: list[tuple[int, list[list[int]]]] = []
    for last, size in zip(np.cumsum(sizes).tolist(), sizes.tolist(), strict=True):
        members = by_label[last - size : last]
        stems = {}
        for i, source_id in zip(members.tolist(), ids.take(pa.array(members)).to_pylist(), strict=True):
            stem = _stem(source_id)
            # `train_1` and `test_1` are numbered twice
            prefix = _SPLIT.match(stem)
            stem = stem[prefix.end() :] if prefix else stem
            stems[i] = stem if len(stem) <= _LONGEST else ""
        # Where names form a grid, such as dates and times, the more numerous part identifies the image.
        groups = max((_groups(stems, form) for form in _FORMS), key=lambda each: (len(each), _size(each)))
        if groups:
            found.append((size, groups))
    total = sum(_size(groups) for _, groups in found)
    return Variants(
        sorted(
            group
            for size, groups in found
            if total >= _LEAST_IMAGES or _size(groups) >= _LEAST_SHARE * size
            for group in groups
        )
    )


def note(
    source_ids: Sequence[str] | pa.Array,
    labels: Sequence[str] | npt.NDArray[np.int32],
    splits: Sequence[str] | npt.NDArray[np.int8],
    total: int,
    advice: str,
) -> str:
    """The note on such groups that straddle splits; empty if none do.

    Args:
        source_ids: the source's id of each image that no family covers.
        labels: label of each, or its code.
        splits: split of each, or its number.
        total: number of all kept images.
        advice: what to do, as the end of the sentence.
    """
    variants = find(source_ids, labels)
    straddling = variants.straddling(splits)
    if not straddling:
        return ""
    example = next(group for group in variants.groups if len({splits[i] for i in group}) > 1)
    first = example[0]
    second = next(i for i in example if splits[i] != splits[first])
    names = " and ".join(f"'{_stem(str(source_ids[i]))}'" for i in (first, second))
    return (
        f"{_size(variants.groups):,} of {total:,} images have names that differ in a counter or affix only, such "
        f"as {names}; {straddling:,} of {len(variants.groups):,} such groups straddle splits{advice}"
    )


def _stem(source_id: str) -> str:
    name = source_id.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def _size(groups: Iterable[Sequence[int]]) -> int:
    return sum(map(len, groups))


def _groups(stems: Mapping[int, str], form: re.Pattern[str]) -> list[list[int]]:
    """The groups of one class by one kind of affix; empty if the names are ordinary ones.

    Args:
        stems: stem of each image of the class, by its position.
        form: how names are divided into base and affix.
    """
    by_base: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for i, stem in stems.items():
        match = None if stem.isdecimal() else form.fullmatch(stem)
        if match and not _is_counter(match["base"]):
            affix = "#" if _RANDOM.fullmatch(match["affix"]) else match["affix"].casefold()
            by_base[match["base"].casefold()].append((i, affix))
    # the image itself may have no affix
    for i, stem in stems.items() if by_base else ():
        if stem.casefold() in by_base:
            by_base[stem.casefold()].append((i, ""))
    # Equal names in several folders are no variants.
    variants = {
        base: named
        for base, named in by_base.items()
        if len(named) > 1 and ("#" in (affixes := {affix for _, affix in named}) or len(affixes) > 1)
    }
    words = [base for base, named in variants.items() if _is_numbered(base, named)]
    if len(words) < _LEAST_WORDS:
        for base in words:
            del variants[base]
    taken: set[int] = set()
    groups, times = [], Counter[str]()
    for named in variants.values():
        group = sorted({i for i, _ in named} - taken)
        if len(group) > 1:
            groups.append(group)
            taken.update(group)
            times.update({affix for _, affix in named})
    # Affixes of variants recur from image to image; counters and times do not.
    recurring = sum(count for count in times.values() if count > 1)
    if len(groups) < _LEAST_BASES or _size(groups) > _MOST_MEMBERS * len(groups) or 2 * recurring < times.total():
        return []
    return groups


def _is_numbered(base: str, named: Sequence[tuple[int, str]]) -> bool:
    """Whether a base is a word that is followed by numbers."""
    return not any(letter.isdecimal() for letter in base) and all(affix.isdecimal() for _, affix in named if affix)


def _is_counter(base: str) -> bool:
    """Whether a base is a short number, which does not identify an image."""
    plain = _SEPARATORS.sub("", base)
    return not plain or (plain.isdecimal() and len(plain) < _LONG_NUMBER)
