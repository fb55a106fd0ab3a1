"""A curator's decisions: exclude, relabel, same image, different images, the verdict on a pair, the box of the face.

`animesion browse` writes decisions to a small TOML file, a recipe refers to it as `curate.decisions`, and the curate
stage applies them. The resolved recipe holds the decisions themselves, so the file's name and folder do not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import tomli_w
from pydantic import Field, StringConstraints, model_validator

from animesion.config import settings
from animesion.config.settings import Section
from animesion.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Key = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]+$", max_length=200)]
#: A label that a decision can give to an image: no line breaks or other control characters.
LabelText = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=20_000)]
Keys = Annotated[list[Key], Field(min_length=2, max_length=1000)]
#: SHA-256 of an image's bytes; where each face is a sample, with its box, see `image_id`.
ImageId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}(#-?[0-9]{1,9}(,-?[0-9]{1,9}){3})?$")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=False)]
#: Left, top, right and bottom of a box relative to the upright image, 0 to 1.
Corners = Annotated[list[Share], Field(min_length=4, max_length=4)]

#: Larger files are refused: neither an editor nor `animesion browse` writes one.
MOST_BYTES = 50_000_000
#: Most pairs of images that are declared the same, as each costs time and memory; a set of 1,000 has half a million.
MOST_PAIRS = 1_000_000


class PairDecision(Section):
    """What two images are to each other, in place of what the search found.

    Attributes:
        images: digests of both images, so that the decision holds whatever their keys are.
        verdict: `copy`, `alternate` or `different`.
    """

    images: Annotated[list[ImageId], Field(min_length=2, max_length=2)]
    verdict: Literal["copy", "alternate", "different"]

    @model_validator(mode="after")
    def _two(self) -> Self:
        if self.images[0] == self.images[1]:
            raise ValueError(f"{self.images[0][:12]}… is given twice: name two images")
        return self


class Decisions(Section):
    """Decisions by key, and on pairs by the digests of the images.

    Attributes:
        exclude: images to exclude.
        label: new label by key; replaces the label from the source.
        same: sets of keys that show the same image.
        different: sets of keys of which no two show the same image.
        pairs: verdicts on pairs, which replace those that were found.
        box: box of the face by key; replaces what the detector found. Keys are those of images, also where each face
            is a sample.
        several: images that show several characters, whatever the detector found.
    """

    exclude: list[Key] = Field([])
    label: dict[Key, LabelText] = Field({})
    same: list[Keys] = Field([])
    different: list[Keys] = Field([])
    pairs: list[PairDecision] = Field([])
    box: dict[Key, Corners] = Field({})
    several: list[Key] = Field([])

    @model_validator(mode="after")
    def _agree(self) -> Self:
        both = set(self.exclude) & set(self.label)
        if both:
            raise ValueError(f"{min(both)} is excluded and has a label: remove one of the two")
        both = set(self.several) & (set(self.box) | set(self.exclude) | set(self.label))
        if both:
            raise ValueError(f"{min(both)} shows several characters and has another decision: remove one of the two")
        both = set(self.exclude) & set(self.box)
        if both:
            raise ValueError(f"{min(both)} is excluded and has a box: remove one of the two")
        for key, (left, top, right, bottom) in sorted(self.box.items()):
            if right <= left or bottom <= top:
                raise ValueError(f"box: {key} has a box that ends before it starts: left, top, right, bottom")
        first_of_set = representatives(self.same)
        sizes = Counter(first_of_set.values())
        pairs = sum(size * (size - 1) // 2 for size in sizes.values())
        if pairs > MOST_PAIRS:
            first, size = sizes.most_common(1)[0]
            raise ValueError(
                f"same: {pairs:,} pairs of images, of which {first} and {size - 1:,} others in one set, are more than "
                f"{MOST_PAIRS:,}: name fewer images, or exclude them"
            )
        for keys in self.different:
            seen: dict[str, str] = {}
            for key in sorted(set(keys) & first_of_set.keys()):
                other = seen.setdefault(first_of_set[key], key)
                if other != key:
                    raise ValueError(
                        f"{other} and {key} are declared both the same and different: remove one of the two"
                    )
        verdicts: dict[tuple[str, ...], str] = {}
        for each in self.pairs:
            pair = tuple(sorted(each.images))
            if verdicts.setdefault(pair, each.verdict) != each.verdict:
                names = " and ".join(f"{image[:12]}…" for image in pair)
                raise ValueError(
                    f"{names} are declared both {verdicts[pair]} and {each.verdict}: remove one of the two"
                )
        return self

    def __bool__(self) -> bool:
        on_images = self.exclude or self.label or self.box or self.several
        return bool(on_images or self.same or self.different or self.pairs)

    def named(self) -> set[str]:
        """Every key that occurs in a decision."""
        in_sets = (key for keys in (*self.same, *self.different) for key in keys)
        return {*self.exclude, *self.label, *self.box, *self.several, *in_sets}

    def to_toml(self) -> str:
        """The file's text; it does not depend on the order in which decisions were made."""
        content = {
            "exclude": sorted(set(self.exclude)),
            "several": sorted(set(self.several)),
            "same": [list(each) for each in sorted({tuple(sorted(set(each))) for each in self.same})],
            "different": [list(each) for each in sorted({tuple(sorted(set(each))) for each in self.different})],
            "label": dict(sorted(self.label.items())),
            "box": dict(sorted(self.box.items())),
            "pairs": [
                {"images": [*pair], "verdict": verdict}
                for pair, verdict in sorted({(tuple(sorted(each.images)), each.verdict) for each in self.pairs})
            ],
        }
        return tomli_w.dumps({name: value for name, value in content.items() if value})


