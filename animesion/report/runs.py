"""Data of the report of a training run, from the files in its folder.

The files are untrusted: values of an unexpected type are left out.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.report.facts import clip
from animesion.report.images import Album, Images
from animesion.schemas import TAG_CATEGORIES

#: Most steps in a plot; of longer runs every n-th step is plotted.
MOST_STEPS = 2000

#: Most listed mistakes, and the byte budget of their thumbnails.
MISTAKES, MISTAKE_BYTES = 300, 1_500_000

_MOST_BYTES = 500_000_000
_METRICS, _EVALUATION = "metrics.jsonl", "report/evaluation.json"
_NUMBERS = {"class_id": int, "train_images": int, "test_images": int, "accuracy": float, "f1": float, "confusions": int}
_MISTAKE = {"true_id": int, "predicted_id": int, "confidence": float}
_PAIR = {"true_id": int, "predicted_id": int, "images": int, "share_of_class": float, "share_of_errors": float}


def is_run(path: Path) -> bool:
    """Whether a folder holds a training run."""
    return not (path / "dataset.json").exists() and any((path / name).is_file() for name in (_METRICS, _EVALUATION))


def of_run(path: Path, dataset: Dataset | None = None) -> dict[str, Any]:
    """Collect all data of the report of a training run.

    Args:
        path: folder of the run.
        dataset: the dataset that it was evaluated on, for thumbnails of its mistakes; None for a list without them.

    Returns:
        JSON-ready data, as the assets of the page expect them.

    Raises:
        UsageError: the folder holds no run, or a file cannot be read.
    """
    if not is_run(path):
        raise UsageError(f"{path} is neither a built dataset nor the folder of a training run")
    lines = _lines(_text(path / _METRICS))
    steps = [line for line in lines if line["kind"] == "step"]
    every = -(-len(steps) // MOST_STEPS) or 1  # ceil
    classes = _table(_text(path / "report/per_class.csv"), _NUMBERS, ("name", "confused_with_name"))
    mistakes = _table(_text(path / "report/mistakes.csv"), _MISTAKE, ("key", "true_name", "predicted_name"))
    mistakes, album = mistakes[:MISTAKES], Album()
    if dataset is not None:
        images = Images(dataset)
        for each in mistakes:
            place = images.places.get(each["key"])
            thumbnail = None if place is None else images.thumbnail(images.rows[place])
            each["image"] = album.add(thumbnail, MISTAKE_BYTES)
    name = path.resolve().name
    return {
        "kind": "run",
        "name": clip(name),
        "title": clip(name),
        "steps": steps[::every],
        "epochs": [line for line in lines if line["kind"] == "epoch"],
        "evaluation": _evaluation(_text(path / _EVALUATION)),
        "classes": classes,
        "confusions": _table(_text(path / "report/confusions.csv"), _PAIR, ("true_name", "predicted_name")),
        "mistakes": mistakes,
        "images": album.images,
        "settings": _text(path / "recipe.toml")[:100_000],
    }


def _text(path: Path) -> str:
    """The text of a file; empty if it does not exist."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes, so it was not written by a training run")
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _lines(text: str) -> list[dict[str, Any]]:
    """Lines of the metrics file by step, with their finite numbers only."""
    found = []
    for each in text.split("\n"):
        try:
            line = json.loads(each)
        except (ValueError, RecursionError):  # a killed run leaves a truncated last line
            continue
        if not isinstance(line, dict) or line.get("kind") not in ("step", "epoch") or not _is_integer(line.get("step")):
            continue
        numbers = {clip(name): value for name, value in line.items() if _is_finite(value)}
        found.append({**numbers, "kind": line["kind"]})
    return sorted(found, key=lambda line: int(line["step"]))


def _evaluation(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    if found.get("task") == "tags":
        return {"tags": _tag_groups(found), **_texts(found), "samples": _numbers(found, ("samples",))["samples"]}
    names = ("samples", "k", "top_1", "top_5", "macro_accuracy", "macro_f1")
    shown: dict[str, Any] = {name: found.get(name) if _is_finite(found.get(name)) else None for name in names}
    for name in ("top_1_interval", "macro_accuracy_interval"):
        each = _dict(found.get(name))
        good = _is_finite(each.get("low")) and _is_finite(each.get("high"))
        shown[name] = {"low": each["low"], "high": each["high"]} if good else None
    calibration = _dict(found.get("calibration"))
    shown["calibration_error"] = calibration.get("error") if _is_finite(calibration.get("error")) else None
    bins = calibration.get("bins")
    numbers = ("low", "high", "samples", "accuracy", "confidence")
    shown["bins"] = (
        [_numbers(each, numbers) for each in bins if isinstance(each, dict)] if isinstance(bins, list) else []
    )
    bands = _dict(found.get("bands"))
    numbers = ("classes", "tested", "samples", "top_1", "macro_accuracy")
    shown["bands"] = {
        name: _numbers(bands[name], numbers) for name in ("many", "medium", "few") if isinstance(bands.get(name), dict)
    }
    return {**shown, **_texts(found)}


def _texts(found: dict[str, Any]) -> dict[str, str]:
    return {name: clip(str(found.get(name) or "")) for name in ("split", "weights")}


def _tag_groups(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of all tags, of each category and of each band, with the name of the group."""
    numbers = ("tags", "tested", "map", "base_rate", "macro_f1", "micro_f1", "precision", "recall")
    categories, bands = _dict(found.get("categories")), _dict(found.get("bands"))
    groups = {"all": found.get("overall")} | {name: categories.get(name) for name in TAG_CATEGORIES}
    groups |= {f"{name} training images": bands.get(name) for name in ("many", "medium", "few")}
    return [{"name": name, **_numbers(_dict(each), numbers)} for name, each in groups.items() if each]


def _table(text: str, numbers: dict[str, type], texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a CSV that have a number in the first of `numbers`; other numbers may be None."""
    found = []
    csv.field_size_limit(1 << 20)
    try:
        for row in csv.DictReader(io.StringIO(text)):
            values: dict[str, Any] = {name: _number(row.get(name), kind) for name, kind in numbers.items()}
            if values[next(iter(numbers))] is not None:
                found.append({**values, **{name: clip(row.get(name) or "") for name in texts}})
    except csv.Error:
        return found
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(of: dict[str, Any], names: tuple[str, ...]) -> dict[str, float | None]:
    return {name: of.get(name) if _is_finite(of.get(name)) else None for name in names}


def _number(text: str | None, kind: type) -> float | None:
    try:
        value: float = kind(text)
    except (TypeError, ValueError):
        return None
    return value if _is_finite(value) else None


def _is_finite(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
