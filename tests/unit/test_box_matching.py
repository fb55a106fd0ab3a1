"""Overlap, matches, average precision, intervals, and the agreement of detectors."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from animesion import detectors
from animesion.dataset.box_tables import KindBox
from animesion.detectors import evaluation, matching
from animesion.detectors.agreement import joined
from animesion.errors import UsageError
from animesion.schemas import Box

BOX = st.builds(
    lambda x, y, w, h, s: Box(x / 20, y / 20, (x + w) / 20, (y + h) / 20, s / 10),
    st.integers(0, 14),
    st.integers(0, 14),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 10),
)


def at(left: float, top: float, side: float, score: float = 1.0) -> Box:
    return Box(left, top, left + side, top + side, score)


def test_overlap_is_intersection_over_union() -> None:
    assert matching.overlap(at(0, 0, 0.4), at(0, 0, 0.4)) == pytest.approx(1)
    assert matching.overlap(at(0, 0, 0.4), at(0.2, 0, 0.4)) == pytest.approx(1 / 3)
    assert matching.overlap(at(0, 0, 0.4), at(0.4, 0, 0.4)) == 0
    assert matching.overlap(Box(0.5, 0.5, 0.5, 0.5, 1), Box(0.5, 0.5, 0.5, 0.5, 1)) == 0


def test_a_true_box_is_found_once_by_the_best_box() -> None:
    truth = [at(0, 0, 0.4), at(0.5, 0.5, 0.4)]
    boxes = [at(0.02, 0, 0.4, 0.5), at(0, 0, 0.4, 0.9), at(0.52, 0.5, 0.4, 0.2), at(0.9, 0, 0.1, 0.8)]
    assert matching.matches(boxes, truth, 0.5) == [-1, 0, 1, -1]


@settings(deadline=None)
@given(st.lists(BOX, max_size=8), st.lists(BOX, max_size=8))
def test_matches_are_one_to_one_and_overlap(boxes: list[Box], truth: list[Box]) -> None:
    found = matching.matches(boxes, truth, 0.5)
    hits = [j for j in found if j >= 0]
    assert len(set(hits)) == len(hits)
    assert all(matching.overlap(boxes[i], truth[j]) >= 0.5 for i, j in enumerate(found) if j >= 0)
    # a better box comes first, so what worse ones do cannot change it
    best = [i for i, box in enumerate(boxes) if box.score > 0.5]
    assert [found[i] for i in best] == matching.matches([boxes[i] for i in best], truth, 0.5)


def coco(scored: list[tuple[float, bool]], truth: int) -> float:
    """Average precision as pycocotools writes it (`COCOeval.accumulate`), for distinct scores."""
    hits = np.array([hit for _, hit in sorted(scored, key=lambda each: -each[0])])
    right, wrong = np.cumsum(hits), np.cumsum(~hits)
    recall, precision = right / truth, right / (right + wrong)
    for i in range(len(precision) - 1, 0, -1):
        precision[i - 1] = max(precision[i - 1], precision[i])
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.mean([precision[i] if i < len(precision) else 0 for i in places]))


def test_average_precision_is_that_of_coco() -> None:
    rng = Random(0)
    for _ in range(200):
        count = rng.randint(1, 30)
        scored = [(i / 31, rng.random() < 0.6) for i in rng.sample(range(31), count)]
        truth = sum(hit for _, hit in scored) + rng.randint(0, 5)
        if truth:
            assert matching.average_precision(scored, truth) == pytest.approx(coco(scored, truth), abs=0.011)
    assert matching.average_precision([], 3) == 0
    assert matching.average_precision([(0.5, False)], 0) is None
    assert matching.average_precision([(0.5, True), (0.5, False)], 1) == pytest.approx(0.5)


def test_intervals_are_those_of_wilson() -> None:
    assert matching.interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # statsmodels' proportion_confint
    assert matching.interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert matching.interval(10, 10)[1] == 1
    assert matching.interval(0, 0) == (0, 1)
    assert matching.percent(0, 0) == "-"


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_an_ignored_box_need_not_be_found_and_whoever_finds_it_is_not_wrong() -> None:
    truth = [
        KindBox(at(0, 0, 0.2), "face"),
        KindBox(at(0.5, 0.5, 0.2), "chibi"),
        KindBox(at(0.8, 0, 0.2), "face", ("cut",)),
    ]
    boxes = [at(0, 0, 0.2, 0.9), at(0.5, 0.5, 0.2, 0.8), at(0.51, 0.5, 0.2, 0.7), at(0.3, 0.3, 0.1, 0.6)]
    image = evaluation.judge(boxes, truth, {"chibi", "cut"}, 0.5, 100, 100)
    [row, *sizes] = evaluation.rows([image], 0.0)
    assert (row.truth, row.found, row.boxes, row.right) == (1, 1, 2, 1)
    assert [each.name for each in sizes] == ["small"]
    assert image.missed(0.95) == [0]
    assert image.wrong(0.0) == [3]
    assert evaluation.operating_points([image])[0.98] == (0.9, 1, 1, 1)
    every = evaluation.judge(boxes, truth, (), 0.5, 100, 100)
    assert evaluation.recalls([every], 0.0) == {"+cut": (0, 1), "chibi": (1, 1), "face": (1, 2)}


def test_a_box_counts_in_the_size_of_its_true_box() -> None:
    truth = [KindBox(at(0, 0, 0.05)), KindBox(at(0.2, 0.2, 0.2)), KindBox(at(0.5, 0.5, 0.4))]
    boxes = [at(0, 0, 0.06, 0.9), at(0.2, 0.2, 0.2, 0.8), at(0.6, 0.0, 0.3, 0.7)]
    judged = evaluation.judge(boxes, truth, (), 0.5, 400, 400)
    rows = {row.name: (row.truth, row.found, row.boxes, row.right) for row in evaluation.rows([judged], 0.0)}
    assert rows == {"all": (3, 2, 3, 2), "small": (1, 1, 1, 1), "medium": (1, 1, 1, 1), "large": (1, 0, 1, 0)}


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_boxes_of_two_detectors_are_sure_and_those_of_one_are_not() -> None:
    first, second = at(0.1, 0.1, 0.2, 0.4), at(0.12, 0.1, 0.2, 0.6)
    alone = at(0.6, 0.6, 0.2, 1.0)
    sure, unsure = joined([[first], [alone, second]], 0.5)
    assert sure == first._replace(score=0.8)
    assert unsure == alone._replace(score=0.49)
    assert [box.score for box in joined([[first], [second]], 0.95)] == pytest.approx([0.294, 0.196])


@settings(deadline=None)
@given(st.lists(st.lists(BOX, max_size=5), min_size=2, max_size=4), st.sampled_from([0.3, 0.5, 0.9]))
def test_every_box_is_in_one_group_with_at_most_one_of_each_detector(found: list[list[Box]], iou: float) -> None:
    together = joined(found, iou)
    assert max(map(len, found)) <= len(together) <= sum(map(len, found))
    places = [box[:4] for boxes in found for box in boxes]
    for box in together:
        assert box[:4] in places
        # agreed if and only if another detector has it, as far as scores tell
        if box.score >= 0.5:
            assert sum(any(matching.overlap(box, other) >= iou for other in boxes) for boxes in found) >= 2


def test_a_list_of_detectors_is_one_detector() -> None:
    image = Image.new("RGB", (60, 40))
    [boxes] = detectors.load(["center", "boxes"])([image], [[Box(1 / 6, 0, 5 / 6, 1, 0.9)]])
    assert boxes == [Box(10 / 60, 0.0, 50 / 60, 1.0, 1.0)]
    [boxes] = detectors.load(["center", "boxes"], {"center": {"share": 0.2}})([image], [[Box(0, 0, 0.1, 1, 0.9)]])
    assert [box.score for box in boxes] == pytest.approx([0.49, 0.441])
    assert detectors.identity(["center", "boxes"]) == ","


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["center"], {}, "needs two or more different ones"),
        (["center", "center"], {}, "needs two or more different ones"),
        (["center", "none"], {}, "'none' finds nothing"),
        (["center", "boxes"], {"share": 0.5}, "tables by their names"),
        (["center", "boxes"], {"center": {"shar": 0.5}}, "unknown key 'shar'"),
        (["center", "center:x"], {}, "'center' takes no file"),
        ("onnx:", {}, "names no file"),
        ("onnx:a.onnx", {"file": "b.onnx"}, "differ"),
        ("onnx:absent.onnx", {}, "file not found: absent.onnx"),
    ],
)
def test_wrong_lists_are_one_sentence(names: list[str] | str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        detectors.load(names, options)
