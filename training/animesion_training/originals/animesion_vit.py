"""The vision transformer of Animesion (ISCAS 2022), which GLSim and ILA share, with linear or IFA head."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.baselines import BASELINES
from animesion_training.models.create import ModelSpec
from animesion_training.models.ifa import IFAVisionTransformer
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter, set_statistics

#: Pattern of the original's name -> timm's; q, k and v are concatenated first.
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
#: Epsilon of the originals' layer norms.
VIT_EPS = 1e-12
_QKV = re.compile(r"(.*\.attn)\.proj_q\.(weight|bias)")
#: (width, depth) of the published sizes -> their letter in our names, for models that can be saved.
_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
#: Settings with which the originals change the forward pass without additional parameters.
_DEPARTURES = ("selector", "adapter", "ila", "prompt", "aggregator", "attention_crop", "dynamic_anchor")


def _is_animesion_vit(config: Config, weights: StateDict) -> bool:
    stem = weights.get("patch_embedding.weight")
    if stem is None or any(config.get(setting) for setting in _DEPARTURES):
        return False
    plain = config.get("classifier") in (None, "cls", "token", "ifacls")
    plain_stride = config.get("patch_stride") in (None, stem.shape[-1])
    names = (r"transformer\.blocks\.0\.attn\.proj_q\.weight", r"encoder\.blocks\.0\.attn\.proj_q\.weight")
    return plain and plain_stride and any(re.fullmatch(name, key) for name in names for key in weights)


def _build_animesion_vit(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    renamed = rename_vit(weights)
    settings = vit_settings(config)
    ifa = "head.layers.weight" in renamed
    last = renamed.get("head.fc.weight" if ifa else "head.weight")
    if last is None:
        raise UsageError("this checkpoint has no classifier: it contains neither `fc` nor `inter_class_head`")
    num_classes = last.shape[0]
    model: Any = bare_vit(renamed, settings, num_classes)
    if ifa:
        model = IFAVisionTransformer(model, num_classes)
        renamed = {key if key.startswith("head.") else f"backbone.{key}": value for key, value in renamed.items()}
    load_all(model, renamed, "animesion vision transformer")
    host = model.backbone if ifa else model
    side = fit_size(host, settings)
    short = short_name(host)
    describe_vit(model, ModelSpec(short, num_classes, side, "ifa" if ifa else "linear", norm_eps=VIT_EPS))
    if "custom_mean_std" in settings:  # FGIR-Backbones; the trainer of Animesion has 0.5 and no such setting
        set_statistics(model, settings)
    built: nn.Module = model
    return built


def vit_settings(config: Config) -> dict[str, Any]:
    """The settings of the original in one table; its trainers store them in several places."""
    return {**config, **(config.get("arch") or {}), **(config.get("args") or {})}


def bare_vit(renamed: StateDict, settings: Config, num_classes: int = 0) -> VisionTransformer:
    """The plain transformer for weights under timm's names, with initial weights.

    All sizes but the number of heads follow from the weights. The residual dropout of the original is left out.

    Args:
        renamed: weights as `split_vit` returns them.
        settings: `num_attention_heads`, unless heads have width 64.
        num_classes: number of classes of the linear classifier; 0 for no classifier.

    Raises:
        UsageError: images are not square.
    """
    depth = 1 + max(int(key.split(".")[1]) for key in renamed if key.startswith("blocks."))
    width, channels, *patch = renamed["patch_embed.proj.weight"].shape
    with_class_token = "cls_token" in renamed
    tokens = renamed["pos_embed"].shape[1] - with_class_token
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise UsageError(f"a grid of {tokens} patches is not square: this family has square images only")
    return VisionTransformer(
        img_size=(grid * patch[0], grid * patch[1]),
        patch_size=(patch[0], patch[1]),
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=int(settings.get("num_attention_heads") or max(1, width // 64)),
        mlp_ratio=renamed["blocks.0.mlp.fc1.weight"].shape[0] / width,
        class_token=with_class_token,
        global_pool="token" if with_class_token else "avg",
        final_norm="norm.weight" in renamed,
        fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=VIT_EPS),
    )


def rename_vit(weights: StateDict) -> dict[str, Tensor]:
    """Rename the weights of a plain transformer and its head to timm's names.

    Raises:
        UsageError: weights are missing, or belong to neither.
    """
    renamed, unknown = split_vit(weights)
    if unknown:
        raise UsageError(
            f"this checkpoint has {len(unknown)} parameters beyond the plain vision transformer and its heads: "
            f"{', '.join(sorted(unknown)[:3])}"
        )
    return renamed


def split_vit(weights: StateDict, *, class_token: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split weights into those of transformer and head, under timm's names, and all others, under their own names.

    Queries, keys and values are concatenated in both.

    Args:
        weights: weights under the original's names.
        class_token: whether a class token is required.

    Raises:
        UsageError: the attention or the embedding is incomplete.
    """
    concatenated = dict(weights)
    for key in weights:
        if match := _QKV.fullmatch(key):
            block, kind = match.groups()
            try:
                parts = [concatenated.pop(f"{block}.proj_{letter}.{kind}") for letter in "qkv"]
            except KeyError as error:
                raise UsageError(f"this checkpoint lacks {error.args[0]}: its attention is incomplete") from None
            concatenated[f"{block}.qkv.{kind}"] = torch.cat(parts)
    renamed, others = {}, {}
    for key, value in concatenated.items():
        for pattern, ours in _VIT_NAMES:
            if match := re.fullmatch(pattern, key):
                renamed[match.expand(ours)] = value
                break
        else:
            others[key] = value
    needed = ("pos_embed", "patch_embed.proj.weight", *(("cls_token",) if class_token else ()))
    if absent := [key for key in needed if key not in renamed]:
        raise UsageError(f"this checkpoint lacks the weights for {', '.join(absent)}")
    return renamed, others


def fit_size(host: VisionTransformer, settings: Config) -> int:
    """Resample positions of a transformer to the size of the images of a run, and return its side in pixels."""
    trained: int = host.patch_embed.img_size[0]
    side = int(settings.get("image_size") or trained)
    if side != trained:
        host.set_input_size(img_size=(side, side))
    return side


def short_name(host: VisionTransformer) -> str:
    """Our name of a transformer of a published size; a name that `BASELINES` does not have for another size."""
    return f"vit_{_SIZES.get((host.embed_dim, len(host.blocks)), '')}_patch{host.patch_embed.patch_size[0]}"


def describe_vit(model: nn.Module, spec: ModelSpec) -> None:
    """Set the config, with mean and standard deviation 0.5, and for a published size the spec, so it can be saved."""
    short, side = spec.name, spec.img_size
    config: dict[str, Any] = {"input_size": (3, side, side), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config |= {"interpolation": "bilinear", "num_classes": spec.num_classes, "architecture": ""}
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config
    if short not in BASELINES:
        return
    # a spec must build this very network, so compare shapes with the published one
    with torch.device("meta"):
        published = spec.build().state_dict()
    own = model.state_dict()
    if {key: value.shape for key, value in published.items()} == {key: value.shape for key, value in own.items()}:
        registered = f"{short}_ifa" if spec.head == "ifa" else BASELINES[short]
        config["architecture"] = f"{spec.methods.text}_{short}" if spec.methods.text else registered
        vars(model)["spec"] = spec


register_converter(Converter("animesion vision transformer", _is_animesion_vit, _build_animesion_vit))
