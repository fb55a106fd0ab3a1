"""The table and the plot of a study, from runs that are done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs the extra train")

from animesion_training.analysis import study as studies
from animesion_training.cli.study import study


def row(runs: int, cost: float, deviation: float = 0.0) -> dict[str, Any]:
    return {"model.name": "m", "runs": runs, "top_1": 0.5, "top_1_deviation": deviation, "multiply_adds": cost}


def bars(axes: Any) -> list[int]:
    """Number of bars of each point."""
    return [len(each.lines[2]) for each in axes.containers]


def costs(axes: Any) -> list[float]:
    """Where each point is on the axis of costs."""
    return [float(each.lines[0].get_xdata()[0]) for each in axes.containers]


STUDY = studies.Study(name="costs", grid={"model.name": ["m"]})


def test_a_plot_of_single_runs_has_no_bars() -> None:
    [axes] = studies.cost_figure(STUDY, [row(1, 40e6), row(1, 90e6)]).axes
    assert axes.get_xlabel() == "M multiply-adds per image"
    assert axes.get_ylabel() == "test top-1 (%)"
    assert bars(axes) == [0, 0]
    assert costs(axes) == [40, 90]


def test_a_plot_of_repeated_runs_has_bars_and_round_costs() -> None:
    figure = studies.cost_figure(STUDY, [row(3, 3e8, 0.02), row(1, 17e9)])
    [axes] = figure.axes
    assert axes.get_xlabel() == "G multiply-adds per image"
    assert axes.get_ylabel() == "test top-1 (%); bars are one deviation"
    assert bars(axes) == [1, 0]
    figure.canvas.draw()
    low, high = axes.get_xlim()
    shown = [tick.get_text() for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high]
    assert {"0.5", "1", "2", "5", "10", "20"} <= set(shown)
    assert all(text.strip("0.")[0] in "125" for text in shown if text)


def test_the_table_of_one_seed_has_no_deviation(tmp_path: Path) -> None:
    file = tmp_path / "sizes.toml"
    file.write_text('[set]\n"model.name" = "resnet10t"\n[grid]\n"model.img_size" = [32, 48]\n')
    metrics = dict.fromkeys(studies.METRICS, 0.25)
    for cell in studies.cells(studies.load(file)):
        report = tmp_path / "out" / cell.folder / "report"
        report.mkdir(parents=True)
        (report / "evaluation.json").write_text(json.dumps({**metrics, "classes": 10}))
    order = [str(file), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(study, order, catch_exceptions=False)
    assert done.exit_code == 0
    assert "±" not in done.output
    assert "M multiply-adds" in done.output
    assert done.output.count(" 25.00 ") == 2 * 3