def read(path: Path) -> Decisions:
    """Read a decisions file.

    Raises:
        UsageError: the file is unreadable or not TOML, or its decisions contradict one another.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"the decisions {path} are larger than {MOST_BYTES:,} bytes: give another file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the decisions {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the decisions {path} are not UTF-8 text") from None
    data = settings.parse_toml(text, f"the decisions file {path}")
    return settings.check(Decisions, data, f"decisions {path}")


def image_id(sha256: str, crop: Sequence[int] | None) -> str:
    """What a decision on a pair names a sample by.

    Args:
        sha256: digest of the image's bytes, as hex.
        crop: left, top, right and bottom of the sample, where each face of an image is one; else None.
    """
    return sha256 if crop is None else f"{sha256}#{','.join(map(str, crop))}"


def representatives(same: Iterable[Sequence[str]]) -> dict[str, str]:
    """The smallest key of each key's set; sets that share a key are one set."""
    # Union-find with path halving; the smaller root wins, so a root is the smallest key of its set.
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for keys in same:
        for one, other in pairwise(keys):
            smaller, larger = sorted((root(one), root(other)))
            parent[larger] = smaller
    return {key: root(key) for key in parent}


def decided_pairs(
    near: npt.NDArray[np.int64], row_of_key: Mapping[str, int], unit: Callable[[int], int], decisions: Decisions
) -> npt.NDArray[np.int64]:
    """Pairs of near duplicates, corrected by a curator's decisions.

    Args:
        near: pairs of rows that the search found, shape (pairs, 2).
        row_of_key: row of each key that has no drop reason yet.
        unit: maps a row to the row that represents all rows of equal pixels; pairs consist of such rows.
        decisions: the decisions.

    Returns:
        The pairs without those decided different and with those decided the same; shape (pairs, 2), ascending.
    """
    import numpy as np  # only here, as every command reads recipes

    # The sets of each row, as the pairs of a set of a thousand are half a million.
    apart: dict[int, set[int]] = {}
    for number, keys in enumerate(decisions.different):
        for row in _rows(keys, row_of_key, unit):
            apart.setdefault(row, set()).add(number)
    # All pairs of a merged set, so that it is not cut like a chain of near duplicates, in which only neighbours pair.
    merged: dict[str, list[str]] = {}
    for key, first in sorted(representatives(decisions.same).items()):
        merged.setdefault(first, []).append(key)
    same = (pair for keys in merged.values() for pair in combinations(_rows(keys, row_of_key, unit), 2))
    nobody: set[int] = set()
    found = {(min(a, b), max(a, b)) for a, b in near.tolist() if apart.get(a, nobody).isdisjoint(apart.get(b, nobody))}
    return np.array(sorted(found.union(same)), dtype=np.int64).reshape(-1, 2)


def decided_verdicts(
    unit_of: Mapping[str, int], row_of_key: Mapping[str, int], unit: Callable[[int], int], decisions: Decisions
) -> dict[tuple[int, int], str]:
    """The verdicts on pairs that a curator decided, by rows `a < b`; none for images that are not there.

    Args:
        unit_of: by `image_id`, the row that represents all rows of equal pixels.
        row_of_key: as in `decided_pairs`.
        unit: as in `decided_pairs`.
        decisions: the decisions.

    Raises:
        UsageError: a decision by keys states the opposite.
    """
    import numpy as np

    found: dict[tuple[int, int], str] = {}
    for each in decisions.pairs:
        a, b = sorted(unit_of.get(image, -1) for image in each.images)
        if 0 <= a < b and found.setdefault((a, b), each.verdict) != each.verdict:
            names = _names((a, b), row_of_key)
            raise UsageError(f"decisions: {names} are declared both {found[a, b]} and {each.verdict}: remove one")
    copies = np.array([pair for pair, verdict in found.items() if verdict == "copy"], dtype=np.int64).reshape(-1, 2)
    apart = {tuple(pair) for pair in copies.tolist()}
    apart -= {tuple(pair) for pair in decided_pairs(copies, row_of_key, unit, decisions).tolist()}
    same = {tuple(pair) for pair in decided_pairs(copies[:0], row_of_key, unit, decisions).tolist()}
    for pair, verdict in found.items():
        if pair in (apart if verdict == "copy" else same):
            other = "different" if pair in apart else "the same"
            raise UsageError(
                f"decisions: {_names(pair, row_of_key)} are declared {other} by their keys, and {verdict} as a pair: "
                "remove one of the two"
            )
    return found


def _names(pair: tuple[int, int], row_of_key: Mapping[str, int]) -> str:
    key_of = {row: key for key, row in sorted(row_of_key.items(), reverse=True)}
    return " and ".join(key_of[row] for row in pair)


def _rows(keys: Iterable[str], row_of_key: Mapping[str, int], unit: Callable[[int], int]) -> list[int]:
    """The rows of a set of keys, ascending: one for all rows of equal pixels, none for a key without a row."""
    return sorted({unit(row_of_key[key]) for key in keys if key in row_of_key})
