"""Leaks between splits by groups and names."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from animesion.config.recipe import DuplicatesSection
from animesion.verification import leaks

SPLITS = st.sampled_from(["train", "val", "test"])


def find(splits: list[str], groups: list[str], families: list[tuple[str, ...]] | None = None) -> list[leaks.Leak]:
    n = len(splits)
    digests = [b"%d" % i for i in range(n)]
    return leaks.find(splits, groups, [""] * n, digests, None, DuplicatesSection(), families or [])


@given(st.lists(st.tuples(SPLITS, st.sampled_from(["", "a", "b", "c", "d"])), max_size=40))
def test_every_sample_that_is_related_to_an_earlier_split_is_named_once_for_each(rows: list[tuple[str, str]]) -> None:
    splits, groups = [row[0] for row in rows], [row[1] for row in rows]
    rank = {"train": 0, "val": 1, "test": 2}
    due = {
        (i, other)
        for i, (split, group) in enumerate(rows)
        for other, theirs in rows
        if group and group == theirs and rank[other] < rank[split]
    }
    found = find(splits, groups)
    named = []
    for leak in found:
        earlier, later = sorted((leak.first, leak.second), key=lambda i: rank[splits[i]])
        assert leak.first < leak.second
        assert leak.why == ("same group",)
        named.append((later, splits[earlier]))
    assert sorted(named) == sorted(due)
    counts = leaks.straddling_counts(found, splits)
    assert sum(counts.values()) == len({i for i, _ in due})


def test_a_relative_by_name_is_named_before_the_first_of_a_large_group() -> None:
    splits = ["train", "train", "test", "test"]
    names: list[tuple[str, ...]] = [("name:a",), ("name:b",), ("name:b",), ()]
    found = find(splits, ["g"] * 4, names)
    assert [(leak.first, leak.second, leak.why) for leak in found] == [
        (0, 3, ("same group",)),
        (1, 2, ("same group", "same family by name")),
    ]
    assert leaks.straddling_counts(found, splits) == {"test": 2}


def test_families_that_no_group_covers_are_leaks() -> None:
    found = find(["test", "train", "val"], ["g", "h", "i"], [("file:1",), ("file:1",), ("file:2",)])
    assert [(leak.first, leak.second, leak.why) for leak in found] == [(0, 1, ("same family by name",))]
