"""The plot of accuracy against cost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra train")

from animesion_training.analysis.cost_plot import cost_figure


def row(count: int, cost: float, deviation: float = 0.0, top_1: float = 0.5) -> dict[str, Any]:
    return {"runs": count, "top_1": top_1, "top_1_deviation": deviation, "multiply_adds": cost}


def bars(axes: Any) -> list[int]:
    """Number of bars of each point."""
    return [len(each.lines[2]) for each in axes.containers]


def places(axes: Any) -> list[float]:
    """Where each point with its bar is from left to right."""
    return [float(each.lines[0].get_xdata()[0]) for each in axes.containers]


def test_a_plot_of_single_runs_has_no_bars() -> None:
    [axes] = cost_figure("costs", [row(1, 40e6), row(1, 90e6)], ["m", "n"]).axes
    assert axes.get_xlabel() == "M multiply-adds per image"
    assert axes.get_ylabel() == "test top-1 (%)"
    assert bars(axes) == [0, 0]
    assert places(axes) == [40, 90]


def test_a_plot_of_repeated_runs_has_bars_and_round_costs() -> None:
    figure = cost_figure("costs", [row(3, 3e8, 0.02), row(1, 17e9)], ["m", "n"])
    [axes] = figure.axes
    assert axes.get_xlabel() == "G multiply-adds per image"
    assert axes.get_ylabel() == "test top-1 (%); bars are one deviation"
    assert bars(axes) == [1, 0]
    figure.canvas.draw()
    low, high = axes.get_xlim()
    shown = [tick.get_text() for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high]
    assert {"0.5", "1", "2", "5", "10", "20"} <= set(shown)
    assert all(text.strip("0.")[0] in "125" for text in shown if text)


def test_labels_of_points_side_by_side_are_legible() -> None:
    """Beside each point, four labels in a row would cover one another, and the last would leave the plot."""
    rows = [row(3, (700 + 25 * i) * 1e6, 0.004, 0.75 + 0.003 * i) for i in range(4)]
    rows += [row(1, 9e8, top_1=0.9), row(1, 3e9, top_1=0.5)]
    names = [f"EViT {i} % + CLCA" for i in range(4)]
    names += ["a name of $ome length", "another name of some length, that ends"]
    figure = cost_figure("crowded", rows, names)
    figure.canvas.draw()
    [axes] = figure.axes
    assert [text.get_text() for text in axes.texts] == names
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = axes.transData.transform(
        [(cost, 100 * each["top_1"]) for cost, each in zip(places(axes), rows, strict=True)]
    )
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.corners())


def points(axes: Any) -> list[list[float]]:
    """Where the points of the runs of each row with several are."""
    return [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 2]


def test_rows_of_equal_cost_are_lines_with_their_runs() -> None:
    rows = [
        row(3, 13e6, 0.02, 0.4) | {"top_1_runs": [0.38, 0.4, 0.42]},
        row(1, 13.1e6, top_1=0.35) | {"top_1_runs": [0.35]},
    ]
    figure = cost_figure("equal", rows, ["a name of $ome length", "other"])
    figure.canvas.draw()
    [axes] = figure.axes
    assert axes.get_xlabel() == "test top-1 (%): runs, mean and deviation"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a name of $ome length", "other"]
    assert places(axes) == pytest.approx([40, 35])
    assert bars(axes) == [1, 0]
    assert points(axes) == [pytest.approx([38, 40, 42])]
    top, bottom = axes.transData.transform([(0, 0), (0, 1)])[:, 1]
    assert top > bottom  # the first row is above
