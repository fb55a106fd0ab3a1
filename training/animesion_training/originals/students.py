"""Helpers for checkpoints of TGDA's students, LRNet and ViTFS: wrapper, size of images, normalisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.originals.base import Config, StateDict

#: Prefix of a student's linear classifier in the original's trainer.
STUDENT_HEAD = "dfsm.1."


def without_wrapper(weights: StateDict, encoder: str, head: str) -> dict[str, Tensor]:
    """Rename weights to the names of the bare network: without the prefix `encoder`, the classifier as `head`.

    Raises:
        UsageError: two tensors would have the same name, such as two classifiers.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix(encoder)
        if name.startswith(STUDENT_HEAD):
            name = head + name.removeprefix(STUDENT_HEAD)
        if name in renamed:
            raise UsageError(
                f"this checkpoint has {name} twice, with and without the prefix of the trainer: leave one out"
            )
        renamed[name] = value
    return renamed


def is_student(weights: StateDict) -> bool:
    """Whether the classifier is the trainer's, which averages all tokens."""
    return any(key.startswith(STUDENT_HEAD) for key in weights)


def student_side(config: Config, default: int) -> int:
    """Side of the student's images in pixels: `student_image_size`, if it differs from the teacher's."""
    return int(config.get("student_image_size") or config.get("image_size") or default)


def set_normalisation(model: nn.Module, config: Config) -> None:
    """Set mean and std in `pretrained_cfg` to 0.5 if the original was trained with `custom_mean_std`, as on anime."""
    if config.get("custom_mean_std"):
        described: dict[str, Any] = vars(model)["pretrained_cfg"]
        described |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
