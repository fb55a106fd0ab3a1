"""CLCA (arXiv 2501.00243): token reductions on timm's vision transformer, with the CLA head, the CLC cache, or both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.cla import CLAHead
from animesion_training.models.heads import IFAHead
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter
from animesion_training.originals.timm_vit import timm_backbone
from animesion_training.tokens.cache import CrossLayerCache
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.reductions.base import reduction_layers
from animesion_training.tokens.reductions.factory import make_reduction

#: The original's name of a method -> ours; a plain transformer is called `vit` in the reference outputs.
_METHODS = {
    "topk": "topk",
    "evit": "evit",
    "ats": "ats",
    "dyvit": "dynamicvit",
    "tome": "tome",
    "dpcknn": "dpcknn",
    "sit": "sit",
    "patchmerger": "patchmerger",
    "sinkhorn": "sinkhorn",
}
#: Our method -> the original's name of a setting -> our name of the option.
_OPTIONS = {
    "dpcknn": {"k_neighbors": "neighbours", "equal_weight": "equal_weight"},
    "sinkhorn": {"sinkhorn_eps": "eps", "cluster_iters": "iterations"},
}
_CACHE_FLAGS = {
    "clc_include_gap": "include_gap",
    "clc_recover_at_last": "recover_at_last",
    "clc_pool_cls": "pool_cls",
    "clc_pool_clr": "pool_clr",
}
#: Pattern of the original's name -> ours, for parameters that are not of the plain transformer.
_NAMES = (
    (r"clr", "plugins.cache.clr"),
    (r"ifa_head\.0\.0\.(weight|bias|running_mean|running_var|num_batches_tracked)", r"head.norm_in.\1"),
    (r"ifa_head\.0\.1\.(weight|bias)", r"head.layers.\1"),
    (r"ifa_head\.0\.2\.(weight|bias|running_mean|running_var|num_batches_tracked)", r"head.norm.\1"),
    (r"ifa_head\.0\.4\.(weight|bias)", r"head.fc.\1"),
    (r"cluster_layers\.(\d+)\.score\.(weight|bias)", r"plugins.reduction.scores.\1.\2"),
    (r"cluster_layers\.(\d+)\.(queries|scale)", r"plugins.reduction.assignments.\1.\2"),
    (r"cluster_layers\.(\d+)\.v", r"plugins.reduction.assignments.\1.centers"),
    (r"cluster_layers\.(\d+)\.(?:norm|weight\.0)\.(weight|bias)", r"plugins.reduction.assignments.\1.norm.\2"),
    (r"cluster_layers\.(\d+)\.weight\.1\.(weight|bias)", r"plugins.reduction.assignments.\1.fc_in.\2"),
    (r"cluster_layers\.(\d+)\.weight\.3\.(weight|bias)", r"plugins.reduction.assignments.\1.fc_out.\2"),
    (r"score_predictor\.(\d+)\.in_conv\.0\.(weight|bias)", r"plugins.reduction.predictors.\1.norm.\2"),
    (r"score_predictor\.(\d+)\.in_conv\.1\.(weight|bias)", r"plugins.reduction.predictors.\1.fc_in.\2"),
    (r"score_predictor\.(\d+)\.out_conv\.(\d)\.(weight|bias)", r"plugins.reduction.predictors.\1.fc_out.\2.\3"),
    (r"head\.(weight|bias)", r"head.\1"),
)
#: Names of the head that sums class tokens with one weight each, in place of CLA's.
_IFA_NAMES = (
    (r"ifa_head\.0\.0\.(weight|bias)", r"head.layers.\1"),
    (r"ifa_head\.0\.3\.(weight|bias)", r"head.norm.\1"),
    (r"ifa_head\.0\.4\.(weight|bias)", r"head.fc.\1"),
)
_PLAIN = re.compile(
    r"cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm|norm_pre)\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|blocks\.\d+\.ls[12]\.gamma"
)
#: Epsilon of the norm in the head that sums class tokens.
_IFA_EPS = 1e-5


def _settings(config: Config) -> dict[str, Any]:
    return {**config, **(config.get("model_kwargs") or {}), **(config.get("args") or {})}


def _method(settings: Mapping[str, Any]) -> str | None:
    """Our name of the reduction, empty for a plain transformer; None if this is not a model of CLCA that we read."""
    name = str(settings.get("kind") or settings.get("model_name") or "")
    known = next((method for method in _METHODS if re.match(rf"{method}(_|$)", name)), None)
    if known is not None:
        return _METHODS[known]
    plain = name == "vit" or (not settings.get("kind") and timm.is_model(name))
    return "" if plain else None


def _is_clca(config: Config, weights: StateDict) -> bool:
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= weights.keys():
        return False
    patterns = [name for name, _ in (*_NAMES, *_IFA_NAMES)]
    ours = all(_PLAIN.fullmatch(key) or any(re.fullmatch(each, key) for each in patterns) for key in weights)
    return ours and _method(_settings(config)) is not None


def _build_clca(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    settings = _settings(config)
    gathering = any(key.startswith("ifa_head.") for key in weights)
    registers = weights["clr"].shape[1] if "clr" in weights else 0
    backbone, positioned = timm_backbone(settings, weights, registers)
    depth, width = len(backbone.blocks), backbone.embed_dim
    layers = reduction_layers(settings.get("reduction_loc"), depth)
    plugins: dict[str, Plugin] = {}
    if method := _method(settings):
        known = _OPTIONS.get(method, {})
        plugins["reduction"] = make_reduction(
            method,
            keep_rate=_rates(settings.get("keep_rate", 1.0)),
            layers=layers,
            depth=depth,
            width=width,
            tokens=backbone.patch_embed.num_patches,
            reference_compat=reference_compat,
            **{ours: settings[theirs] for theirs, ours in known.items() if theirs in settings},
        )
    if settings.get("clc", registers > 0):
        plugins["cache"] = CrossLayerCache(
            width,
            depth=depth,
            layers=layers,
            num_clr=registers,
            positions=positioned,
            reference_compat=reference_compat,
            **{ours: settings[theirs] for theirs, ours in _CACHE_FLAGS.items() if theirs in settings},
        )
    classifier = weights.get("ifa_head.0.4.weight" if gathering else "head.weight")
    if classifier is None:
        raise UsageError("this checkpoint has no classifier: it contains neither `head` nor `ifa_head`")
    model = TokenVisionTransformer(
        backbone,
        plugins,
        num_classes=classifier.shape[0],
        head=_gathering_head(weights, len(layers) + 1, width) if gathering else None,
        gathers=(*layers, depth - 1) if gathering else (),
    )
    load_all(model, _rename(weights, registers if positioned else 0, bool(settings.get("equal_weight"))), "CLCA model")
    size = backbone.patch_embed.img_size
    input_config = {
        "input_size": (backbone.in_chans, *size),
        "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "num_classes": model.num_classes,
        "architecture": "",
    }
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = input_config
    return model


def _rates(keep_rate: Any) -> Any:
    return tuple(keep_rate) if isinstance(keep_rate, list) else keep_rate


def _gathering_head(weights: StateDict, count: int, width: int) -> Any:
    layers = weights.get("ifa_head.0.1.weight")
    if layers is None:
        return lambda num_classes: IFAHead(count, width, num_classes, eps=_IFA_EPS)
    return lambda num_classes: CLAHead(count, width, num_classes, groups=layers.shape[0] // width)


def _rename(weights: StateDict, positions: int, equal_weight: bool) -> dict[str, Tensor]:
    """Rename weights to our names, without those that the original stores and does not use.

    The last `positions` position embeddings belong to the registers of the cache.
    """
    gathering = any(key.startswith("ifa_head.") for key in weights)
    names = _NAMES if "ifa_head.0.1.weight" in weights else (*_IFA_NAMES, *_NAMES)
    renamed = {}
    for key, value in weights.items():
        if gathering and key.startswith(("head.", "norm.")):
            continue  # an unused head, and a norm that only this head would use
        if equal_weight and ".score." in key:
            continue
        if _PLAIN.fullmatch(key):
            renamed[f"backbone.{key}"] = value
            continue
        for pattern, ours in names:
            if match := re.fullmatch(pattern, key):
                renamed[match.expand(ours)] = value
                break
    if positions:
        both = renamed["backbone.pos_embed"]  # (1, N + positions, D)
        renamed["backbone.pos_embed"] = both[:, :-positions]
        renamed["plugins.cache.positions"] = both[:, -positions:]
    return renamed


register_converter(Converter("CLCA model", _is_clca, _build_clca))
