"""Shares, groups and the published DAF:re arithmetic."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animesion import splits

COUNTS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "daf-re" / "per_class_counts.csv"
GOLDEN = {
    20: (14, 1, 5), 21: (14, 2, 5), 22: (15, 2, 5), 24: (16, 3, 5), 25: (17, 3, 5), 30: (21, 2, 7), 40: (28, 3, 9),
    50: (35, 5, 10), 100: (70, 10, 20), 1000: (700, 99, 201), 10683: (7478, 1068, 2137),
}  # fmt: skip


@pytest.mark.parametrize(("n", "sizes"), GOLDEN.items())
def test_legacy_sizes_are_the_published_ones(n: int, sizes: tuple[int, int, int]) -> None:
    assert splits.legacy_dafre_sizes(n) == sizes


@pytest.mark.skipif(not COUNTS.exists(), reason="the published DAF:re counts are not here (../shared/data/daf-re)")
def test_legacy_split_of_all_published_classes() -> None:
    with COUNTS.open() as file:
        rows = list(csv.DictReader(file))
    classes = [i for i, row in enumerate(rows) for _ in range(int(row["total"]))]
    assignment = splits.legacy_dafre(classes, range(len(classes)))
    found = Counter(zip(classes, assignment.splits, strict=True))
    for i, row in enumerate(rows):
        assert [found[i, name] for name in splits.SPLITS] == [int(row[name]) for name in splits.SPLITS], row
    assert Counter(assignment.splits) == {"train": 322_947, "val": 46_050, "test": 94_440}


def test_legacy_split_takes_file_order() -> None:
    assignment = splits.legacy_dafre([0] * 20, range(20, 0, -1))
    assert assignment.splits == ["test"] * 5 + ["val"] + ["train"] * 14


@pytest.mark.parametrize(
    ("n", "percents", "sizes"),
    [
        (100, (80, 10, 10), (80, 10, 10)),
        (9, (80, 10, 10), (7, 1, 1)),
        (3, (80, 10, 10), (1, 1, 1)),
        (2, (80, 10, 10), (1, 1, 0)),
        (1, (80, 10, 10), (1, 0, 0)),
        (2, (50, 0, 50), (1, 0, 1)),
        (0, (70, 10, 20), (0, 0, 0)),
        (5, (10, 10, 80), (1, 1, 3)),
        (3, (20, 10, 70), (1, 1, 1)),
        (1, (2, 49, 49), (1, 0, 0)),
        (29, (70, 10, 20), (22, 2, 5)),
    ],
)
def test_grouped_sizes(n: int, percents: tuple[int, int, int], sizes: tuple[int, int, int]) -> None:
    assert splits.grouped_sizes(n, percents) == sizes


def test_single_images_meet_their_shares_exactly() -> None:
    classes = [i for i, n in enumerate([3, 10, 29, 57, 200]) for _ in range(n)]
    groups = [f"g{i}" for i in range(len(classes))]
    assignment = splits.grouped(classes, groups, (70, 10, 20))
    found = Counter(zip(classes, assignment.splits, strict=True))
    for i, n in enumerate([3, 10, 29, 57, 200]):
        assert tuple(found[i, name] for name in splits.SPLITS) == splits.grouped_sizes(n, (70, 10, 20))
    assert not assignment.notes


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=120),
    st.sampled_from([(80, 10, 10), (70, 10, 20), (50, 0, 50), (98, 1, 1)]),
    st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_groups_are_never_cut_and_order_does_not_matter(
    images: list[tuple[int, int]], percents: tuple[int, int, int], seed: int
) -> None:
    classes, groups = [c for c, _ in images], [f"g{g}" for _, g in images]
    assignment = splits.grouped(classes, groups, percents, seed)
    where: dict[str, set[str]] = {}
    for group, split in zip(groups, assignment.splits, strict=True):
        where.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in where.values())
    turned = splits.grouped(classes[::-1], groups[::-1], percents, seed)
    assert turned.splits[::-1] == assignment.splits


@given(st.lists(st.integers(3, 12), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_every_class_with_three_groups_is_in_every_split(groups_of: list[int], seed: int) -> None:
    classes = [i for i, n in enumerate(groups_of) for _ in range(2 * n)]
    groups = [f"{i}-{k // 2}" for i, n in enumerate(groups_of) for k in range(2 * n)]  # pairs
    assignment = splits.grouped(classes, groups, (80, 10, 10), seed)
    for i in range(len(groups_of)):
        assert {s for c, s in zip(classes, assignment.splits, strict=True) if c == i} == set(splits.SPLITS)


def test_a_share_that_groups_do_not_allow_is_noted() -> None:
    assignment = splits.grouped([0] * 20, ["all"] * 20, (80, 10, 10))
    assert set(assignment.splits) == {"train"}
    assert assignment.notes[0][0] == 0
    assert "20/0/0 instead of 16/2/2" in assignment.notes[0][1]


def test_another_seed_is_another_split() -> None:
    groups = [f"g{i}" for i in range(100)]
    first, second = (splits.grouped([0] * 100, groups, (80, 10, 10), seed).splits for seed in (0, 1))
    assert first != second


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=60),
    st.dictionaries(st.integers(0, 12), st.sampled_from(splits.SPLITS), max_size=13),
)
def test_groups_that_are_placed_stay_and_none_is_cut(images: list[tuple[int, int]], placed: dict[int, str]) -> None:
    classes, groups = [c for c, _ in images], [f"g{g}" for _, g in images]
    fixed = {f"g{g}": split for g, split in placed.items()}
    found = splits.grouped(classes, groups, (80, 10, 10), 0, fixed).splits
    of_group: dict[str, set[str]] = {}
    for group, split in zip(groups, found, strict=True):
        of_group.setdefault(group, set()).add(split)
    assert all(len(each) == 1 for each in of_group.values())
    assert all(of_group[name] == {split} for name, split in fixed.items() if name in of_group)


def test_new_groups_fill_the_shares_that_placed_groups_leave() -> None:
    groups = [f"g{i}" for i in range(100)]
    fixed = {f"g{i}": "train" for i in range(60)}
    found = splits.grouped([0] * 100, groups, (80, 10, 10), 0, fixed).splits
    assert [found.count(name) for name in splits.SPLITS] == [80, 10, 10]
    assert set(found[:60]) == {"train"}


def by_class(
    classes: list[str], groups: list[str], percents: tuple[int, int, int], seed: int = 0,
    fixed: dict[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """The split of each image, empty for one that is left out."""
    names = sorted({*classes, "one without images"})
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    found = splits.by_class(
        [names.index(each) for each in classes], names, [numbers[each] for each in groups], percents, seed, fixed
    )
    return [splits.SPLITS[choice] if choice >= 0 else "" for choice in found.choices.tolist()]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    spanning=st.lists(st.integers(0, 5), max_size=100),
    percents=st.sampled_from([(80, 10, 10), (35, 15, 50), (50, 0, 50), (100, 0, 0)]),
    seed=st.integers(0, 9),
)
def test_classes_and_groups_are_each_in_one_split(
    sizes: list[int], spanning: list[int], percents: tuple[int, int, int], seed: int
) -> None:
    classes = [f"class {c}" for c, size in enumerate(sizes) for _ in range(size)]
    # the first images are in groups of any classes, the others alone
    groups = [f"g{spanning[i]}" if i < len(spanning) else f"alone {i}" for i in range(len(classes))]
    found = by_class(classes, groups, percents, seed)
    for names in (classes, groups):
        assert max(
            len({split for name, split in zip(names, found, strict=True) if name == each and split})
            for each in set(names)
        ) <= 1  # fmt: skip
    for group in set(groups):
        members = [split for name, split in zip(groups, found, strict=True) if name == group]
        assert any(members)  # a group is not left out as a whole
        assert len({c for c, name in zip(classes, groups, strict=True) if name == group}) > 1 or all(members)
    order = list(range(len(classes)))[::-1]
    assert [by_class([classes[i] for i in order], [groups[i] for i in order], percents, seed)[::-1]] == [found]


def test_shares_of_classes() -> None:
    classes = [f"c{i:02d}" for i in range(20) for _ in range(i + 1)]
    groups = [str(i) for i in range(len(classes))]
    found = dict(zip(classes, by_class(classes, groups, (35, 15, 50)), strict=True))
    assert Counter(found.values()) == {"train": 7, "val": 3, "test": 10}
    other = dict(zip(classes, by_class(classes, groups, (35, 15, 50), seed=1), strict=True))
    assert Counter(other.values()) == Counter(found.values())
    assert other != found


def test_a_spanning_group_stays_where_most_of_its_images_are() -> None:
    fixed = {"a": "train", "b": "test", "c": "val"}
    found = by_class(["a", "a", "b", "b", "c"], ["post", "post", "post", "x", "y"], (80, 10, 10), fixed=fixed)
    assert found == ["train", "train", "", "test", "val"]
    # among equals, the images that are tested on are kept
    assert by_class(["a", "b"], ["post", "post"], (80, 10, 10), fixed=fixed) == ["", "test"]


def test_published_classes_stay_and_new_ones_fill_the_shares() -> None:
    classes = [f"c{i}" for i in range(10)]
    groups = [str(i) for i in range(10)]
    fixed = {"c0": "test", "c1": "test", "c2": "val", "gone": "test"}
    found = dict(zip(classes, by_class(classes, groups, (60, 10, 30), fixed=fixed), strict=True))
    assert {name: found[name] for name in ("c0", "c1", "c2")} == {"c0": "test", "c1": "test", "c2": "val"}
    assert Counter(found.values()) == {"train": 6, "val": 1, "test": 3}
