"""Weights in the folder of a run, which stands for them wherever a trained network is asked for."""

from __future__ import annotations

from pathlib import Path

from animesion.errors import UsageError

#: Names of the weights of the best epoch, and of the last one.
BEST, FINAL = "best.safetensors", "last.safetensors"


def find_weights(path: Path | str) -> Path:
    """The weights that a path names: for the folder of a run, those of its best epoch; else the path itself.

    A run without a validation split has no best epoch, so its last one counts.

    Raises:
        UsageError: a folder without weights.
    """
    path = Path(path)
    if not path.is_dir() or (path / "config.json").is_file():  # the latter is a model in timm's hub layout
        return path
    for name in (BEST, FINAL):
        if (path / name).is_file():
            return path / name
    raise UsageError(
        f"{path} is a folder without weights: a run has {BEST} after its first epoch, and a model of the Hub has "
        "config.json"
    )
