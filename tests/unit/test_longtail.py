from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from animesion.dataset.label_files import ClassCounts, read_class_counts
from animesion.stats.long_tail import Band, describe, effective_classes, gini, lorenz
from animesion.stats.plots import write_plots

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "daf-re" / "per_class_counts.csv"


@pytest.fixture(scope="module")
def dafre() -> ClassCounts:
    if not PUBLISHED.is_file():
        pytest.skip("the published DAF:re counts are not on this machine")
    return read_class_counts(PUBLISHED)


def test_published_totals(dafre: ClassCounts) -> None:
    found = describe(dafre.total, dafre.ids.tolist(), dafre.names)
    assert (found.images, found.classes, found.empty_classes, found.min, found.max) == (463_437, 3_263, 0, 20, 10_683)
    assert (found.p25, found.median, found.p75) == (28, 48, 113)
    assert found.p90 == pytest.approx(292.8)
    assert found.p99 == pytest.approx(1534.98)
    assert found.mean == pytest.approx(142.03, abs=0.005)
    assert found.std == pytest.approx(358.8, abs=0.05)
    assert found.gini == pytest.approx(0.6597, abs=5e-5)
    assert found.imbalance_factor == pytest.approx(10_683 / 20)
    assert found.effective_classes == pytest.approx(1_208, abs=0.5)
    shares = [found.top.top_1, found.top.top_10, found.top.top_100, found.top.top_tenth]
    assert [round(100 * share, 1) for share in shares] == [2.3, 9.2, 34.6, 57.5]
    assert [(c.class_id, c.name, c.images) for c in found.head[:2]] == [
        (27, "hatsune_miku", 10_683),
        (9, "hakurei_reimu", 6_691),
    ]
    assert {c.images for c in found.tail} == {20}


def test_published_training_split(dafre: ClassCounts) -> None:
    found = describe(dafre.splits["train"])
    assert found.gini == pytest.approx(0.6625, abs=5e-5)
    assert (found.p25, found.median, found.p75) == (19, 33, 79)
    assert found.std == pytest.approx(251.2, abs=0.05)
    assert (found.bands.many, found.bands.medium, found.bands.few) == (
        Band(650, 233_163),
        Band(1_793, 76_635),
        Band(820, 13_149),
    )


@pytest.mark.parametrize(("split", "value", "imbalance"), [("val", 0.666, 1_068), ("test", 0.647, 427.4)])
def test_published_evaluation_splits(dafre: ClassCounts, split: str, value: float, imbalance: float) -> None:
    found = describe(dafre.splits[split])
    assert found.gini == pytest.approx(value, abs=5e-4)
    assert found.imbalance_factor == pytest.approx(imbalance)


def test_band_edges() -> None:
    found = describe([101, 100, 20, 19, 0]).bands
    assert (found.many, found.medium, found.few) == (Band(1, 101), Band(2, 120), Band(2, 19))


def test_empty_classes_count_but_do_not_divide() -> None:
    found = describe([10, 0, 5], ids=[7, 3, 1], names=["a", "b", "c"])
    assert (found.empty_classes, found.min, found.imbalance_factor, found.classes) == (1, 0, 2.0, 3)
    assert [c.name for c in found.head] == ["a", "c", "b"]
    assert [c.name for c in found.tail] == ["b", "c", "a"]


def test_no_image_at_all() -> None:
    found = describe([0, 0])
    assert (found.images, found.gini, found.imbalance_factor, found.effective_classes) == (0, 0, 0, 0)


def test_ties_are_ordered_by_class_id() -> None:
    assert [c.class_id for c in describe([5, 5, 5], ids=[2, 0, 1]).head] == [0, 1, 2]


def test_one_class() -> None:
    found = describe([4])
    assert (found.std, found.gini, found.effective_classes, found.top.top_tenth) == (0, 0, 1, 1)


@pytest.mark.parametrize("counts", [[], [1, -1], [1.5], [[1, 2]]])
def test_wrong_counts_are_refused(counts: list[object]) -> None:
    with pytest.raises(ValueError, match="counts"):
        describe(counts)  # type: ignore[arg-type]


def test_names_must_fit() -> None:
    with pytest.raises(ValueError, match="names"):
        describe([1, 2], names=["a"])


def test_to_dict_survives_json() -> None:
    plain = describe([3, 1, 0]).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["bands"]["few"] == {"classes": 3, "images": 4}


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=60))
def test_gini_is_the_area_of_the_lorenz_curve(counts: list[int]) -> None:
    x, y = lorenz(counts)
    assert (x[0], x[-1], y[0]) == (0, 1, 0)
    assert (np.diff(y) >= 0).all()
    if sum(counts):
        assert y[-1] == 1
        assert gini(counts) == pytest.approx(1 - 2 * np.trapezoid(y, x), abs=1e-9)
        assert 1 - 1e-9 <= effective_classes(counts) <= len(counts) + 1e-6


@pytest.mark.parametrize("counts", [[900, 300, 120, 60, 30, 9, 2], [1], [0, 0], list(range(1, 60))])
def test_plots_are_written_the_same_twice(tmp_path: Path, counts: list[int]) -> None:
    first = write_plots(tmp_path / "a", counts, "Title with $ and \x1b")
    second = write_plots(tmp_path / "b", counts, "Title with $ and \x1b")
    assert [p.name for p in first] == ["lorenz.png", "rank-frequency.png"]
    for a, b in zip(first, second, strict=True):
        content = a.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert b"Software" not in content
        assert content == b.read_bytes()
