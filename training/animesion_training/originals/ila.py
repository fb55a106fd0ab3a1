"""ILA (arXiv 2409.11051) and what its repository compares it with, on its own transformer and on timm's.

Adapters, prompts, queries, part selection and heads on the patches; TransFG and FFVT also as GLSim's repository has
them. The plain transformer and IFA are read by `animesion_vit`, methods with two passes by `glsim`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.cal import CALHead
from animesion_training.models.heads import IFAHead
from animesion_training.originals.animesion_vit import bare_vit, split_vit, vit_settings
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter
from animesion_training.originals.clca import timm_backbone
from animesion_training.tokens.adapters.base import Adapters
from animesion_training.tokens.adapters.ila import ILA
from animesion_training.tokens.adapters.prompts import PromptTuning, QueryTuning
from animesion_training.tokens.host import Plugin, Tokens, TokenVisionTransformer
from animesion_training.tokens.part_selection import FFVT, TransFG, overlap_patches
from animesion_training.tokens.pooling import AveragePoolHead, BilinearHead, MPNCOVHead

_FAMILY = "ILA model"
_OWN, _TIMM = "patch_embedding.weight", "patch_embed.proj.weight"
#: Names of TransFG's and FFVT's own repositories, in this order -> those of ILA's; none was at hand to test with.
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
#: Where the originals put a number of tokens that a part selector takes.
_COUNTS = ("selector_num_tokens", "num_tokens", "num_token", "tokens_per_layer", "dynamic_top")
_HEADS_ON_PATCHES = ("pool", "avg", "gap", "blp", "lrblp", "mpncov")
_RESIDUALS = {"dws_near_ones_init": "near-ones", "dws_ones_init": "ones", "dws": "xavier"}
#: The encoder's norm, where the last block stands apart and has a norm behind it.
_BETWEEN_NORM = "between_norm"
#: What marks a bottleneck.
_DOWN = ".adapter_down.weight"
_ILA_LOCATIONS = (3, 7)
_CAL_ATTENTION, _CAL_CLASSIFIER = "attentions.conv.weight", "fc.weight"
_CAL_PARTS = ("attentions.", "fc.")
_NORMALISE = {True: ((0.5,) * 3, (0.5,) * 3), False: (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)}


def _settings(config: Config) -> dict[str, Any]:
    return vit_settings({**config, **(config.get("model_kwargs") or {})})


def _selector(settings: Mapping[str, Any]) -> str:
    """Ours for the original's part selector, empty for none."""
    named = " ".join(str(settings.get(key) or "") for key in ("selector", "model", "model_name", "method")).lower()
    for ours, theirs in (("transfg", ("transfg", "psm")), ("ffvt", ("ffvt", "maws"))):
        if any(name in named for name in theirs):
            return ours
    return ""


def _named_alike(weights: StateDict) -> dict[str, Tensor]:
    """Weights of timm's transformers as such, those of TransFG's and FFVT's repositories under ILA's names."""
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
    settings, weights = _settings(config), _named_alike(weights)
    if _OWN not in weights and _TIMM not in weights:
        return False
    if settings.get("dynamic_anchor") or settings.get("attention_crop") or "cls_token_crops" in weights:
        return False
    if _TIMM in weights and any(key.startswith("aggregator.") for key in weights):
        return False
    added = any(key.endswith((_DOWN, "prompt")) for key in weights)
    return added or bool(_selector(settings)) or settings.get("classifier") in _HEADS_ON_PATCHES


