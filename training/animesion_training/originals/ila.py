"""ILA (arXiv 2409.11051) and the methods of its repository, on its own transformer and on timm's.

Adapters, prompts, queries, part selection and heads on the patches; TransFG and FFVT also as GLSim's repository has
them. Plug-ins are made in `ila_plugins`. The plain transformer and IFA are read by `animesion_vit`, methods with two
passes by `glsim`, the head of CAL by `cal_head`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.heads import IFAHead
from animesion_training.originals.animesion_vit import bare_vit, split_vit, vit_settings
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter
from animesion_training.originals.ila_plugins import (
    BOTTLENECK,
    FAMILY,
    NormBeforeLast,
    make_adapters,
    make_ila,
    make_prompts,
    make_selector,
    pop_bottlenecks,
)
from animesion_training.originals.timm_vit import timm_backbone
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.overlapping_patches import overlap_patches
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.pooling import AveragePoolHead, BilinearHead, MPNCOVHead

_OWN, _TIMM = "patch_embedding.weight", "patch_embed.proj.weight"

#: Pattern of names in TransFG's and FFVT's own repositories -> ILA's names, applied in this order. Not tested with a
#: published checkpoint.
_PUBLISHED_NAMES = (
    (r"^transformer\.embeddings\.patch_embeddings\.", "patch_embedding."),
    (r"^transformer\.embeddings\.cls_token$", "class_token"),
    (r"^transformer\.embeddings\.position_embeddings$", "positional_embedding.pos_embedding"),
    (r"^transformer\.encoder\.layer\.", "encoder.blocks."),
    (r"^transformer\.encoder\.(?:part_layer|ff_last_layer)\.", "aggregator.blocks.0."),
    (r"^transformer\.encoder\.(?:part_norm|ff_encoder_norm)\.", "aggregator_norm."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"\.ffn\.", ".pwff."),
    (r"\.attn\.out\.", ".proj."),
    (r"\.attn\.query\.", ".attn.proj_q."),
    (r"\.attn\.key\.", ".attn.proj_k."),
    (r"\.attn\.value\.", ".attn.proj_v."),
    (r"^(?:part|ff)_head\.", "head."),
)

_HEADS_ON_PATCHES = ("pool", "avg", "gap", "blp", "lrblp", "mpncov")

#: The encoder's norm, if the last block is separate and has its own norm after it.
_BETWEEN_NORM = "between_norm"

_NORMALISE = {True: ((0.5,) * 3, (0.5,) * 3), False: (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)}


def _settings(config: Config) -> dict[str, Any]:
    return vit_settings({**config, **(config.get("model_kwargs") or {})})


def _selector(settings: Mapping[str, Any]) -> str:
    """Our name of the original's part selector, empty for no selector."""
    values = " ".join(str(settings.get(key) or "") for key in ("selector", "model", "model_name", "method")).lower()
    for ours, theirs in (("transfg", ("transfg", "psm")), ("ffvt", ("ffvt", "maws"))):
        if any(name in values for name in theirs):
            return ours
    return ""


def _unify_names(weights: StateDict) -> dict[str, Tensor]:
    """Rename weights of TransFG's and FFVT's repositories to ILA's names; remove prefixes of timm's transformers."""
    for key in weights:
        if key.endswith(f".{_TIMM}"):
            wrapper = key.removesuffix(_TIMM)
            return {name.removeprefix(wrapper): value for name, value in weights.items()}
    if "transformer.embeddings.position_embeddings" not in weights:
        return dict(weights)
    renamed = {}
    for key, value in weights.items():
        for pattern, ours in _PUBLISHED_NAMES:
            key = re.sub(pattern, ours, key)
        renamed[key] = value
    return renamed


def _is_ila(config: Config, weights: StateDict) -> bool:
    settings, weights = _settings(config), _unify_names(weights)
    if _OWN not in weights and _TIMM not in weights:
        return False
    if settings.get("dynamic_anchor") or settings.get("attention_crop") or "cls_token_crops" in weights:
        return False
    if _TIMM in weights and any(key.startswith("aggregator.") for key in weights):
        return False
    added = any(key.endswith((BOTTLENECK, "prompt")) for key in weights)
    return added or bool(_selector(settings)) or settings.get("classifier") in _HEADS_ON_PATCHES


