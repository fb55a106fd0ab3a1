"""The registry of converters from original checkpoints to models of this package, and `from_reference`.

A converter reads one family: it recognises the parameter names of the original, and builds our model with its weights.
The converters are in the other modules of this package. Our own model files are read by `weights`, weights in timm's
names by `models.load_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor, nn

from animesion.errors import UsageError

Config = Mapping[str, Any]
StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Converter:
    """The reader of one family of originals.

    Attributes:
        family: name for messages.
        recognises: whether a config and weights, without prefixes of wrappers, belong to the family.
        build: makes our model with the weights; the last argument is `reference_compat`.
    """

    family: str
    recognises: Callable[[Config, StateDict], bool]
    build: Callable[[Config, StateDict, bool], nn.Module]


#: Registered converters, in the order in which they are asked.
_CONVERTERS: list[Converter] = []

#: Prefixes of all names from wrappers of the originals' trainers.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def register_converter(converter: Converter) -> Converter:
    """Add a converter. The last one registered is asked first, so special families override general ones."""
    _CONVERTERS.insert(0, converter)
    return converter


def from_reference(config: Config, state_dict: StateDict, *, reference_compat: bool = True) -> nn.Module:
    """Make a model of ours with the same outputs as an original checkpoint.

    Args:
        config: settings of the original (`model_name`, `num_classes`, `image_size`, and others that do not follow from
            the weights).
        state_dict: weights under the original's names, with or without prefixes of wrappers.
        reference_compat: reproduce what we consider faults of the original.

    Returns:
        The model in evaluation mode; `model(x)` maps normalised images (B, 3, H, W) to logits (B, num_classes). A ViLT
        reads token ids (B, T) as well: `model(x, text, with_tags=True)` gives those logits and the logits of tags
        (B, T, V).

    Raises:
        UsageError: an unknown family, or parameters that the family does not have; the message lists the first ones.
    """
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UsageError("a reference checkpoint is a mapping from names to tensors: pass the weights alone")
    weights = _unwrap(state_dict)
    for converter in _CONVERTERS:
        if converter.recognises(config, weights):
            return converter.build(config, weights, reference_compat).eval()
    names = ", ".join(sorted(weights)[:3])
    families = ", ".join(converter.family for converter in _CONVERTERS)
    raise UsageError(f"this checkpoint ({names}, ...) belongs to none of the known families: {families}")


def _unwrap(state_dict: StateDict) -> dict[str, Tensor]:
    weights = dict(state_dict)
    # twice, because wrappers are nested in any order
    for wrapper in (*_WRAPPERS, *_WRAPPERS):
        # heads may be outside the wrapped model, so a prefix of most names is enough
        if sum(key.startswith(wrapper) for key in weights) > len(weights) // 2:
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def load_all(model: nn.Module, weights: StateDict, family: str) -> None:
    """Load weights whose names and shapes must match the model exactly.

    Raises:
        UsageError: they do not; the message lists the first three that differ.
    """
    own = model.state_dict()
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if wrong:
        raise UsageError(
            f"these weights do not match the {family}: {', '.join(wrong[:3])} missing, unknown or of another shape"
        )
    model.load_state_dict(weights)


def set_statistics(model: nn.Module, config: Config) -> None:
    """Set mean and standard deviation of the originals: ImageNet's, or 0.5 with `custom_mean_std`, as on anime."""
    custom = bool(config.get("custom_mean_std"))
    described: dict[str, Any] = vars(model)["pretrained_cfg"]
    described["mean"] = (0.5,) * 3 if custom else timm.data.IMAGENET_DEFAULT_MEAN
    described["std"] = (0.5,) * 3 if custom else timm.data.IMAGENET_DEFAULT_STD
