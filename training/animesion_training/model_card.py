"""The card of a trained model: what the weights, the recipe and the report of a run say, for people and for the Hub.

Renders facts through the templates of `animesion.cards`; what the run does not know, the card says it does not.
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
from animesion_training.engine import runs
from animesion_training.weights import WeightsCard, read_card


def model_card(path: Path) -> str:
    """The card of a run, or of one weight file.

    Args:
        path: folder of a run, or a `.safetensors` file; its report is looked for beside it.

    Raises:
        UsageError: no weights of ours there, or a damaged report.
    """
    weights = path / runs.BEST if path.is_dir() else path
    card, folder = read_card(weights), weights.parent
    found = _report(folder / "report" / "evaluation.json", weights)
    name = folder.resolve().name if weights.name in (runs.BEST, runs.FINAL) else weights.stem
    environment = cards.environment()
    environment.filters["percent"] = _percent
    environment.filters["interval"] = lambda interval: f"{_percent(interval['low'])} to {_percent(interval['high'])}"
    recipe = folder / "recipe.toml"
    try:
        return environment.get_template("model.md.j2").render(
            header=yaml.safe_dump(_header(card, name, found), sort_keys=False, allow_unicode=True, width=10_000),
            title=name,
            card=card,
            size=card.img_size if isinstance(card.img_size, int) else " x ".join(map(str, card.img_size)),
            methods=", ".join(f"{key} {value}" for key, value in card.methods.items() if value),
            trained=_trained(card),
            found=found,
            weights=weights.name,
            bytes=weights.stat().st_size,
            sha256=sha256_file(weights),
            version=version("animesion"),
            recipe=recipe.read_text(encoding="utf-8")
            if recipe.is_file()
            else "# the recipe is not beside the weights\n",
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {folder} ({error}): copy the whole run back") from error
    except Exception as error:  # a template meets whatever a damaged file holds
        raise UsageError(
            f"{folder / 'report' / 'evaluation.json'} lacks what the card tells ({error}): "
            f"run `animesion eval --checkpoint {weights} --report {folder / 'report'}` again"
        ) from error


def _report(path: Path, weights: Path) -> dict[str, Any] | None:
    """The report of these weights, if there is one."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: run `animesion eval --report {path.parent}` again")
    # a report of other weights says nothing of these
    measured = Path(str(found.get("weights") or found.get("checkpoint") or weights.name)).name
    return found if measured == weights.name else None


def _trained(card: WeightsCard) -> dict[str, int] | None:
    counts = card.facts.get("train_counts")
    if not isinstance(counts, list) or not counts or not all(isinstance(count, int) for count in counts):
        return None
    return {"images": sum(counts), "least": min(counts), "most": max(counts)}


def _header(card: WeightsCard, name: str, found: dict[str, Any] | None) -> dict[str, Any]:
    """The YAML block that the Hub reads; the licence is nobody's to guess."""
    header: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["animesion", "fine-grained", "long-tail"],
    }
    if found is not None and found.get("data"):
        data = Path(str(found["data"])).name
        metrics = [
            {"type": "accuracy", "name": told, "value": found[key]}
            for told, key in (("top-1", "top_1"), ("macro accuracy", "macro_accuracy"))
            if isinstance(found.get(key), float)
        ]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data, "split": str(found.get("split", ""))},
            "metrics": metrics,
        }
        header["model-index"] = [{"name": name, "results": [result]}]
    return header


def _percent(share: float | None) -> str:
    return "not defined" if share is None else f"{100 * share:.2f}%"
