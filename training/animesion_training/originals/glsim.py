"""GLSim (arXiv 2407.12891) in both of its implementations and ILA's copy, and ILA's RAMS-Trans."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import timm
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.originals.animesion_vit import bare_vit, split_vit, vit_settings
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter
from animesion_training.originals.timm_vit import timm_backbone
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.twopass import GLSim, RAMSTrans, TwoPassTransformer

_FAMILY = "GLSim model"
_CLASSIFIERS = {"cls": "cls", "avg_cls": "avg", "max_cls": "max"}
#: Names of the class token for crops, in the originals' own transformer and in timm's.
_ANCHOR, _CROP_TOKEN = "anchor_class_token", "cls_token_crops"
#: Names of selectors by attention rollout in ILA's repository.
_ROLLOUTS = ("rollout", "attention_rollout", "rams", "ramstrans")
#: Side of images in pixels from which ILA's copy of GLSim selects twice as many patches.
_LARGE = 448
_NORMALISE = {True: ((0.5,) * 3, (0.5,) * 3), False: (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)}

Kind = Literal["vit", "timm", "rams"]


def _settings(config: Config) -> dict[str, Any]:
    return vit_settings({**config, **(config.get("model_kwargs") or {})})


def _kind(config: Config, weights: StateDict) -> Kind | None:
    """The implementation that a checkpoint belongs to; None for other families."""
    settings = _settings(config)
    name = settings.get("model")
    if "patch_embedding.weight" in weights:
        if settings.get("attention_crop") or settings.get("selector") in _ROLLOUTS:
            return "rams"
        bare = name is None and not settings.get("selector") and _ANCHOR in weights
        return "vit" if name == "ViTGLSim" or settings.get("dynamic_anchor", bare) else None
    if "patch_embed.proj.weight" in weights:
        named = name == "TIMMGLSViT" or str(settings.get("model_name", "")).startswith("gls")
        return "timm" if named or _CROP_TOKEN in weights else None
    return None


def _build(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    settings = _settings(config)
    builders = {"vit": _vit, "timm": _timm, "rams": _rams}
    kind = _kind(config, weights)
    if kind is None:
        raise UsageError("this checkpoint is not a GLSim model")
    model = builders[kind](settings, weights, reference_compat)
    _describe(model, settings)
    return model


# -- the originals' own transformer ----------------------------------------------------------------------------------


def _vit(settings: Mapping[str, Any], weights: StateDict, reference_compat: bool) -> GLSim:
    renamed, others = split_vit(weights)
    anchor = others.pop(_ANCHOR, None)
    aggregator = {key: others.pop(key) for key in list(others) if key.startswith("aggregator")}
    reduce = _linear(others)
    blocks = {key.split(".")[2] for key in aggregator if key.startswith("aggregator.blocks.")}
    # GLSim never reads its second class token; ILA's copy uses it in the pass over crops
    of_ila = "ila" in settings
    own = settings.get("anchor_class_token") and of_ila and anchor is not None
    model = GLSim(
        _encoder(renamed, settings, with_head=False),
        _num_classes(renamed),
        top=_top(settings, doubles=of_ila),
        metric=settings.get("sim_metric") or "cos",
        classifier=_classifier(settings),
        representation=reduce["weight"].shape[0] if reduce else None,
        aggregator="transformer" if blocks else None,
        aggregator_depth=max(1, len(blocks)),
        aggregator_heads=settings.get("agg_heads"),
        anchor_random=bool(settings.get("anchor_random")),
        crop_class_token=bool(own),
        reference_compat=reference_compat,
    )
    head = {key: renamed.pop(key) for key in list(renamed) if key.startswith("head.")}
    ours = {f"encoder.backbone.{key}": value for key, value in renamed.items()} | head
    ours |= {f"reduce.{leaf}": value for leaf, value in reduce.items()}
    for key, value in aggregator.items():  # blocks and the norm after them are one sequence here
        key = re.sub(r"^aggregator_norm\.", f"aggregator.{len(blocks)}.", key)
        key = re.sub(r"^aggregator\.blocks\.(\d+)\.proj\.", r"aggregator.\1.attn.proj.", key)
        key = re.sub(r"^aggregator\.blocks\.(\d+)\.pwff\.", r"aggregator.\1.mlp.", key)
        ours[re.sub(r"^aggregator\.blocks\.", "aggregator.", key)] = value
    if own and anchor is not None:
        ours["crop_class_token"] = anchor
    load_all(model, ours, _FAMILY)
    return model


def _rams(settings: Mapping[str, Any], weights: StateDict, reference_compat: bool) -> RAMSTrans:
    mode = settings.get("crop_mode") or "crop"
    if mode != "crop":
        raise UsageError(f"RAMS-Trans with crop_mode {mode!r} is not supported, only crop")
    renamed, others = split_vit(weights)
    anchor = others.pop(_ANCHOR, None)
    if others:
        raise UsageError(f"this RAMS-Trans has parameters beyond a transformer's: {', '.join(sorted(others)[:3])}")
    own = settings.get("anchor_class_token") and anchor is not None
    by_threshold = bool(settings.get("attention_crop"))
    model = RAMSTrans(
        _encoder(renamed, settings, with_head=True),
        _num_classes(renamed),
        threshold=float(settings.get("crop_attention_th", 0.5)),
        relative_to="max" if settings.get("crop_th_max") else "mean",
        pool=int(settings.get("attention_pool_size") or 1) if by_threshold else 1,
        top=None if by_threshold else _top(settings, doubles=True),
        crop_class_token=bool(own),
        reference_compat=reference_compat,
    )
    ours = {key if key.startswith("head.") else f"backbone.{key}": value for key, value in renamed.items()}
    ours = {f"encoder.{key}": value for key, value in ours.items()}
    if own and anchor is not None:
        ours["crop_class_token"] = anchor
    load_all(model, ours, "RAMS-Trans")
    return model


def _encoder(renamed: StateDict, settings: Mapping[str, Any], *, with_head: bool) -> TokenVisionTransformer:
    heads = settings.get("num_attention_heads") or settings.get("heads")
    backbone = bare_vit(renamed, {"num_attention_heads": heads})
    return TokenVisionTransformer(backbone, {}, _num_classes(renamed) if with_head else 0)


def _num_classes(renamed: StateDict) -> int:
    if "head.weight" not in renamed:
        raise UsageError("this checkpoint has no classifier: it does not contain `head.weight`")
    return renamed["head.weight"].shape[0]


def _top(settings: Mapping[str, Any], *, doubles: bool) -> int:
    if settings.get("dynamic_top"):
        return int(settings["dynamic_top"])
    top = int(settings.get("selector_num_tokens") or 8)
    return 2 * top if doubles and int(settings.get("image_size") or 0) >= _LARGE else top


def _classifier(settings: Mapping[str, Any]) -> Any:
    name = settings.get("classifier") or "cls"
    if name not in _CLASSIFIERS:
        raise UsageError(
            f"the classifier {name!r} of this checkpoint is not supported: GLSim has {', '.join(_CLASSIFIERS)}"
        )
    return _CLASSIFIERS[name]


def _linear(others: dict[str, Tensor]) -> dict[str, Tensor]:
    """The remaining parameters if they are one linear layer, as `weight` and `bias`; empty if none remain.

    Raises:
        UsageError: other parameters remain.
    """
    leaves = {key.rpartition(".")[2]: value for key, value in others.items()}
    modules = {key.rpartition(".")[0] for key in others}
    if others and (len(modules) > 1 or leaves.keys() != {"weight", "bias"} or leaves["weight"].ndim != 2):
        raise UsageError(
            f"this GLSim model has {len(others)} parameters beyond encoder, aggregator and head: "
            f"{', '.join(sorted(others)[:3])}"
        )
    return leaves


# -- timm's transformers ---------------------------------------------------------------------------------------------


def _timm(settings: Mapping[str, Any], weights: StateDict, reference_compat: bool) -> GLSim:
    if settings.get("adapter"):
        raise UsageError("GLSim checkpoints with adapters inside blocks are not supported")
    inner, outer = dict(weights), {}
    token = inner.pop(_CROP_TOKEN, None)
    for key in list(inner):
        if key.startswith(("aggregator.", "head.")):
            outer[key] = inner.pop(key)
    select_tokens = bool(settings.get("select_top_k"))
    kind = str(settings.get("aggregator_type") or "transformer")
    if kind in ("dwsc", "conv"):
        outer = _conv_aggregator(outer)
    backbone, _ = timm_backbone(settings, inner)
    own = token is not None and not select_tokens
    model = GLSim(
        TokenVisionTransformer(backbone, {}, 0),
        _num_classes(outer),
        top=_top(settings, doubles=False),
        metric=settings.get("sim_metric") or "cos",
        aggregator=kind,  # type: ignore[arg-type]  # GLSim checks the name
        aggregator_heads=backbone.blocks[0].attn.num_heads,
        select_tokens=select_tokens,
        token_drop=float(settings.get("token_drop") or 0.0),
        crops_at_inference=bool(settings.get("inference_crops", True)),
        anchor_random=bool(settings.get("anchor_random")),
        crop_class_token=own,
        final_norm=False,
        reference_compat=reference_compat,
    )
    ours = {f"encoder.backbone.{key}": value for key, value in inner.items()} | outer
    if own and token is not None:
        ours["crop_class_token"] = token
    load_all(model, ours, _FAMILY)
    return model


def _conv_aggregator(outer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a convolutional aggregator, whose layers the original numbers, by their order."""
    ours = {key: value for key, value in outer.items() if not key.startswith("aggregator.")}
    layers: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for key, value in outer.items():
        if key.startswith("aggregator."):
            _, *numbers, leaf = key.split(".")
            layers.setdefault(tuple(int(number) for number in numbers if number.isdigit()), {})[leaf] = value
    # convolutions have weights of three axes, all other layers are norms
    norms, convs = iter(("norm1", "norm2", "mix.norm")), iter(("conv1", "mix.conv"))
    for place in sorted(layers):
        name = next(convs if layers[place]["weight"].ndim == 3 else norms, None)
        if name is None:
            raise UsageError(f"this convolutional aggregator has more layers than GLSim's: {len(layers)}")
        for leaf, value in layers[place].items():
            pointwise = name == "mix.conv" and leaf == "weight"
            ours[f"aggregator.{name}.{leaf}"] = value.squeeze(-1) if pointwise else value
    return ours


def _describe(model: TwoPassTransformer, settings: Mapping[str, Any]) -> None:
    """Set the config: the size in the settings, or that of the positions, and the originals' statistics."""
    host: Any = model.encoder.backbone
    size = tuple(host.patch_embed.img_size)
    given = settings.get("image_size") or settings.get("img_size")
    wanted = (int(given), int(given)) if isinstance(given, int) else tuple(given or size)
    if wanted != size:
        host.set_input_size(img_size=wanted)
    mean, std = _NORMALISE[bool(settings.get("custom_mean_std"))]
    model.pretrained_cfg = model.default_cfg = {
        "input_size": (host.in_chans, *wanted),
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "num_classes": model.num_classes,
        "architecture": "",
    }


register_converter(Converter(_FAMILY, lambda config, weights: _kind(config, weights) is not None, _build))
