"""What a person decided about single images: leave out, label anew, same or not the same image.

`animesion browse` writes decisions into a small TOML file, a recipe takes them in as `curate.decisions`, and curate
applies them. The resolved recipe holds the decisions themselves, so that neither the file's name nor its place matters.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import tomli_w
from pydantic import Field, StringConstraints, model_validator

from animesion.config import settings
from animesion.config.settings import Section
from animesion.errors import UsageError

Key = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]+$", max_length=200)]
#: A label that an image can be given: no line breaks or other control characters.
LabelText = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=20_000)]
Keys = Annotated[list[Key], Field(min_length=2, max_length=1000)]

#: A file larger than this was not written by hand or by `animesion browse`.
MOST_BYTES = 50_000_000


class Decisions(Section):
    """Decisions by key.

    Attributes:
        exclude: images to leave out.
        label: the label that an image gets instead of its own.
        same: sets of images that are one image.
        different: sets of images of which no two are the same image.
    """

    exclude: list[Key] = Field([])
    label: dict[Key, LabelText] = Field({})
    same: list[Keys] = Field([])
    different: list[Keys] = Field([])

    @model_validator(mode="after")
    def _agree(self) -> Self:
        both = set(self.exclude) & set(self.label)
        if both:
            raise ValueError(f"{min(both)} is excluded and has a label: take one away")
        team = teams(self.same)
        for together in self.different:
            for one, other in combinations(sorted(set(together)), 2):
                if one in team and team[one] == team.get(other):
                    raise ValueError(f"{one} and {other} are the same and different: take one away")
        return self

    def __bool__(self) -> bool:
        return bool(self.exclude or self.label or self.same or self.different)

    def named(self) -> set[str]:
        """Every key that is named."""
        sets = (key for together in (*self.same, *self.different) for key in together)
        return {*self.exclude, *self.label, *sets}

    def to_toml(self) -> str:
        """The file's text, in an order that does not depend on the order of deciding."""
        content = {
            "exclude": sorted(set(self.exclude)),
            "same": [list(each) for each in sorted({tuple(sorted(set(each))) for each in self.same})],
            "different": [list(each) for each in sorted({tuple(sorted(set(each))) for each in self.different})],
            "label": dict(sorted(self.label.items())),
        }
        return tomli_w.dumps({name: value for name, value in content.items() if value})


def read(path: Path) -> Decisions:
    """The decisions of a file.

    Raises:
        UsageError: unreadable, not TOML, or decisions that contradict one another.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"the decisions {path} are larger than {MOST_BYTES:,} bytes: give another file")
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the decisions {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the decisions {path} are not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"the decisions {path} are not valid TOML: {error}") from None
    return settings.check(Decisions, data, f"decisions {path}")


def teams(same: Iterable[Sequence[str]]) -> dict[str, str]:
    """Key -> smallest key of what is the same by decision, over chains of sets that share a key."""
    parent: dict[str, str] = {}

    def top(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for together in same:
        for one, other in pairwise(together):
            a, b = sorted((top(one), top(other)))
            parent[b] = a
    return {key: top(key) for key in parent}


def decided_pairs(
    near: npt.NDArray[np.int64], place: Mapping[str, int], standing: Callable[[int], int], decisions: Decisions
) -> npt.NDArray[np.int64]:
    """Pairs of near duplicates as a person corrected them.

    Args:
        near: pairs of rows that were found, shape (pairs, 2).
        place: row of each key that is still in the running.
        standing: the row that stands for a row among those of equal pixels; pairs are of such rows.
        decisions: what was decided.

    Returns:
        The pairs without those that are different, with those that are the same; shape (pairs, 2), ascending.
    """
    apart = set(_row_pairs((combinations(each, 2) for each in decisions.different), place, standing))
    team: dict[str, list[str]] = {}
    for key, first in sorted(teams(decisions.same).items()):
        team.setdefault(first, []).append(key)
    joined = set(_row_pairs((combinations(each, 2) for each in team.values()), place, standing))
    found = {(min(a, b), max(a, b)) for a, b in near.tolist()}
    return np.array(sorted((found - apart) | joined), dtype=np.int64).reshape(-1, 2)


def _row_pairs(
    sets: Iterable[Iterable[tuple[str, str]]], place: Mapping[str, int], standing: Callable[[int], int]
) -> Iterable[tuple[int, int]]:
    for pairs in sets:
        for one, other in pairs:
            if one in place and other in place:
                a, b = sorted((standing(place[one]), standing(place[other])))
                if a != b:
                    yield a, b
