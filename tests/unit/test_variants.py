"""Names that look like variants of one image: noticed where they are, and not in ordinary numbering."""

from __future__ import annotations

import random
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animesion.pipeline import variants

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

WORDS = st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=12)
FORMS = ("{base}_{affix}", "{base}-{affix}", "{base} ({affix})", "{base}.{affix}", "{affix}_{base}", "{affix} {base}")


def one_label(names: list[str]) -> list[list[str]]:
    return [[names[i] for i in group] for group in variants.find(names, ["a"] * len(names)).groups]


@settings(deadline=None)
@given(
    bases=st.lists(st.builds("{}{}".format, WORDS, st.integers(0, 9999)), min_size=12, max_size=30, unique=True),
    affixes=st.lists(st.sampled_from(["a", "b", "dark", "rot", "flip", "2", "3", "x1"]), min_size=2, unique=True),
    form=st.sampled_from(FORMS),
    plain=st.booleans(),
    seed=st.integers(0, 99),
)
def test_variants_are_found_whatever_their_form_and_order(
    bases: list[str], affixes: list[str], form: str, plain: bool, seed: int
) -> None:
    names = [f"{form.format(base=base, affix=affix)}.jpg" for base in bases for affix in affixes]
    names += [f"{base}.jpg" for base in bases] if plain else []
    random.Random(seed).shuffle(names)
    groups = one_label(names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert {len(group) for group in groups} == {len(affixes) + plain}
    assert len(groups) == len(bases)


@settings(deadline=None)
@given(
    prefix=st.sampled_from(["img_", "IMG_", "DSC_", "", "photo (", "cat.", "plant ", "IMG-20240101-WA", "Screenshot-"]),
    width=st.integers(1, 6),
    count=st.integers(1, 400),
    first=st.integers(0, 5000),
    classes=st.integers(1, 9),
)
def test_ordinary_numbering_is_not(prefix: str, width: int, count: int, first: int, classes: int) -> None:
    names = [f"{prefix}{number:0{width}d}{')' * ('(' in prefix)}.jpg" for number in range(first, first + count)]
    assert variants.find(names, [f"c{i % classes}" for i in range(count)]).groups == []
    assert one_label([f"{split}/{split}_{name}" for split in ("train", "val", "test") for name in names[:30]]) == []


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(50, 400))
def test_random_names_times_and_cameras_are_not(seed: int, count: int) -> None:
    rng = random.Random(seed)
    assert one_label([f"{rng.randrange(10**9)}.jpg" for _ in range(count)]) == []
    assert one_label([f"{rng.randbytes(16).hex()}.jpg" for _ in range(count)]) == []
    assert one_label([f"IMG_202505{rng.randrange(1, 29):02d}_{rng.randrange(240000):06d}" for _ in range(count)]) == []
    assert one_label([f"{camera}_{i:04d}" for camera in ("IMG", "DSC", "P") for i in range(count // 10)]) == []
    people = [f"Person_{k}" for k in range(20)]
    names = [f"{who}_{i:04d}.jpg" for who in people for i in range(5)]
    assert variants.find(names, [who for who in people for _ in range(5)]).groups == []


def test_names_are_compared_within_a_label() -> None:
    names = [f"leaf{k}_{affix}" for k in range(20) for affix in "ab"]
    assert variants.find(names, [name[-1] for name in names]).groups == []
    assert len(variants.find(names, ["a"] * 40).groups) == 20


def test_a_few_variants_among_many_names_are_not_a_pattern() -> None:
    names = [f"photo of {k * 7919 % 1000}" for k in range(200)] + [
        f"leaf{k}_{affix}" for k in range(4) for affix in "ab"
    ]
    assert one_label(names) == []
    assert len(one_label(names[190:])) == 4


def test_the_note_counts_the_groups_that_straddle() -> None:
    names = [f"{'leaf' * (k % 2)}{k}x_{affix}.jpg" for k in range(10) for affix in "ab"]
    splits = ["train", "train"] * 7 + ["train", "test"] * 3
    assert variants.note(names, ["c"] * 20, splits, 30, ": do this") == (
        "20 of 30 images have names that differ in a counter or affix only, such as 'leaf7x_a' and 'leaf7x_b'; 3 of 10 "
        "such groups straddle splits: do this"
    )
    assert variants.note(names, ["c"] * 20, ["train"] * 20, 30, "") == ""


def test_time_grows_linearly() -> None:
    def seconds(count: int) -> float:
        names = [f"leaf{k}_{affix}" for k in range(count) for affix in "abc"]
        start = time.process_time()
        assert len(variants.find(names, ["a"] * len(names)).groups) == count
        return time.process_time() - start

    seconds(1000)
    few, many = (min(seconds(count) for _ in range(3)) for count in (2000, 20_000))
    assert many < 50 * max(few, 0.01)  # 100 if it grew with the square


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_sets() -> None:
    with tarfile.open(SHARED / "mango" / "leaves-augmented.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
    labels = [name.split("/")[1] for name in names]
    assert sorted(map(len, variants.find(names, labels).groups)) == [6] * 209
    originals = [name for name in names if "aug_" not in name]
    assert variants.find(originals, [name.split("/")[1] for name in originals]).groups == []
