"""Checkpoints of the original research systems, turned into models of ours.

A converter knows one family: it recognises the original's parameter names and builds our model with the weights under
ours. The families are in `originals`, one module each; a further one registers a converter and changes nothing here.
Files of ours are read by `weights`, and weights in timm's names by `models.load_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from animesion.errors import UsageError

Config = Mapping[str, Any]
StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Converter:
    """How one family of originals is read.

    Attributes:
        family: name for messages.
        recognises: whether a config and weights, free of wrappers' prefixes, are of this family.
        build: our model, with the weights in it; the last argument is `reference_compat`.
    """

    family: str
    recognises: Callable[[Config, StateDict], bool]
    build: Callable[[Config, StateDict, bool], nn.Module]


_CONVERTERS: list[Converter] = []

#: What the originals' trainers leave in front of all names.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def register_converter(converter: Converter) -> Converter:
    """Add a family; the last one registered is asked first, so a special family can come after a general one."""
    _CONVERTERS.insert(0, converter)
    return converter


def from_reference(config: Config, state_dict: StateDict, *, reference_compat: bool = True) -> nn.Module:
    """A model of ours that computes what an original checkpoint computes.

    Args:
        config: the original's own settings (`model_name`, `num_classes`, `image_size`, and what it needs to tell what
            the weights do not).
        state_dict: weights in the original's names, with or without wrappers' prefixes.
        reference_compat: reproduce behaviour of the original that we hold to be a fault.

    Returns:
        The model in evaluation mode; `model(x)` takes normalised images (B, 3, H, W) to logits (B, num_classes).

    Raises:
        UsageError: no family that we read, or parameters that the family does not have; the first ones are named.
    """
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UsageError("a reference checkpoint is a mapping from names to tensors: give the weights alone")
    weights = _unwrapped(state_dict)
    for converter in _CONVERTERS:
        if converter.recognises(config, weights):
            return converter.build(config, weights, reference_compat).eval()
    names = ", ".join(sorted(weights)[:3])
    families = ", ".join(converter.family for converter in _CONVERTERS)
    raise UsageError(f"this checkpoint ({names}, ...) is of no family that is read here: {families}")


def _unwrapped(state_dict: StateDict) -> dict[str, Tensor]:
    weights = dict(state_dict)
    for wrapper in (*_WRAPPERS, *_WRAPPERS):
        # heads may sit beside the wrapped model, so one name in front of most of them is enough
        if sum(key.startswith(wrapper) for key in weights) > len(weights) // 2:
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def load_all(model: nn.Module, weights: StateDict, family: str) -> None:
    """Load weights that must be exactly the model's, in names and shapes.

    Raises:
        UsageError: they are not; the first three that differ are named.
    """
    own = model.state_dict()
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if wrong:
        raise UsageError(f"weights do not make up an {family}: {', '.join(wrong[:3])} missing, unknown or misshapen")
    model.load_state_dict(weights)
