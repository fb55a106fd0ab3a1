"""What the original checkpoints of TGDA's students have in common, LRNet and ViTFS: wrapper, sizes, normalisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.originals.base import Config, StateDict

#: Where the original's trainer keeps a student's linear classifier, beside its encoder.
STUDENT_HEAD = "dfsm.1."


def without_wrapper(weights: StateDict, encoder: str, head: str) -> dict[str, Tensor]:
    """Names as in the bare network: the prefix `encoder` off, and the trainer's classifier called `head`.

    Raises:
        UsageError: two tensors would get the same name, as with a classifier in both places.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix(encoder)
        if name.startswith(STUDENT_HEAD):
            name = head + name.removeprefix(STUDENT_HEAD)
        if name in renamed:
            raise UsageError(f"this checkpoint has {name} twice, with the trainer's names and without: leave one out")
        renamed[name] = value
    return renamed


def is_student(weights: StateDict) -> bool:
    """Whether the classifier is the trainer's: it averages all tokens that it is given."""
    return any(key.startswith(STUDENT_HEAD) for key in weights)


def student_side(config: Config, default: int) -> int:
    """Side of the student's images in pixels: `student_image_size` where the teacher's is another."""
    return int(config.get("student_image_size") or config.get("image_size") or default)


def normalise(model: nn.Module, config: Config) -> None:
    """Let `pretrained_cfg` tell 0.5 and 0.5 where the original was trained with `custom_mean_std`, as on anime."""
    if config.get("custom_mean_std"):
        described: dict[str, Any] = vars(model)["pretrained_cfg"]
        described |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
