"""Run the tasks on embeddings with the thresholds that they need, and format their results.

`similarity` defines the metrics, `embed` computes embeddings, the command `eval` and the trainer call `measure`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animesion.errors import UsageError
from animesion.storage.workspace import write_atomic
from animesion_training.eval.report import percent, plain, text_table
from animesion_training.eval.similarity import (
    Embedded,
    OpenSet,
    Retrieval,
    Threshold,
    Verification,
    fit_open_set,
    fit_pairs,
    open_set,
    retrieval,
    verification,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Tasks on embeddings, by name.
TASKS = ("retrieval", "verification", "open-set")
#: File in the folder of a report.
FILE = "similarity.json"


@dataclass(frozen=True)
class Settings:
    """How the tasks are run.

    Attributes:
        shots: known images of each class, for identification from a few images and for open sets.
        draws: random choices of known images and classes.
        false_accept: share of unknown images that may get a name, for the threshold of open sets.
        threshold: a threshold to use as it is, in place of fitted ones.
        seed: of the choices.
    """

    shots: int = 5
    draws: int = 20
    false_accept: float = 0.05
    threshold: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Similarity:
    """Results by task; None for a task that was not asked for.

    Attributes:
        images: images of the split.
        classes: classes of the split.
        retrieval: results of the task.
        verification: likewise.
        open_set: likewise.
    """

    images: int
    classes: int
    retrieval: Retrieval | None = None
    verification: Verification | None = None
    open_set: OpenSet | None = None


def measure(
    data: Embedded, tasks: Sequence[str], settings: Settings, fit: Embedded | None = None, fit_split: str = ""
) -> Similarity:
    """Run tasks on a split.

    Args:
        data: the split.
        tasks: of `TASKS`.
        settings: see there.
        fit: another split, on which thresholds are fitted.
        fit_split: its name.

    Raises:
        UsageError: the split does not allow a task, or a task needs a threshold that neither is given nor can be
            fitted.
    """
    classes = len(set(data.labels.tolist()))
    results: dict[str, Any] = {}
    if "retrieval" in tasks:
        shots = sorted({1, settings.shots})
        results["retrieval"] = retrieval(data, shots=shots, draws=settings.draws, seed=settings.seed)
    given = None if settings.threshold is None else Threshold(settings.threshold, "given", "")
    if {"verification", "open-set"} & set(tasks) and given is None and fit is None:
        raise UsageError(
            "the tasks verification and open-set need a threshold: name a split to fit it on with --fit-split, or give "
            "--threshold"
        )
    if "verification" in tasks:
        assert given or fit
        results["verification"] = verification(data, given or _fit(fit_pairs, fit, fit_split))
    if "open-set" in tasks:
        choices = {"shots": settings.shots, "draws": settings.draws, "seed": settings.seed}
        limit = given or _fit(fit_open_set, fit, fit_split, false_accept=settings.false_accept, **choices)
        results["open_set"] = open_set(data, limit, **choices)
    return Similarity(len(data), classes, **results)


def _fit(rule: Any, fit: Embedded | None, split: str, **options: Any) -> Threshold:
    try:
        threshold: Threshold = rule(fit, split, **options)
    except UsageError as error:
        raise UsageError(f"no threshold can be fitted on the split '{split}': {error}") from None
    return threshold


def as_json(result: Similarity) -> dict[str, Any]:
    """Convert results to plain dicts, lists and numbers, without the tasks that were not run."""
    values: dict[str, Any] = plain(asdict(result))
    return {name: value for name, value in values.items() if value is not None}


def write(folder: Path, result: Similarity, facts: Mapping[str, Any]) -> None:
    """Write `similarity.json` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, **as_json(result)}, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / FILE, text.encode("utf-8", "backslashreplace"))


def tables(result: Similarity) -> list[RenderableType]:
    """Build the tables for a terminal."""
    found: list[RenderableType] = []
    if result.retrieval:
        found += _retrieval(result, result.retrieval)
    if result.verification:
        found += _verification(result.verification)
    if result.open_set:
        found += _open_set(result.open_set)
    return found


def _retrieval(result: Similarity, each: Retrieval) -> list[RenderableType]:
    table = text_table(f"Retrieval: {result.images:,} images, {result.classes:,} classes", "", "", "")
    table.add_row("R@1", percent(each.r_at_1), f"{each.queries:,} queries")
    table.add_row("mAP@R", percent(each.map_at_r), "")
    table.add_row("R@1, mean of classes", percent(each.macro_r_at_1), f"{each.classes:,} classes")
    for few in each.few_shot:
        spread = f"± {100 * few.deviation:.2f} over {few.draws} choices, lowest {percent(few.lowest)}"
        table.add_row(f"{few.shots}-shot R@1", percent(few.r_at_1), f"{spread}; {few.classes:,} classes")
    bands = text_table("By images of the class", "band", "classes", "queries", "R@1", "mAP@R")
    for band in each.bands:
        bands.add_row(band.band, f"{band.classes:,}", f"{band.queries:,}", percent(band.r_at_1), percent(band.map_at_r))
    return [table, bands]


def _verification(each: Verification) -> list[RenderableType]:
    title = f"Verification: {each.same:,} pairs of one class, {each.different:,} of two"
    table = text_table(title, "", "", "")
    table.add_row("equal error rate", percent(each.eer), "")
    table.add_row("AUROC", percent(each.auroc), "")
    table.add_row("accepted at 1% false accepts", percent(each.accepted_at_1), "")
    for name, scores in (("F1, both kinds equal", each.balanced), ("F1, all pairs", each.natural)):
        numbers = f"precision {percent(scores.precision)}, recall {percent(scores.recall)}"
        table.add_row(name, percent(scores.f1), numbers)
    table.add_row("F1 at this split's own best", percent(each.best_f1), "an upper limit")
    bands = text_table("By images of the smaller class", "band", "same", "different", "F1")
    for band in each.bands:
        bands.add_row(band.band, f"{band.same:,}", f"{band.different:,}", percent(band.f1))
    return [table, _limit(each.threshold), bands]


def _open_set(each: OpenSet) -> list[RenderableType]:
    title = f"Open set: {each.known} known classes from {each.shots} images each, {each.unknown} unknown"
    table = text_table(title, "", "", "")
    table.add_row("AUROC of unknown", percent(each.auroc), f"mean over {each.draws} choices")
    table.add_row("unknown that get a name", percent(each.accepted_unknown), "")
    table.add_row("known that get their name", percent(each.named), "")
    table.add_row("known that get a wrong name", percent(each.misnamed), "")
    return [table, _limit(each.threshold)]


def _limit(threshold: Threshold) -> str:
    fitted = f", fitted on {threshold.split}" if threshold.split else ""
    return f"Threshold {threshold.value:.4f}: {threshold.rule}{fitted}\n"
