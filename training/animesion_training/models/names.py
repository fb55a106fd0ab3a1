"""The list of available models: the baselines, ours, and all of timm's."""

from __future__ import annotations

from typing import Any

import timm
import torch

from animesion.errors import UsageError
from animesion_training.models import shorthand
from animesion_training.models.baselines import BASELINES, timm_name
from animesion_training.models.create import create_model
from animesion_training.models.ifa import IFA_MODELS


def list_models(pattern: str | None = None, *, parameters: bool = False) -> list[dict[str, Any]]:
    """List models, baselines first.

    Args:
        pattern: a shell pattern, or a part of the name; None for the baselines and our own models.
        parameters: count the parameters of each, for 1,000 classes, by building it on the meta device.

    Returns:
        One dictionary per model: `name`, `timm` (its name in timm), `weights` (number of published sets), and
        `parameters` if requested.

    Raises:
        UsageError: no name matches.
    """
    ours = [*BASELINES, *IFA_MODELS, *timm.list_models(["lrnet*", "van_*", "vitfs_*"]), *shorthand.NAMES]
    if pattern is None:
        names = ours
    else:
        import fnmatch

        glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
        names = list(dict.fromkeys(name for name in (*ours, *timm.list_models()) if fnmatch.fnmatch(name, glob)))
        if not names:
            raise UsageError(f"no model's name matches {pattern!r}")
    rows: list[dict[str, Any]] = []
    for name in names:
        full = timm_name(shorthand.split_name(name)[0])
        row: dict[str, Any] = {"name": name, "timm": full, "weights": len(timm.list_pretrained(f"{full}.*"))}
        if parameters:
            with torch.device("meta"):
                model = create_model(name, 1000)
            row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        rows.append(row)
    return rows
