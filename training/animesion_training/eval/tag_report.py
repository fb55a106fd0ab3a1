"""Format the evaluation of a tagger as JSON, CSV and tables for a terminal; `tag_metrics` computes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animesion.storage.workspace import write_atomic
from animesion_training.eval.report import cells, csv_text, percent, plain, printable, text_table
from animesion_training.eval.tag_metrics import TagEvaluation, TagGroup, TagResult

if TYPE_CHECKING:
    from rich.console import RenderableType

_BANDS = {"many": "many (> 100)", "medium": "medium (20..100)", "few": "few (< 20)"}


def as_json(evaluation: TagEvaluation, *, per_tag: bool = False) -> dict[str, Any]:
    """Convert an evaluation to plain dicts, lists and numbers; floats are rounded to six places."""
    values: dict[str, Any] = plain(asdict(evaluation))
    if not per_tag:
        del values["per_tag"]
    return {"task": "tags", **values}


def per_tag_csv(evaluation: TagEvaluation) -> str:
    """One line per tag, in the order of the outputs."""
    header = [field.name for field in fields(TagResult)]
    return csv_text(header, [cells(asdict(each).values()) for each in evaluation.per_tag])


def write(folder: Path, evaluation: TagEvaluation, facts: Mapping[str, Any]) -> None:
    """Write `evaluation.json` and `per_tag.csv` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "per_tag.csv", per_tag_csv(evaluation).encode())
    # last: a study that was killed before counts the run as unfinished
    document = {**facts, **as_json(evaluation)}
    write_atomic(folder / "evaluation.json", (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def tables(evaluation: TagEvaluation, *, shown: int = 10) -> list[RenderableType]:
    """Build the tables for a terminal: all tags, categories and bands, and the worst tags.

    Args:
        evaluation: evaluation of a split.
        shown: rows of the last table; 0 omits it.
    """
    thresholds = "thresholds of the weights" if evaluation.fitted else "a threshold of 50% for each tag"
    table = text_table(
        f"{evaluation.samples:,} images, {evaluation.overall.tags:,} tags, {thresholds}",
        *("", "tags", "tested", "mAP", "base rate", "macro F1", "micro F1", "precision", "recall"),
    )
    table.add_row("all", *_row(evaluation.overall))
    for name, group in evaluation.categories.items():
        table.add_row(name, *_row(group))
    for name, group in evaluation.bands.items():
        table.add_row(f"{_BANDS[name]} in training", *_row(group))
    worst = text_table("Worst tags", "class", "", "train", "test", "AP", "F1", "threshold")
    tested = [each for each in evaluation.per_tag if each.average_precision is not None]
    for each in sorted(tested, key=lambda tag: (tag.average_precision or 0, -tag.test_images))[:shown]:
        train = "" if each.train_images is None else f"{each.train_images:,}"
        numbers = percent(each.average_precision), percent(each.f1), percent(each.threshold)
        worst.add_row(printable(each.name), each.category, train, f"{each.test_images:,}", *numbers)
    return [table, worst] if shown and tested else [table]


def _row(group: TagGroup) -> tuple[str, ...]:
    shares = (group.map, group.base_rate, group.macro_f1, group.micro_f1, group.precision, group.recall)
    return f"{group.tags:,}", f"{group.tested:,}", *map(percent, shares)
