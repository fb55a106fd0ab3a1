"""Checkpoints of the original research systems, turned into models of ours.

A converter knows one family: it recognises the original's parameter names and builds our model with the weights under
ours. A further family registers a converter and changes nothing here. Files of ours are read by `weights`, and weights
in timm's names by `models.load_weights`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.baselines import BASELINES
from animesion_training.models.create import ModelSpec
from animesion_training.models.ifa import IFAVisionTransformer

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Converter:
    """How one family of originals is read.

    Attributes:
        family: name for messages.
        recognises: whether a config and weights, free of wrappers' prefixes, are of this family.
        build: our model, with the weights in it; the last argument is `reference_compat`.
    """

    family: str
    recognises: Callable[[Config, Weights], bool]
    build: Callable[[Config, Weights, bool], nn.Module]


_CONVERTERS: list[Converter] = []

#: What the originals' trainers leave in front of all names.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def register_converter(converter: Converter) -> Converter:
    """Add a family; the last one registered is asked first, so a special family can come after a general one."""
    _CONVERTERS.insert(0, converter)
    return converter


def from_reference(config: Config, state_dict: Weights, *, reference_compat: bool = True) -> nn.Module:
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


def _unwrapped(state_dict: Weights) -> dict[str, Tensor]:
    weights = dict(state_dict)
    for wrapper in (*_WRAPPERS, *_WRAPPERS):
        # heads may sit beside the wrapped model, so one name in front of most of them is enough
        if sum(key.startswith(wrapper) for key in weights) > len(weights) // 2:
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


# -- the vision transformer of Animesion (ISCAS 2022), which GLSim and ILA share ---------------------------------------

#: Pattern of the original's name -> timm's; q, k and v are joined first.
_VIT_NAMES = (
    (r"class_token", "cls_token"),
    (r"positional_embedding\.pos_embedding", "pos_embed"),
    (r"patch_embedding\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"(?:transformer|encoder)\.blocks\.(\d+)\.(norm[12]|attn\.qkv)\.(weight|bias)", r"blocks.\1.\2.\3"),
    (r"(?:transformer|encoder)\.blocks\.(\d+)\.proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"(?:transformer|encoder)\.blocks\.(\d+)\.pwff\.(fc[12])\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    (r"(?:norm|encoder_norm|class_head\.0)\.(weight|bias)", r"norm.\1"),
    (r"(?:fc|head\.head|head|class_head\.1)\.(weight|bias)", r"head.\1"),
    (r"(?:inter_class_head|head\.ifa_head)\.0\.(weight|bias)", r"head.layers.\1"),
    (r"(?:inter_class_head|head\.ifa_head)\.3\.(weight|bias)", r"head.norm.\1"),
    (r"(?:inter_class_head|head\.ifa_head)\.4\.(weight|bias)", r"head.fc.\1"),
)
_VIT_EPS = 1e-12
_QKV = re.compile(r"(.*\.attn)\.proj_q\.(weight|bias)")
#: (width, depth) of the published sizes -> their letter in our names, for models that can be written to a file.
_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}


#: Settings of the same names with which the originals leave the plain forward pass without further parameters.
_DEPARTURES = ("selector", "adapter", "ila", "prompt", "aggregator", "attention_crop", "dynamic_anchor")


def _is_animesion_vit(config: Config, weights: Weights) -> bool:
    stem = weights.get("patch_embedding.weight")
    if stem is None or any(config.get(setting) for setting in _DEPARTURES):
        return False
    plain = config.get("classifier") in (None, "cls", "token", "ifacls")
    apart = config.get("patch_stride") in (None, stem.shape[-1])
    names = (r"transformer\.blocks\.0\.attn\.proj_q\.weight", r"encoder\.blocks\.0\.attn\.proj_q\.weight")
    return plain and apart and any(re.fullmatch(name, key) for name in names for key in weights)


def _build_animesion_vit(config: Config, weights: Weights, reference_compat: bool) -> nn.Module:
    """The weights tell all but the number of heads; residual dropout of the original's training is left out."""
    renamed = _renamed_vit(weights)
    settings = {**config, **(config.get("arch") or {}), **(config.get("args") or {})}
    depth = 1 + max(int(key.split(".")[1]) for key in renamed if key.startswith("blocks."))
    width, channels, *patch = renamed["patch_embed.proj.weight"].shape
    tokens = renamed["pos_embed"].shape[1] - 1
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise UsageError(f"a grid of {tokens} patches is not square: this family has square pictures only")
    ifa = "head.layers.weight" in renamed
    last = renamed.get("head.fc.weight" if ifa else "head.weight")
    if last is None:
        raise UsageError("this checkpoint has no classifier: neither `fc` nor `inter_class_head` is in it")
    num_classes = last.shape[0]
    model: Any = VisionTransformer(
        img_size=(grid * patch[0], grid * patch[1]),
        patch_size=(patch[0], patch[1]),
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=int(settings.get("num_attention_heads") or max(1, width // 64)),
        mlp_ratio=renamed["blocks.0.mlp.fc1.weight"].shape[0] / width,
        final_norm="norm.weight" in renamed,
        norm_layer=partial(nn.LayerNorm, eps=_VIT_EPS),
    )
    if ifa:
        model = IFAVisionTransformer(model, num_classes)
        renamed = {key if key.startswith("head.") else f"backbone.{key}": value for key, value in renamed.items()}
    _load(model, renamed, "animesion vision transformer")
    side = int(settings.get("image_size") or grid * patch[0])
    if side != grid * patch[0]:
        model.set_input_size(img_size=(side, side))
    _describe_vit(model, f"vit_{_SIZES.get((width, depth), '')}_patch{patch[0]}", side, num_classes, ifa)
    built: nn.Module = model
    return built


def _renamed_vit(weights: Weights) -> dict[str, Tensor]:
    joined = dict(weights)
    for key in weights:
        if match := _QKV.fullmatch(key):
            block, kind = match.groups()
            try:
                parts = [joined.pop(f"{block}.proj_{letter}.{kind}") for letter in "qkv"]
            except KeyError as error:
                raise UsageError(f"this checkpoint lacks {error.args[0]}, its attention is incomplete") from None
            joined[f"{block}.qkv.{kind}"] = torch.cat(parts)
    renamed, unknown = {}, []
    for key, value in joined.items():
        for pattern, ours in _VIT_NAMES:
            if match := re.fullmatch(pattern, key):
                renamed[match.expand(ours)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise UsageError(
            f"this checkpoint has {len(unknown)} parameters beyond the plain vision transformer and its heads: "
            f"{', '.join(sorted(unknown)[:3])}"
        )
    if absent := [key for key in ("pos_embed", "cls_token", "patch_embed.proj.weight") if key not in renamed]:
        raise UsageError(f"this checkpoint lacks the weights for {', '.join(absent)}")
    return renamed


def _load(model: nn.Module, weights: Weights, family: str) -> None:
    own = model.state_dict()
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if wrong:
        raise UsageError(f"weights do not make up an {family}: {', '.join(wrong[:3])} missing, unknown or misshapen")
    model.load_state_dict(weights)


def _describe_vit(model: nn.Module, short: str, side: int, num_classes: int, ifa: bool) -> None:
    """The originals normalise with mean and deviation 0.5; a published size also gets a spec, so it can be saved."""
    config: dict[str, Any] = {"input_size": (3, side, side), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config |= {"interpolation": "bilinear", "num_classes": num_classes, "architecture": ""}
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config
    if short not in BASELINES:
        return
    spec = ModelSpec(short, num_classes, side, "ifa" if ifa else "linear", norm_eps=_VIT_EPS)
    with torch.device("meta"):
        published = spec.build().state_dict()
    own = model.state_dict()
    if {key: value.shape for key, value in published.items()} == {key: value.shape for key, value in own.items()}:
        config["architecture"] = f"{short}_ifa" if ifa else BASELINES[short]
        vars(model)["spec"] = spec


register_converter(Converter("animesion vision transformer", _is_animesion_vit, _build_animesion_vit))
