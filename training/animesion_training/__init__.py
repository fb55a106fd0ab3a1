"""Train and evaluate image classifiers: models, data streaming, objectives and the training engine.

Names are imported on first use, so importing the package does not import torch. `import animesion_training.models`
registers Animesion's models with timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from animesion_training.api import add_to_gallery, build_gallery, identify, predict, train, whiten
    from animesion_training.evaluation import evaluate
    from animesion_training.models import create_model
    from animesion_training.originals.base import from_reference
    from animesion_training.weights import load_model, save_model

__all__ = [
    "add_to_gallery",
    "build_gallery",
    "create_model",
    "evaluate",
    "from_reference",
    "identify",
    "load_model",
    "predict",
    "save_model",
    "train",
    "whiten",
]

_MODULES = {
    "add_to_gallery": "api",
    "build_gallery": "api",
    "create_model": "models",
    "evaluate": "evaluation",
    "from_reference": "originals.base",
    "identify": "api",
    "load_model": "weights",
    "predict": "api",
    "save_model": "weights",
    "train": "api",
    "whiten": "api",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
