"""Plug-ins for checkpoints of ILA's repository: selectors, adapters and prompts.

Transformer and head are read by `ila`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.originals.base import StateDict
from animesion_training.tokens.adapters.ila import ILA
from animesion_training.tokens.adapters.in_block import Adapters
from animesion_training.tokens.adapters.prompts import PromptTuning, QueryTuning
from animesion_training.tokens.part_selection import FFVT, TransFG
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens

FAMILY = "ILA model"

#: Settings with the number of tokens that a part selector selects.
_COUNTS = ("selector_num_tokens", "num_tokens", "num_token", "tokens_per_layer", "dynamic_top")
_RESIDUALS = {"dws_near_ones_init": "near-ones", "dws_ones_init": "ones", "dws": "xavier"}
#: The end of a name that marks a bottleneck.
BOTTLENECK = ".adapter_down.weight"
_ILA_LOCATIONS = (3, 7)


class NormBeforeLast(Plugin):
    """The encoder's norm before a separate last block, which has its own norm after it."""

    def __init__(self, like: nn.LayerNorm, depth: int) -> None:
        super().__init__()
        self.last = depth - 1
        self.norm = nn.LayerNorm(like.normalized_shape, eps=like.eps)

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        if block == self.last:
            tokens.x = self.norm(tokens.x)


def make_selector(name: str, settings: Mapping[str, Any], depth: int, reference_compat: bool) -> Plugin:
    """The part selector with this name of ours; the settings have the number of tokens that FFVT selects."""
    if name == "transfg":
        return TransFG(depth=depth)
    numbers = [settings.get(key) for key in (*_COUNTS, *(key for key in settings if "token" in key.lower()))]
    count = next((each for each in numbers if type(each) is int and each > 0), 12)
    return FFVT(depth=depth, count=count, reference_compat=reference_compat)


def pop_bottlenecks(others: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Remove the parameters of bottlenecks from `others`, and return them by the name of their module."""
    stems = [key.removesuffix(BOTTLENECK) for key in others if key.endswith(BOTTLENECK)]
    return {
        stem: {key.removeprefix(f"{stem}."): others.pop(key) for key in list(others) if key.startswith(f"{stem}.")}
        for stem in stems
    }


def make_adapters(
    settings: Mapping[str, Any], found: Mapping[str, StateDict], depth: int, width: int
) -> tuple[Plugin, dict[str, Tensor]]:
    """The adapters of bottlenecks inside blocks, and their weights: two per block are parallel, one is sequential."""
    # more bottlenecks than blocks: two in each
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


def make_ila(
    settings: Mapping[str, Any],
    found: Mapping[str, StateDict],
    depth: int,
    width: int,
    grid: tuple[int, int],
    own: bool,
) -> tuple[Plugin, dict[str, Tensor]]:
    """The adapters of bottlenecks between blocks, and their weights.

    The originals' own transformer has down-sampling adapters in a list `ila_ds`; in timm's all are down-sampling.
    """
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
    """Rename the weights of one adapter to our names; pointwise convolutions become linear layers."""
    convs = sorted({key.rpartition(".")[0] for key in parts if key.startswith("adapter_conv.")})
    maps = [stem for stem in convs if parts[f"{stem}.weight"].dim() == 4]
    if len(maps) != 2:
        raise UsageError(f"an adapter of this {FAMILY} has {len(maps)} convolutions in a row, only 2 are supported")
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
    """The options of adapters: most follow from the names and shapes of weights."""
    conv, residual = parts["conv.weight"], parts.get("residual_conv.weight")
    dim = parts["down.weight"].shape[0]
    # without a separate convolution for the class token, the original pads
    padding = bool(settings.get("ila_padding")) or "cls.weight" not in parts
    kind_of_residual = str(settings.get("ila_ds_conv_type") or "")
    if residual is not None:
        kind = _RESIDUALS.get(kind_of_residual, "near-ones") if residual.shape[1] == 1 else "conv"
    elif "pool" in kind_of_residual and settings.get("ila_ds_conv", True):
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


def make_prompts(
    settings: Mapping[str, Any], values: Tensor, depth: int, width: int, renamed: StateDict
) -> dict[str, tuple[Plugin, dict[str, Tensor]]]:
    """VPT's prompts or VQT's queries, with the parameter `values` of shape (..., blocks, count, D) or (count, D)."""
    values = values.reshape(-1, *values.shape[-2:])  # (blocks, count, D)
    blocks, count, _ = values.shape
    patch = renamed["patch_embed.proj.weight"].shape
    common: dict[str, Any] = {"depth": depth, "count": count, "patch_size": (patch[-2], patch[-1])}
    if "vqt" in str(settings.get("prompt") or "").lower():
        return {"queries": (QueryTuning(width, **common), {"queries": values})}
    return {"prompts": (PromptTuning(width, deep=blocks > 1, **common), {"prompts": values})}
