"""The tags that a network reads, in the facts of its weights file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from animesion.errors import UsageError

#: Key of vocabulary and categories in the facts of a weights file.
FACT = "text"


def facts_of(vocabulary: Sequence[str], categories: Sequence[str]) -> dict[str, Any]:
    """The facts of a weights file on the tags that its network reads; none for a network that reads none."""
    return {FACT: {"names": list(vocabulary), "categories": list(categories)}} if vocabulary else {}


def read_facts(facts: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return vocabulary and categories in the facts of a weights file; empty if its network reads no tags.

    Raises:
        UsageError: they are not lists of names.
    """
    fact = facts.get(FACT, {"names": [], "categories": []})
    lists = [fact.get(key) for key in ("names", "categories")] if isinstance(fact, Mapping) else [None]
    if not all(isinstance(each, list) and all(isinstance(name, str) and name for name in each) for each in lists):
        raise UsageError(f"{where}: {FACT} in its card are not lists of names: the file is damaged")
    return tuple(lists[0] or ()), tuple(lists[1] or ())
