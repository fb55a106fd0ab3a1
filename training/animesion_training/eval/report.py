"""Format an evaluation as JSON, CSV and tables for a terminal.

`metrics` computes the numbers, the commands print or write the result.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from animesion.dataset import text_tables
from animesion_training.eval.metrics import BandAccuracy, ClassResult, Confusion, Evaluation, Interval
from animesion_training.eval.scores import Scores

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def as_json(evaluation: Evaluation, *, per_class: bool = False) -> dict[str, Any]:
    """Convert an evaluation to plain dicts, lists and numbers; floats are rounded to six places.

    Args:
        evaluation: evaluation of a split.
        per_class: whether to include every class, as `per_class_csv` does.
    """
    values: dict[str, Any] = plain(asdict(evaluation))
    if not per_class:
        del values["per_class"]
    return values


def per_class_csv(evaluation: Evaluation) -> str:
    """One line per class, by id: id, name, images, accuracy, F1, and the class it is most often confused with."""
    names = [each.name for each in evaluation.per_class]
    header = [field.name for field in fields(ClassResult)]
    place = header.index("confused_with") + 1
    rows = []
    for each in evaluation.per_class:
        row = cells(asdict(each).values())
        row.insert(place, "" if each.confused_with is None else names[each.confused_with])
        rows.append(row)
    header.insert(place, "confused_with_name")
    return csv_text(header, rows)


def confusions_csv(evaluation: Evaluation) -> str:
    """One line per confused pair, largest first."""
    return csv_text(
        [field.name for field in fields(Confusion)], [cells(asdict(c).values()) for c in evaluation.confusions]
    )


def mistakes_csv(scores: Scores, keys: Sequence[str], names: Sequence[str], most: int = 500) -> str:
    """One line per misclassified image, the most confident mistakes first.

    Args:
        scores: scores of a split.
        keys: keys of its samples by index.
        names: names of the classes by id.
        most: upper limit of lines.
    """
    rows = scores.collect()
    wrong = np.flatnonzero(rows.predictions != rows.targets)
    wrong = wrong[np.lexsort((rows.indices[wrong], -rows.confidences[wrong]))][:most]
    header = ["key", "true_id", "true_name", "predicted_id", "predicted_name", "confidence"]
    lines = []
    for i in wrong.tolist():
        truth, guess = int(rows.targets[i]), int(rows.predictions[i])
        confidence = float(rows.confidences[i])
        lines.append(cells([keys[int(rows.indices[i])], truth, names[truth], guess, names[guess], confidence]))
    return csv_text(header, lines)


def tables(evaluation: Evaluation, *, shown: int = 10) -> list[RenderableType]:
    """Build the tables for a terminal: metrics, bands, worst classes and largest confusions.

    Args:
        evaluation: evaluation of a split.
        shown: rows of the last two tables; 0 omits them.
    """
    result: list[RenderableType] = [_summary(evaluation)]
    if evaluation.bands is not None:
        result.append(_bands(evaluation))
    missing = len(evaluation.untested)
    if missing:
        untested = f"{missing:,} of {evaluation.classes:,} classes have no test image and are in no average"
        result.append(printable(untested))
    if shown and evaluation.confusions:
        result += [_worst(evaluation, shown), _pairs(evaluation, shown)]
    return result


def _summary(evaluation: Evaluation) -> Table:
    calibration = evaluation.calibration
    table = text_table(f"{evaluation.samples:,} images, {evaluation.classes:,} classes", "", "", "95% interval")
    table.add_row("top-1", percent(evaluation.top_1), _interval(evaluation.top_1_interval))
    table.add_row(f"top-{evaluation.k}", percent(evaluation.top_5), "")
    table.add_row("macro accuracy", percent(evaluation.macro_accuracy), _interval(evaluation.macro_accuracy_interval))
    table.add_row("macro F1", percent(evaluation.macro_f1), "")
    table.add_row("calibration error", percent(calibration.error), "")
    table.add_row("mean confidence", percent(calibration.mean_confidence), "")
    table.add_row("negative log-likelihood", f"{calibration.nll:.4f}", "")
    table.add_row("Brier score", f"{calibration.brier:.4f}", "")
    return table


def _bands(evaluation: Evaluation) -> Table:
    table = text_table("By training images", "band", "classes", "tested", "images", "top-1", "macro")
    bands = evaluation.bands
    assert bands is not None
    named = (("many (> 100)", bands.many), ("medium (20..100)", bands.medium), ("few (< 20)", bands.few))
    for label, band in named:
        table.add_row(label, *_band(band))
    return table


def _band(band: BandAccuracy) -> tuple[str, ...]:
    sizes = (f"{band.classes:,}", f"{band.tested:,}", f"{band.samples:,}")
    return *sizes, percent(band.top_1), percent(band.macro_accuracy)


def _worst(evaluation: Evaluation, shown: int) -> Table:
    names = [each.name for each in evaluation.per_class]
    tested = [(each.accuracy, -each.test_images, each) for each in evaluation.per_class if each.accuracy is not None]
    table = text_table("Worst classes", "class", "train", "test", "accuracy", "most confused with", "")
    for accuracy, _, each in sorted(tested, key=lambda row: row[:2])[:shown]:
        train = "" if each.train_images is None else f"{each.train_images:,}"
        other = "" if each.confused_with is None else names[each.confused_with]
        confusions = f"{each.confusions:,}" if each.confusions else ""
        row = (printable(each.name), train, f"{each.test_images:,}", percent(accuracy), printable(other), confusions)
        table.add_row(*row)
    return table


def _pairs(evaluation: Evaluation, shown: int) -> Table:
    table = text_table("Largest confusions", "class", "predicted as", "images", "of the class", "of all errors")
    for pair in evaluation.confusions[:shown]:
        shares = percent(pair.share_of_class), percent(pair.share_of_errors)
        table.add_row(printable(pair.true_name), printable(pair.predicted_name), f"{pair.images:,}", *shares)
    return table


def text_table(title: str, *columns: str) -> Table:
    """Build a table in the style of this package, to be filled with rows."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
                 padding=(0, 1, 0, 0))  # fmt: skip
    text_columns = {"class", "band", "most confused with", "predicted as"}
    for i, column in enumerate(columns):
        left = column in text_columns or not i
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    return table


def printable(text: str) -> RenderableType:
    """Literal text: markup and escape sequences in names, which come from data, have no effect."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "?" for c in text))


def percent(share: float | None) -> str:
    """Format a share, `-` for none."""
    return "-" if share is None else f"{share:.2%}"


def _interval(interval: Interval) -> str:
    return f"{interval.low:.2%} .. {interval.high:.2%}"


def cells(values: Iterable[Any]) -> list[str]:
    """Format the values of a row of a CSV: floats with six places, and nothing for None."""
    return ["" if v is None else f"{v:.6f}" if isinstance(v, float) else str(v) for v in values]


def csv_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The text of a CSV that is safe to open in a spreadsheet program."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(map(text_tables.cell_of, row) for row in rows)
    return text.getvalue()


def plain(value: Any) -> Any:
    """Convert nested dicts, lists and tuples for JSON, with floats rounded to six places."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
