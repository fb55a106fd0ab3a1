"""The teachers of TGDA: a timm backbone with the head of counterfactual attention learning (CAL)."""

from __future__ import annotations

from typing import Any

from torch import nn

from animesion.errors import UsageError
from animesion_training.models.create import create_model
from animesion_training.originals.animesion_vit import VIT_EPS, split_vit
from animesion_training.originals.backbones import backbone_name
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter, set_statistics

_ENCODER, _HEAD = "encoder.", "dfsm."
_ATTENTION, _CLASSIFIER = "dfsm.attentions.conv.weight", "dfsm.fc.weight"


def _is_cal(config: Config, weights: StateDict) -> bool:
    return _ATTENTION in weights and _CLASSIFIER in weights


def _build_cal(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    """The config must have the name of the backbone; the size of images is also known from it alone."""
    name = backbone_name(config)
    encoder = {key.removeprefix(_ENCODER): value for key, value in weights.items() if key.startswith(_ENCODER)}
    head = {f"head.{key.removeprefix(_HEAD)}": value for key, value in weights.items() if key.startswith(_HEAD)}
    if unknown := sorted(key for key in weights if not key.startswith((_ENCODER, _HEAD))):
        raise UsageError(f"this CAL teacher has parameters beyond encoder and head: {', '.join(unknown[:3])}")
    if encoder and all(key.startswith("0.") for key in encoder):  # transformers are the first module, before a reshape
        encoder = {key.removeprefix("0."): value for key, value in encoder.items()}
    maps, channels = weights[_ATTENTION].shape[:2]
    options: dict[str, Any] = {"num_maps": int(maps)} if maps != 32 else {}
    built: dict[str, Any] = {}
    if "patch_embedding.weight" in encoder:  # the originals' own transformer
        encoder, others = split_vit(encoder, class_token=False)
        if others:
            raise UsageError(
                f"the transformer of this CAL teacher has further parameters: {', '.join(sorted(others)[:3])}"
            )
        built["norm_eps"] = VIT_EPS
    # the original builds its transformers without pooling, and most of them without a class token
    if "pos_embed" in encoder:
        built |= {"class_token": "cls_token" in encoder, "global_pool": ""}
    model: Any = create_model(
        name,
        weights[_CLASSIFIER].shape[0],
        config.get("image_size"),
        selector="cal",
        method_options={"selector": options} if options else None,
        **built,
    )
    if model.head.in_features != channels:
        raise UsageError(
            f"{name} has {model.head.in_features} channels, the backbone of this CAL teacher has {channels}"
        )
    load_all(model, model.adapt_state_dict(encoder) | head, "CAL teacher")
    set_statistics(model, config)
    result: nn.Module = model
    return result


register_converter(Converter("CAL teacher", _is_cal, _build_cal))