def _build_ila(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    settings, weights = _settings(config), _unify_names(weights)
    own = _OWN in weights
    backbone, renamed, others = _own_backbone(settings, weights) if own else _timm_backbone(settings, weights)
    depth, width = len(backbone.blocks), backbone.embed_dim
    # parameters move from `others` to plug-ins and head; those that remain are unknown
    bottlenecks = pop_bottlenecks(others)
    inside = {stem: parts for stem, parts in bottlenecks.items() if re.search(r"(^|\.)blocks\.\d+\.", stem)}
    between = {stem: parts for stem, parts in bottlenecks.items() if stem not in inside}
    plugins: dict[str, tuple[Plugin, dict[str, Tensor]]] = {}
    if selector := _selector(settings):
        plugins["selector"] = (make_selector(selector, settings, depth, reference_compat), {})
        if f"{_BETWEEN_NORM}.weight" in others:
            norm = {f"norm.{leaf}": others.pop(f"{_BETWEEN_NORM}.{leaf}") for leaf in ("weight", "bias")}
            plugins["norm"] = (NormBeforeLast(backbone.norm, depth), norm)
    if between:
        plugins["ila"] = make_ila(settings, between, depth, width, backbone.patch_embed.grid_size, own)
    if inside:
        plugins["adapters"] = make_adapters(settings, inside, depth, width)
    for key in [key for key in others if key.endswith("prompt")]:
        plugins |= make_prompts(settings, others.pop(key), depth, width, renamed)
    classifier, head = _head(settings, renamed, others, width, depth)
    if others:
        raise UsageError(f"this {FAMILY} has unknown parameters: {', '.join(sorted(others)[:3])}")
    model = TokenVisionTransformer(
        backbone, {name: plugin for name, (plugin, _) in plugins.items()}, _num_classes(head), **classifier
    )
    ours = {f"backbone.{key}": value for key, value in renamed.items()} | head
    for name, (_, parameters) in plugins.items():
        ours |= {f"plugins.{name}.{key}": value for key, value in parameters.items()}
    load_all(model, ours, FAMILY)
    side = _side(settings)
    # positions are resampled only after loading, as the weights are for the size of training
    if side and backbone.patch_embed.img_size != (side, side):
        backbone.set_input_size(img_size=(side, side))
    _describe(model, settings)
    return model


# -- transformers ------------------------------------------------------------------------------------------------------


def _own_backbone(settings: Mapping[str, Any], weights: StateDict) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The originals' own transformer, its weights under timm's names without a head, and all other weights."""
    renamed, others = split_vit(weights, class_token=False)
    _append_last_block(renamed, others)
    heads = settings.get("num_attention_heads") or settings.get("heads")
    backbone = bare_vit(renamed, {"num_attention_heads": heads})
    _overlap(backbone, settings)
    others |= {key: renamed.pop(key) for key in list(renamed) if key.startswith("head.")}
    return backbone, renamed, others


def _timm_backbone(settings: Mapping[str, Any], weights: StateDict) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The same for a transformer of timm."""
    heads = settings.get("num_heads") or settings.get("num_attention_heads") or settings.get("heads")
    backbone, _ = timm_backbone({**settings, "num_heads": heads}, weights)
    plain = backbone.state_dict()
    renamed = {key: value for key, value in weights.items() if key in plain}
    return backbone, renamed, {key: value for key, value in weights.items() if key not in plain}


def _append_last_block(renamed: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Make the separate block of part selectors, which processes the parts, the last one; its norm is the final norm.

    Parameters are moved from `others` to `renamed`.
    """
    last = next((key.removesuffix("attn.qkv.weight") for key in others if key.endswith(".attn.qkv.weight")), None)
    if last is None:
        return
    depth = 1 + max(int(key.split(".")[1]) for key in renamed if key.startswith("blocks."))
    for key in [key for key in others if key.startswith(last)]:
        ours = key.removeprefix(last)
        ours = re.sub(r"^proj\.", "attn.proj.", ours).replace("pwff.", "mlp.")
        renamed[f"blocks.{depth}.{ours}"] = others.pop(key)
    norms = {stem for key in others if re.fullmatch(r".*norm\w*", stem := key.rpartition(".")[0])}
    if len(norms) != 1:
        return
    if "norm.weight" in renamed:  # the encoder's own norm then precedes the last block
        others |= {f"{_BETWEEN_NORM}.{leaf}": renamed.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
    renamed |= {f"norm.{leaf}": others.pop(f"{stem}.{leaf}") for stem in norms for leaf in ("weight", "bias")}


def _side(settings: Mapping[str, Any]) -> int:
    """Side of the images in pixels; 0 if the settings have none, or images are not square."""
    size = settings.get("image_size") or settings.get("img_size")
    return size if isinstance(size, int) else 0


def _overlap(backbone: Any, settings: Mapping[str, Any]) -> None:
    """Use overlapping patches if the number of positions does not match the size of images otherwise."""
    side, embed = _side(settings), backbone.patch_embed
    patch, rows = embed.patch_size[0], embed.grid_size[0]
    stride = settings.get("patch_stride") or settings.get("slide_step") or settings.get("slide")
    if not side or side // patch == rows or stride == patch:
        return
    # the settings may lack the stride, or name another one: the number of positions decides
    fitting = [each for each in range(1, patch) if (side - patch) // each + 1 == rows]
    if fitting:
        overlap_patches(backbone, stride if stride in fitting else fitting[0], (side, side))


# -- heads -------------------------------------------------------------------------------------------------------------


def _head(
    settings: Mapping[str, Any], renamed: StateDict, others: dict[str, Tensor], width: int, depth: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of the host for the head, and the weights of the head, which are removed from `others`."""
    name = str(settings.get("classifier") or "cls")
    on_patches = name in _HEADS_ON_PATCHES
    parts = {key: others.pop(key) for key in list(others) if on_patches or key.startswith("head.")}
    if "head.layers.weight" in parts:
        return {
            "head": lambda num_classes: IFAHead(depth, width, num_classes),
            "gathers": range(depth),
        }, parts
    if not on_patches:
        return {}, parts
    found = _layers(parts)
    matrices = [stem for stem, leaves in found.items() if leaves.get("weight", torch.empty(0)).dim() >= 2]
    # the classifier is the last layer; only it may have a number of inputs other than the number of channels
    last = max(matrices, key=lambda stem: (_inputs(found[stem]) != width, matrices.index(stem)))
    ours = {f"head.fc.{leaf}": value for leaf, value in found.pop(last).items()}
    dim = None
    for leaves in found.values():
        projects = leaves["weight"].dim() >= 2
        dim = len(leaves["weight"]) if projects else dim
        for leaf, value in leaves.items():
            ours[f"head.{'project' if projects else 'norm'}.{leaf}"] = value.flatten(1) if value.dim() > 2 else value
    if name == "mpncov":
        options = {} if dim is None else {"dim": dim}
        return {"head": lambda num_classes: MPNCOVHead(width, num_classes, **options), "reads": "patches"}, ours
    if name in ("blp", "lrblp"):
        return {"head": lambda num_classes: BilinearHead(width, num_classes, dim), "reads": "patches"}, ours
    return {"head": lambda num_classes: AveragePoolHead(width, num_classes), "reads": "patches"}, ours


def _layers(parts: StateDict) -> dict[str, dict[str, Tensor]]:
    """Group parameters by their module: name of the module -> name within it -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in parts.items():
        stem, _, leaf = key.rpartition(".")
        found.setdefault(stem, {})[leaf] = value
    return found


def _inputs(leaves: StateDict) -> int:
    return leaves["weight"].shape[1]


def _num_classes(head: StateDict) -> int:
    weight = next((head[key] for key in ("head.fc.weight", "head.weight") if key in head), None)
    if weight is None:
        raise UsageError(f"this {FAMILY} has no classifier: it does not contain `head`")
    return len(weight)


def _describe(model: TokenVisionTransformer, settings: Mapping[str, Any]) -> None:
    """Set the config: the size of images, and the statistics that the originals' trainer normalises by."""
    host: Any = model.backbone
    mean, std = _NORMALISE[bool(settings.get("custom_mean_std"))]
    config: dict[str, Any] = {"input_size": (host.in_chans, *host.patch_embed.img_size), "mean": mean, "std": std}
    config |= {"interpolation": "bicubic", "num_classes": model.num_classes, "architecture": ""}
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config


register_converter(Converter(FAMILY, _is_ila, _build_ila))
