"""Render the model card of a training run from its weights, recipe and report.

The templates are in `animesion.cards`. Facts that a run does not contain are stated as unknown.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from animesion import cards
from animesion.errors import UsageError
from animesion.storage.workspace import sha256_file
from animesion_training.run_weights import BEST, FINAL, find_weights
from animesion_training.weights import WeightsCard, read_card


def model_card(path: Path) -> str:
    """Render the card of a run or of one weights file.

    Args:
        path: folder of a run, or a `.safetensors` file; the report is read from the folder `report` next to it.

    Raises:
        UsageError: no weights file of Animesion, or a damaged report.
    """
    weights = find_weights(path)
    card, folder = read_card(weights), weights.parent
    report = _report(folder / "report" / "evaluation.json", weights)
    name = folder.resolve().name if weights.name in (BEST, FINAL) else weights.stem
    environment = cards.environment()
    environment.filters["percent"] = _percent
    environment.filters["interval"] = lambda interval: f"{_percent(interval['low'])} to {_percent(interval['high'])}"
    recipe = folder / "recipe.toml"
    try:
        return environment.get_template("model.md.j2").render(
            header=yaml.safe_dump(_header(card, name, report), sort_keys=False, allow_unicode=True, width=10_000),
            title=name,
            card=card,
            size=card.img_size if isinstance(card.img_size, int) else " x ".join(map(str, card.img_size)),
            methods=", ".join(f"{key} {value}" for key, value in card.methods.items() if value),
            trained=_class_sizes(card),
            found=report,
            weights=weights.name,
            bytes=weights.stat().st_size,
            sha256=sha256_file(weights),
            version=version("animesion"),
            recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "# no recipe.toml next to the weights\n",
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {folder} ({error}): restore the folder of the run") from error
    except Exception as error:  # the template can fail in any way on a damaged file
        raise UsageError(
            f"{folder / 'report' / 'evaluation.json'} lacks values of the card ({error}): "
            f"run `animesion eval --checkpoint {weights} --report {folder / 'report'}` again"
        ) from error


def _report(path: Path, weights: Path) -> dict[str, Any] | None:
    """Read the report of these weights, if there is one."""
    try:
        report = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        raise UsageError(f"{path} is damaged: run `animesion eval --report {path.parent}` again")
    # ignore a report of other weights
    evaluated = Path(str(report.get("weights") or report.get("checkpoint") or weights.name)).name
    return report if evaluated == weights.name else None


def _class_sizes(card: WeightsCard) -> dict[str, int] | None:
    """Total, smallest and largest number of training images per class, if the card has them."""
    counts = card.facts.get("train_counts")
    if (
        card.is_tagger
        or not isinstance(counts, list)
        or not counts
        or not all(isinstance(count, int) for count in counts)
    ):
        return None
    return {"images": sum(counts), "least": min(counts), "most": max(counts)}


def _header(card: WeightsCard, name: str, report: dict[str, Any] | None) -> dict[str, Any]:
    """The YAML block for the Hub, without a licence, which the run does not know."""
    header: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["animesion", "fine-grained", "long-tail", *(["multi-label"] if card.is_tagger else [])],
    }
    if report is not None and report.get("data") and not card.is_tagger:
        data = Path(str(report["data"])).name
        metrics = [
            {"type": "accuracy", "name": label, "value": report[key]}
            for label, key in (("top-1", "top_1"), ("macro accuracy", "macro_accuracy"))
            if isinstance(report.get(key), float)
        ]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data, "split": str(report.get("split", ""))},
            "metrics": metrics,
        }
        header["model-index"] = [{"name": name, "results": [result]}]
    return header


def _percent(share: float | None) -> str:
    return "not defined" if share is None else f"{100 * share:.2f}%"
