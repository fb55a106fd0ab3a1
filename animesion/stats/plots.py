"""Plots of a class distribution: the Lorenz curve and images by class rank, as PNG files.

The numbers come from `animesion.stats.long_tail`. Only matplotlib's object API is used, without global state or a
display. The same counts give the same bytes on the same matplotlib version.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from animesion.stats.long_tail import FEW_BELOW, MANY_ABOVE, bands, describe, lorenz
from animesion.storage.workspace import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Names of the panels; also the stems of the files that `write_plots` writes.
PANELS = ("lorenz", "rank-frequency")

_INK, _SOFT_INK, _GRID, _LINE = "#24292f", "#57606a", "#e6e8eb", "#2f6fb3"
_BAND_SHADES = {"many": "#dceaf7", "medium": "#eef4e4", "few": "#fbead9"}
_DPI = 150

# inches: one panel, and the margins around its axes
_WIDTH, _HEIGHT = 6.4, 4.8
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.85, 0.25, 0.6, 0.5


def long_tail_figure(counts: npt.ArrayLike, title: str, panels: Sequence[str] = PANELS) -> Figure:
    """Draw a class distribution.

    Args:
        counts: images of each class, shape (classes,); the bands are defined for training counts.
        title: title above the figure.
        panels: panels from left to right, of `PANELS`.

    Raises:
        ValueError: no class, or counts that are not non-negative integers.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # the user's matplotlibrc must not change the plot
    with style.context("default", after_reset=True):
        figure = Figure(figsize=(_WIDTH * len(panels), _HEIGHT), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        # a dollar sign in a folder's name is not a formula
        figure.suptitle(_printable(title), fontsize=12, fontweight="bold", color=_INK, parse_math=False)
        draw = {"lorenz": _draw_lorenz, "rank-frequency": _draw_rank_frequency}
        for position, panel in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), position)
            _plain_axes(axes)
            draw[panel](axes, np.asarray(counts))
        # margins of a fixed size: measuring every label for a layout takes longer than drawing
        figure.subplots_adjust(
            left=_LEFT / (_WIDTH * len(panels)),
            right=1 - _RIGHT / (_WIDTH * len(panels)),
            bottom=_BOTTOM / _HEIGHT,
            top=1 - _TOP / _HEIGHT,
            wspace=(_LEFT + _RIGHT) / (_WIDTH - _LEFT - _RIGHT),
        )
    return figure


def write_plots(folder: Path, counts: npt.ArrayLike, title: str) -> list[Path]:
    """Write `lorenz.png` and `rank-frequency.png` into a folder, which is created if necessary.

    Args:
        folder: where the files are written.
        counts: images of each class, shape (classes,).
        title: title above each figure.

    Returns:
        Paths of the files.

    Raises:
        ValueError: see `long_tail_figure`.
        FullDiskError: the disk is full; no partial file is left.
    """
    written = []
    for panel in PANELS:
        path = folder / f"{panel}.png"
        # omit the software's version: a matplotlib upgrade that draws the same plot should write the same bytes
        out = io.BytesIO()
        long_tail_figure(counts, title, [panel]).savefig(out, format="png", metadata={"Software": None})
        write_atomic(path, out.getbuffer())
        written.append(path)
    return written


def _draw_lorenz(axes: Axes, counts: npt.NDArray[np.int64]) -> None:
    from matplotlib.ticker import PercentFormatter

    found = describe(counts)
    classes, images = lorenz(counts)
    axes.plot([0, 1], [0, 1], color=_SOFT_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.fill_between(classes, images, classes, color=_BAND_SHADES["many"], linewidth=0)
    axes.plot(classes, images, color=_LINE, linewidth=2)
    top = max(1, found.classes // 10)
    corner = (1 - top / found.classes, 1 - found.top.top_tenth)
    axes.plot(*corner, marker="o", color=_LINE, markersize=6, markeredgecolor="white")
    holders = f"the largest {top:,} classes" if top > 1 else "the largest class"
    # the label goes between diagonal and curve if there is room for it, else into the corner below the curve
    above = found.gini > 0.45
    axes.annotate(
        f"{holders} ({top / found.classes:.0%})\nhold{'' if top > 1 else 's'} {found.top.top_tenth:.1%}",
        corner,
        xytext=(-10, 8) if above else (0.97, 0.05),
        textcoords="offset points" if above else "axes fraction",
        ha="right",
        va="bottom",
        fontsize=9,
        color=_INK,
        arrowprops=None if above else {"arrowstyle": "-", "color": _SOFT_INK, "linewidth": 0.8, "shrinkB": 4},
    )
    axes.text(
        0.04,
        0.95,
        f"Gini {found.gini:.4f}\n{found.images:,} images in {found.classes:,} classes\n"
        f"{found.effective_classes:,.0f} effective classes",
        transform=axes.transAxes,
        va="top",
        fontsize=9,
        linespacing=1.5,
        color=_INK,
    )
    axes.text(
        0.28,
        0.29,
        "all classes equal",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
        ha="center",
        va="bottom",
        fontsize=8.5,
        color=_SOFT_INK,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of classes, smallest first", ylabel="share of images")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_rank_frequency(axes: Axes, counts: npt.NDArray[np.int64]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    found = describe(counts)
    sizes = np.sort(counts)[::-1]
    sizes = sizes[sizes > 0]
    low = 1.0 if len(sizes) == 0 or sizes[-1] < 10 else 10.0
    high = max(2.0 * found.max, 2 * MANY_ABOVE)
    edges = {"many": (MANY_ABOVE, high), "medium": (FEW_BELOW, MANY_ABOVE), "few": (low, FEW_BELOW)}
    for name, band in vars(bands(counts)).items():
        bottom, top = edges[name]
        axes.axhspan(bottom, top, color=_BAND_SHADES[name], linewidth=0)
        axes.annotate(
            f"{name}: {band.classes:,} classes, {band.images:,} images",
            (0.02, bottom),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 5),
            textcoords="offset points",
            va="bottom",
            fontsize=8.5,
            color=_SOFT_INK,
        )
    axes.plot(np.arange(1, len(sizes) + 1), sizes, color=_LINE, linewidth=2, marker="o", markersize=2.5)
    axes.set(yscale="log", ylim=(low, high), xlabel="rank of the class", ylabel="images in the class")
    scaled: list[Axis] = [axes.yaxis]
    if found.classes > 20:
        axes.set(xscale="log", xlim=(0.9, found.classes * 1.15))
        scaled.append(axes.xaxis)
    else:
        axes.set_xlim(0.5, found.classes + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in scaled:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(axis.get_view_interval()) < 1000 else (1,)))
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _plain_axes(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.tick_params(colors=_SOFT_INK, labelsize=9, length=0, which="both")
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c4c9cf")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