def _build_ila(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    settings, weights = _settings(config), _named_alike(weights)
    own = _OWN in weights
    backbone, renamed, others = _own_backbone(settings, weights) if own else _timm_backbone(settings, weights)
    depth, width = len(backbone.blocks), backbone.embed_dim
    bottlenecks = _bottlenecks(others)
    inside = {stem: parts for stem, parts in bottlenecks.items() if re.search(r"(^|\.)blocks\.\d+\.", stem)}
    between = {stem: parts for stem, parts in bottlenecks.items() if stem not in inside}
    made: dict[str, tuple[Plugin, dict[str, Tensor]]] = {}
    if selector := _selector(settings):
        made["selector"] = (_make_selector(selector, settings, depth, reference_compat), {})
        if f"{_BETWEEN_NORM}.weight" in others:
            norm = {f"norm.{leaf}": others.pop(f"{_BETWEEN_NORM}.{leaf}") for leaf in ("weight", "bias")}
            made["norm"] = (_NormBeforeLast(backbone.norm, depth), norm)
    if between:
        made["ila"] = _ila(settings, between, depth, width, backbone.patch_embed.grid_size, own)
    if inside:
        made["adapters"] = _adapters(settings, inside, depth, width)
    for key in [key for key in others if key.endswith("prompt")]:
        made |= _prompts(settings, others.pop(key), depth, width, renamed)
    classifier, read = _head(settings, renamed, others, width, depth)
    if others:
        raise UsageError(f"this {_FAMILY} has parameters that are not known here: {', '.join(sorted(others)[:3])}")
    model = TokenVisionTransformer(
        backbone, {name: plugin for name, (plugin, _) in made.items()}, _num_classes(read, settings), **classifier
    )
    ours = {f"backbone.{key}": value for key, value in renamed.items()} | read
    for name, (_, parameters) in made.items():
        ours |= {f"plugins.{name}.{key}": value for key, value in parameters.items()}
    load_all(model, ours, _FAMILY)
    side = _side(settings)
    if side and backbone.patch_embed.img_size != (side, side):
        backbone.set_input_size(img_size=(side, side))
    _describe(model, settings)
    return model


# -- transformers ----------------------------------------------------------------------------------------------------


def _own_backbone(settings: Mapping[str, Any], weights: StateDict) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The originals' own transformer, its weights in timm's names without a head, and all others."""
    renamed, others = split_vit(weights, class_token=False)
    _append_last_block(renamed, others)
    heads = settings.get("num_attention_heads") or settings.get("heads")
    backbone = bare_vit(renamed, {"num_attention_heads": heads})
    _overlap(backbone, settings)
    others |= {key: renamed.pop(key) for key in list(renamed) if key.startswith("head.")}
    return backbone, renamed, others


def _timm_backbone(settings: Mapping[str, Any], weights: StateDict) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Likewise for a transformer of timm's."""
    heads = settings.get("num_heads") or settings.get("num_attention_heads") or settings.get("heads")
    backbone, _ = timm_backbone({**settings, "num_heads": heads}, weights)
    plain = backbone.state_dict()
    renamed = {key: value for key, value in weights.items() if key in plain}
    return backbone, renamed, {key: value for key, value in weights.items() if key not in plain}


def _append_last_block(renamed: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Part selectors keep the block that looks at the parts apart: it becomes the last, and its norm the final one."""
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
    if "norm.weight" in renamed:
        others |= {f"{_BETWEEN_NORM}.{leaf}": renamed.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
    renamed |= {f"norm.{leaf}": others.pop(f"{stem}.{leaf}") for stem in norms for leaf in ("weight", "bias")}


def _side(settings: Mapping[str, Any]) -> int:
    """Of the images, in pixels; 0 where the settings do not say, or say that they are not square."""
    told = settings.get("image_size") or settings.get("img_size")
    return told if isinstance(told, int) else 0


def _overlap(backbone: Any, settings: Mapping[str, Any]) -> None:
    """Let patches overlap, if that is how the positions and the images' size go together."""
    side, embed = _side(settings), backbone.patch_embed
    patch, rows = embed.patch_size[0], embed.grid_size[0]
    told = settings.get("patch_stride") or settings.get("slide_step") or settings.get("slide")
    if not side or side // patch == rows or told == patch:
        return
    fitting = [stride for stride in range(1, patch) if (side - patch) // stride + 1 == rows]
    if fitting:
        overlap_patches(backbone, told if told in fitting else fitting[0], (side, side))


class _NormBeforeLast(Plugin):
    """The encoder's norm, in front of the block that stands apart and has a norm of its own behind it."""

    def __init__(self, like: nn.LayerNorm, depth: int) -> None:
        super().__init__()
        self.last = depth - 1
        self.norm = nn.LayerNorm(like.normalized_shape, eps=like.eps)

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        if block == self.last:
            tokens.x = self.norm(tokens.x)


# -- plug-ins --------------------------------------------------------------------------------------------------------


def _make_selector(name: str, settings: Mapping[str, Any], depth: int, reference_compat: bool) -> Plugin:
    if name == "transfg":
        return TransFG(depth=depth)
    told = [settings.get(key) for key in (*_COUNTS, *(key for key in settings if "token" in key.lower()))]
    count = next((each for each in told if type(each) is int and each > 0), 12)
    return FFVT(depth=depth, count=count, reference_compat=reference_compat)


def _bottlenecks(others: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parameters of each bottleneck, by where it is; taken out of the others."""
    stems = [key.removesuffix(_DOWN) for key in others if key.endswith(_DOWN)]
    return {
        stem: {key.removeprefix(f"{stem}."): others.pop(key) for key in list(others) if key.startswith(f"{stem}.")}
        for stem in stems
    }


def _adapters(
    settings: Mapping[str, Any], found: Mapping[str, StateDict], depth: int, width: int
) -> tuple[Plugin, dict[str, Tensor]]:
    """Bottlenecks within blocks: two in each are parallel, one is sequential."""
    parallel = len(found) > depth and settings.get("adapter_path") != "pfeiffer"
    ours: dict[str, Tensor] = {}
    for stem, parts in found.items():
        match = re.search(r"(?:^|\.)blocks\.(\d+)\.(.+)$", stem)
        assert match
        place = "attention_adapters" if parallel and "attn" in match[2] else "mlp_adapters"
        for key, value in parts.items():
            ours[f"{place}.{match[1]}.{key.removeprefix('adapter_')}"] = value
    first = next(iter(found.values()))
    conv = first.get("adapter_conv.weight")
    plugin = Adapters(
        width,
        depth=depth,
        dim=first["adapter_down.weight"].shape[0],
        path="parallel" if parallel else "sequential",
        convolution=None if conv is None else conv.shape[-1],
    )
    return plugin, ours


def _ila(
    settings: Mapping[str, Any],
    found: Mapping[str, StateDict],
    depth: int,
    width: int,
    grid: tuple[int, int],
    own: bool,
) -> tuple[Plugin, dict[str, Tensor]]:
    """Bottlenecks between blocks: the down-sampling ones are in a list `ila_ds`, in timm's flavour all are such."""
    groups: dict[str, dict[int, dict[str, Tensor]]] = {"down_sampling": {}, "keeping": {}}
    for stem, parts in found.items():
        group, _, index = stem.rpartition(".")
        which = "down_sampling" if not own or group.endswith("ds") else "keeping"
        groups[which][int(index)] = _ila_parts(parts)
    shrinking, keeping = (
        [parts for _, parts in sorted(groups[which].items())] for which in ("down_sampling", "keeping")
    )
    locations = tuple(settings.get("ila_ds_locs") or _ILA_LOCATIONS)[: len(shrinking)]
    given = settings.get("ila_locs")
    padded = tuple(i for i in (given if given and -1 not in given else range(depth)) if i not in locations)
    first = (shrinking or keeping)[0]
    plugin = ILA(
        width,
        depth=depth,
        grid=grid,
        locations=locations,
        padded=padded if keeping else (),
        drop_path=float(settings.get("ila_sd") or 0.0),
        **_ila_options(settings, first),
    )
    ours = {
        f"{which}.{j}.{key}": value
        for which, modules in (("down_sampling", shrinking), ("keeping", keeping))
        for j, parts in enumerate(modules)
        for key, value in parts.items()
    }
    return plugin, ours


def _ila_parts(parts: StateDict) -> dict[str, Tensor]:
    """One adapter's weights under our names; pointwise convolutions become linear layers."""
    convs = sorted({key.rpartition(".")[0] for key in parts if key.startswith("adapter_conv.")})
    maps = [stem for stem in convs if parts[f"{stem}.weight"].dim() == 4]
    if len(maps) != 2:
        raise UsageError(f"an adapter of this {_FAMILY} has {len(maps)} convolutions in a row, 2 are known here")
    names = dict.fromkeys(convs, "norm2") | {maps[0]: "conv", maps[1]: "point"}
    names |= {"adapter_down": "down", "adapter_up": "up", "adapter_cls": "cls"}
    ours = {}
    for key, value in parts.items():
        stem, _, leaf = key.rpartition(".")
        name = names.get(stem) or re.sub(r"^(norm[13])(\.\d+)?$", r"\1", stem)
        name = re.sub(r"^ds_conv(\.\d+)?$", "residual_conv", name)
        ours[f"{name}.{leaf}"] = value.flatten(1) if name in ("point", "cls") and leaf == "weight" else value
    return ours


def _ila_options(settings: Mapping[str, Any], parts: StateDict) -> dict[str, Any]:
    """Most is told by the weights' shapes and presence."""
    conv, residual = parts["conv.weight"], parts.get("residual_conv.weight")
    dim = parts["down.weight"].shape[0]
    padding = bool(settings.get("ila_padding")) or "cls.weight" not in parts
    told = str(settings.get("ila_ds_conv_type") or "")
    if residual is not None:
        kind = _RESIDUALS.get(told, "near-ones") if residual.shape[1] == 1 else "conv"
    elif "pool" in told and settings.get("ila_ds_conv", True):
        kind = "avg-pool"
    else:
        kind = "identity" if padding else "none"

    def norm(name: str) -> str:
        return "bn" if f"{name}.running_mean" in parts else "ln" if f"{name}.weight" in parts else "none"

    return {
        "dim": dim,
        "kernel": conv.shape[-1],
        "dilation": int(settings.get("ila_dilation") or 1),
        "multiplier": conv.shape[0] // dim,
        "norms": tuple(norm(name) for name in ("norm1", "norm2", "norm3")),
        "residual": kind,
        "padding": padding,
        "class_conv": "cls.weight" in parts,
    }


def _prompts(
    settings: Mapping[str, Any], values: Tensor, depth: int, width: int, renamed: StateDict
) -> dict[str, tuple[Plugin, dict[str, Tensor]]]:
    values = values.reshape(-1, *values.shape[-2:])
    blocks, count, _ = values.shape
    patch = renamed["patch_embed.proj.weight"].shape
    common: dict[str, Any] = {"depth": depth, "count": count, "patch_size": (patch[-2], patch[-1])}
    if "vqt" in str(settings.get("prompt") or "").lower():
        return {"queries": (QueryTuning(width, **common), {"queries": values})}
    return {"prompts": (PromptTuning(width, deep=blocks > 1, **common), {"prompts": values})}


# -- heads -----------------------------------------------------------------------------------------------------------


def _head(
    settings: Mapping[str, Any], renamed: StateDict, others: dict[str, Tensor], width: int, depth: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the host is told of the head, and the head's weights; the latter are taken out of the others."""
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
    # the classifier is the last layer; it alone may have more inputs than there are channels
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
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in parts.items():
        stem, _, leaf = key.rpartition(".")
        found.setdefault(stem, {})[leaf] = value
    return found


def _inputs(leaves: StateDict) -> int:
    return leaves["weight"].shape[1]


def _num_classes(head: StateDict, settings: Mapping[str, Any]) -> int:
    weight = next((head[key] for key in ("head.fc.weight", "head.weight") if key in head), None)
    if weight is None:
        raise UsageError(f"this {_FAMILY} has no classifier: `head` is not in it")
    return len(weight)


def _describe(model: TokenVisionTransformer, settings: Mapping[str, Any]) -> None:
    """The size of the images and the statistics that the originals' trainer takes off."""
    host: Any = model.backbone
    mean, std = _NORMALISE[bool(settings.get("custom_mean_std"))]
    config: dict[str, Any] = {"input_size": (host.in_chans, *host.patch_embed.img_size), "mean": mean, "std": std}
    config |= {"interpolation": "bicubic", "num_classes": model.num_classes, "architecture": ""}
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config


# -- counterfactual attention, the head alone ------------------------------------------------------------------------


class CALLogits(nn.Module):
    """CAL's head where logits alone are wanted: a feature map (B, C, h, w) to (B, num_classes)."""

    def __init__(self, head: CALHead) -> None:
        super().__init__()
        self.head = head
        self.num_classes = head.num_classes

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(features).logits
        return logits


def _bare(weights: StateDict) -> dict[str, Tensor]:
    return {re.sub(r"^(head|dfsm)\.", "", key): value for key, value in weights.items()}


def _is_cal_head(config: Config, weights: StateDict) -> bool:
    bare = _bare(weights)
    return _CAL_ATTENTION in bare and _CAL_CLASSIFIER in bare and all(key.startswith(_CAL_PARTS) for key in bare)


def _build_cal_head(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    bare = _bare(weights)
    maps, channels = bare[_CAL_ATTENTION].shape[:2]
    head = CALHead(channels, len(bare[_CAL_CLASSIFIER]), maps)
    load_all(head, bare, "CAL head")
    return CALLogits(head)


register_converter(Converter("CAL head", _is_cal_head, _build_cal_head))
register_converter(Converter(_FAMILY, _is_ila, _build_ila))
