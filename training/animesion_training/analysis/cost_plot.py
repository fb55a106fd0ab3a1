"""The plot of accuracy against cost that a study writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

#: Largest cost over smallest one from which costs have a logarithmic axis.
_WIDE = 5
#: The same up to which costs are equal, as of networks that differ in how they are trained.
_EQUAL = 1.01
_COLOR = "#2f6fb3"
#: Where a label can stand: which part of it is next to its point, and how far from the point, in 1/72 inch. Of equals,
#: the first is taken.
_PLACES = [
    (horizontal, vertical, (right * distance, up * distance))
    for distance in (6, 14)
    for horizontal, vertical, right, up in (
        ("left", "bottom", 1, 0.7),
        ("left", "top", 1, -0.7),
        ("right", "bottom", -1, 0.7),
        ("right", "top", -1, -0.7),
        ("center", "bottom", 0, 1),
        ("center", "top", 0, -1),
        ("left", "center", 1.3, 0),
        ("right", "center", -1.3, 0),
    )
]
_ROUNDS = 3


def unit_of_cost(rows: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """The unit in which multiply-adds are shown, and its size: `M` where all are below 1 G, else `G`."""
    return ("G", 1e9) if max(row["multiply_adds"] for row in rows) >= 1e9 else ("M", 1e6)


def cost_figure(title: str, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """Plot top-1 against multiply-adds, one point per row, with a bar of one deviation where runs differ.

    Where all costs are equal, a row of the plot is a row of the table, with a small point for each run.

    Args:
        title: of the plot.
        rows: of the table of a study, at least one.
        labels: of the rows.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    least = min(row["multiply_adds"] for row in rows)
    if len(rows) > 1 and max(row["multiply_adds"] for row in rows) <= _EQUAL * least:
        return _accuracy_figure(title, rows, labels)
    figure, axes = _figure(5)
    unit, scale = unit_of_cost(rows)
    repeated = any(row["runs"] > 1 for row in rows)
    costs = [row["multiply_adds"] / scale for row in rows]
    for cost, row in zip(costs, rows, strict=True):
        # of one run there is no deviation
        deviation = 100 * row["top_1_deviation"] if row["runs"] > 1 else None
        axes.errorbar(cost, 100 * row["top_1"], deviation, marker="o", capsize=3, color=_COLOR)
    bars = "; bars are one deviation" if repeated else ""
    axes.set(xlabel=f"{unit} multiply-adds per image", ylabel=f"test top-1 (%){bars}")
    axes.margins(x=0.25, y=0.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    if max(costs) >= _WIDE * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_title(title, parse_math=False)
    axes.grid(color="#e6e8eb")
    annotations = [
        axes.annotate(
            label, (cost, 100 * row["top_1"]), xytext=(0, 0), textcoords="offset points", fontsize=8, parse_math=False
        )
        for cost, row, label in zip(costs, rows, labels, strict=True)
    ]
    for annotation in annotations:
        annotation.set_in_layout(False)
    figure.draw_without_rendering()  # the layout settles where points are
    _place(axes, annotations, [100 * row["top_1_deviation"] if row["runs"] > 1 else 0 for row in rows])
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _accuracy_figure(title: str, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """Plot top-1, one line per row, from top to bottom: each run, and their mean with a bar of one deviation."""
    figure, axes = _figure(1.2 + 0.45 * len(rows))
    repeated = any(row["runs"] > 1 for row in rows)
    for place, row in enumerate(rows):
        deviation = None
        if row["runs"] > 1:
            deviation = 100 * row["top_1_deviation"]
            runs = [100 * value for value in row["top_1_runs"]]
            axes.plot(runs, [place + 0.2] * len(runs), "o", color=_COLOR, alpha=0.4, markersize=4, markeredgewidth=0)
        axes.errorbar(100 * row["top_1"], place, xerr=deviation, marker="o", capsize=3, color=_COLOR)
    shown = ": runs, mean and deviation" if repeated else ""
    axes.set(xlabel=f"test top-1 (%){shown}", ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.margins(x=0.1)
    axes.set_title(title, parse_math=False)
    axes.grid(color="#e6e8eb", axis="x")
    return figure


def _place(axes: Axes, annotations: Sequence[Annotation], deviations: Sequence[float]) -> None:
    """Move each label to where it covers least of other labels, of points and bars, and of what surrounds the plot."""
    candidates = _boxes(axes, annotations)
    marks = _marks(axes, annotations, deviations)
    outer = np.array(axes.bbox.extents)
    # what a place costs whatever the other labels do; [label, place]
    fixed = np.array([[_overlaps(box, marks).sum() + _outside(box, outer) for box in boxes] for boxes in candidates])
    chosen = fixed.argmin(axis=1)
    every = np.arange(len(annotations))
    for _ in range(_ROUNDS):
        for label in every:
            others = every[every != label]
            placed = candidates[others, chosen[others]]
            shared = np.array([_overlaps(box, placed).sum() for box in candidates[label]])
            chosen[label] = (fixed[label] + shared).argmin()
    for annotation, place in zip(annotations, chosen, strict=True):
        horizontal, vertical, offset = _PLACES[place]
        annotation.set(horizontalalignment=horizontal, verticalalignment=vertical, position=offset)


def _boxes(axes: Axes, annotations: Sequence[Annotation]) -> np.ndarray:
    """Boxes of each label at each of its places, in pixels; [label, place, 4] as left, bottom, right, top."""
    pixels = axes.figure.dpi / 72
    share = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
    result = np.empty((len(annotations), len(_PLACES), 4))
    for row, annotation in zip(result, annotations, strict=True):
        extent = annotation.get_window_extent()
        x, y = axes.transData.transform(annotation.xy)
        for box, (horizontal, vertical, (right, up)) in zip(row, _PLACES, strict=True):
            left = x + right * pixels - share[horizontal] * extent.width
            bottom = y + up * pixels - share[vertical] * extent.height
            box[:] = left, bottom, left + extent.width, bottom + extent.height
    return result


def _marks(axes: Axes, annotations: Sequence[Annotation], deviations: Sequence[float]) -> np.ndarray:
    """Boxes of the points with their bars, in pixels; [point, 4]."""
    half = 3 * axes.figure.dpi / 72
    points = np.array([annotation.xy for annotation in annotations])
    bars = np.stack([np.zeros(len(deviations)), deviations], axis=1)
    low, high = axes.transData.transform(points - bars), axes.transData.transform(points + bars)
    return np.concatenate([low - half, high + half], axis=1)


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas that a box shares with each of others."""
    width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    shared: np.ndarray = np.clip(width, 0, None) * np.clip(height, 0, None)
    return shared


def _outside(box: np.ndarray, outer: np.ndarray) -> float:
    """Area of a box beyond another one."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return float(area - _overlaps(box, outer[None])[0])
