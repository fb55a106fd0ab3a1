"""CLCA (arXiv 2501.00243): token reductions on timm's vision transformer, with the CLA head, the CLC cache, or both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.cla import CLAHead
from animesion_training.models.heads import IFAHead
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter
from animesion_training.tokens.cache import CrossLayerCache
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.reductions.base import reduction_layers
from animesion_training.tokens.reductions.factory import make_reduction

#: The original's name of a method -> ours; plain transformers are called `vit` in the golden cases.
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
#: Our method -> its options by the original's name of the setting.
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
#: Pattern of the original's name -> ours, for what stands beside the plain transformer.
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
#: The head that adds up class tokens by one weight each, in place of CLA's.
_IFA_NAMES = (
    (r"ifa_head\.0\.0\.(weight|bias)", r"head.layers.\1"),
    (r"ifa_head\.0\.3\.(weight|bias)", r"head.norm.\1"),
    (r"ifa_head\.0\.4\.(weight|bias)", r"head.fc.\1"),
)
_PLAIN = re.compile(
    r"cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm|norm_pre)\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|blocks\.\d+\.ls[12]\.gamma"
)
#: Epsilon of layer norms: CLIP's transformers, which begin with a norm, have torch's, timm's others 1e-6.
_EPS, _CLIP_EPS, _IFA_EPS = 1e-6, 1e-5, 1e-5


def _settings(config: Config) -> dict[str, Any]:
    return {**config, **(config.get("model_kwargs") or {}), **(config.get("args") or {})}


def _method(settings: Mapping[str, Any]) -> str | None:
    """Our name of the reduction, empty for a plain transformer, None where this is no model of CLCA's that we read."""
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
        raise UsageError("this checkpoint has no classifier: neither `head` nor `ifa_head` is in it")
    model = TokenVisionTransformer(
        backbone,
        plugins,
        num_classes=classifier.shape[0],
        head=_gathering_head(weights, len(layers) + 1, width) if gathering else None,
        gathers=(*layers, depth - 1) if gathering else (),
    )
    load_all(model, _renamed(weights, registers if positioned else 0, bool(settings.get("equal_weight"))), "CLCA model")
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


def _rates(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def timm_backbone(settings: Mapping[str, Any], weights: StateDict, registers: int = 0) -> tuple[Any, bool]:
    """The plain transformer that weights in timm's names are for, and whether its class token has a position.

    Args:
        settings: `num_heads`, if they are not of width 64; `img_size`, if images are not square.
        weights: of the transformer, and of what else there is.
        registers: tokens beside its own that have positions if the class token has.

    Raises:
        UsageError: the positions are those of no grid.
    """
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    width, channels, *patch = weights["patch_embed.proj.weight"].shape
    reg_tokens = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    rows = weights["pos_embed"].shape[1]
    clip = "norm_pre.weight" in weights
    prefix = 1 + reg_tokens + registers
    grid = _grid(settings, (patch[0], patch[1]), rows, prefix)
    embedded = rows == grid[0] * grid[1] + prefix
    backbone = VisionTransformer(
        img_size=(grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=(patch[0], patch[1]),
        in_chans=channels,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=int(settings.get("num_heads") or max(1, width // 64)),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        init_values=1e-6 if "blocks.0.ls1.gamma" in weights else None,
        no_embed_class=not embedded,
        reg_tokens=reg_tokens,
        pre_norm=clip,
        norm_layer=partial(nn.LayerNorm, eps=_CLIP_EPS if clip else _EPS),
    )
    return backbone, embedded


def _grid(settings: Mapping[str, Any], patch: tuple[int, int], rows: int, prefix: int) -> tuple[int, int]:
    """The grid whose patches, with or without the prefix, have this many positions; as told, else a square one."""
    told = settings.get("img_size") or settings.get("image_size")
    sides = {round(count**0.5) for count in (rows, rows - prefix) if count > 0}
    grids = [(side, side) for side in sorted(sides, reverse=True)]
    if told:
        height, width = told if isinstance(told, list | tuple) else (told, told)
        grids = [(int(height) // patch[0], int(width) // patch[1])]
    for grid in grids:
        if rows - grid[0] * grid[1] in (0, prefix):
            return grid
    raise UsageError(
        f"this checkpoint has {rows} positions, which fit neither a square image nor the image size {told}: "
        "give the image size that it was trained at"
    )


def _gathering_head(weights: StateDict, count: int, width: int) -> Any:
    layers = weights.get("ifa_head.0.1.weight")
    if layers is None:
        return lambda num_classes: IFAHead(count, width, num_classes, eps=_IFA_EPS)
    return lambda num_classes: CLAHead(count, width, num_classes, groups=layers.shape[0] // width)


def _renamed(weights: StateDict, positions: int, equal_weight: bool) -> dict[str, Tensor]:
    """Weights under our names; those that the original holds and does not use are left out."""
    gathering = any(key.startswith("ifa_head.") for key in weights)
    names = _NAMES if "ifa_head.0.1.weight" in weights else (*_IFA_NAMES, *_NAMES)
    renamed = {}
    for key, value in weights.items():
        if gathering and key.startswith(("head.", "norm.")):
            continue  # the head from before, and a norm that it alone would see
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
        joint = renamed["backbone.pos_embed"]
        renamed["backbone.pos_embed"] = joint[:, :-positions]
        renamed["plugins.cache.positions"] = joint[:, -positions:]
    return renamed


register_converter(Converter("CLCA model", _is_clca, _build_clca))
