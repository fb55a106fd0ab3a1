"""Putting fine-grained methods on a timm model: which plug-ins, in which order, under which head and wrapper.

The methods themselves are in `tokens` and `cal`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.models.cal import CALClassifier
from animesion_training.models.cla import CLAHead
from animesion_training.models.heads import IFAHead
from animesion_training.models.methods import Methods
from animesion_training.tokens.adapters.factory import ADAPTERS, make_adapter
from animesion_training.tokens.adapters.ila import ILA
from animesion_training.tokens.adapters.in_block import ConvPass
from animesion_training.tokens.cache import CrossLayerCache
from animesion_training.tokens.host import TokenVisionTransformer, check_backbone
from animesion_training.tokens.overlapping_patches import overlap_patches
from animesion_training.tokens.part_selection import PART_SELECTORS, make_part_selector
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.pooling import PATCH_HEADS, patch_head
from animesion_training.tokens.reductions.base import reduction_layers
from animesion_training.tokens.reductions.factory import REDUCTIONS, make_reduction
from animesion_training.tokens.twopass import GLSim, RAMSTrans

#: Heads that read the tokens of a vision transformer; `linear` is for token methods too.
TOKEN_HEADS = {
    "cls": "one linear layer on the class token",
    "ifa": "aggregation of the class tokens of every block, or of the ends of groups",
    "cla": "cross-layer aggregation of the class tokens at the ends of groups",
    **PATCH_HEADS,
}
_TWO_PASS = {
    "glsim": "a second look at the crop around the patches most like the whole (GLSim)",
    "rams": "a second look at the crop that attention rollout chooses (RAMS-Trans)",
}

#: How parts are found.
SELECTORS = {
    "cal": "counterfactual attention learning: 32 attention maps, the teacher of TGDA",
    **_TWO_PASS,
    **PART_SELECTORS,
}

#: Between blocks that tokens are remembered.
CACHES = {"clc": "cross-layer cache: pooled tokens and registers come back in later groups (CLCA)"}

PlugInSite = dict[str, Any]


def assemble(
    backbone: nn.Module, methods: Methods, head: str, num_classes: int, head_options: Mapping[str, Any]
) -> nn.Module:
    """Put methods and head on a model.

    Args:
        backbone: a timm model with its own classifier; it is changed.
        methods: what to put on it.
        head: name of the head.
        num_classes: number of classes.
        head_options: arguments of the head.

    Raises:
        UsageError: an unknown name or option, or methods that do not go together or not with this backbone.
    """
    _known("selector", methods.selector, SELECTORS)
    _known("cache", methods.cache, CACHES)
    if methods.selector == "cal":
        if methods.reduction or methods.cache or methods.adapter or head != "linear":
            raise UsageError("selector cal has a head of its own and goes with no other method: leave the others out")
        made: nn.Module = _made("selector cal", CALClassifier, methods.of("selector"), backbone, num_classes)
        return made
    host = check_backbone(backbone, _what(methods, head), class_token=head not in PATCH_HEADS)
    stride = methods.of("selector").get("patch_stride") if methods.selector in PART_SELECTORS else None
    if stride is not None:
        overlap_patches(host, stride)
    plugins = _plugins(host, methods)
    layers = reduction_layers(methods.reduction_layers or None, len(host.blocks))
    encoder: nn.Module = _headed(
        host, plugins, head, num_classes, dict(head_options), layers, two_pass=methods.selector in _TWO_PASS
    )
    if methods.selector == "glsim":
        encoder = _made("selector glsim", GLSim, methods.of("selector"), encoder, num_classes)
    if methods.selector == "rams":
        encoder = _made("selector rams", RAMSTrans, methods.of("selector"), encoder, num_classes)
    return encoder


def weights_loaded(model: nn.Module) -> None:
    """Let methods begin from what the backbone has now learned: the cache's registers copy the class token."""
    for module in model.modules():
        if isinstance(module, TokenVisionTransformer):
            for plugin in module.plugins.values():
                if isinstance(plugin, CrossLayerCache):
                    plugin.copy_class_token(module.backbone.cls_token)


def _what(methods: Methods, head: str) -> str:
    named = [
        f"{part} {name}" for part in ("selector", "adapter", "reduction", "cache") if (name := getattr(methods, part))
    ]
    return " and ".join(named) or f"head {head}"


def _plugins(host: Any, methods: Methods) -> dict[str, Plugin]:
    """In the order in which each hook calls them: adapters, part selection, reduction, cache."""
    depth, width, grid = len(host.blocks), host.embed_dim, host.patch_embed.grid_size
    plugins: dict[str, Plugin] = {}
    if methods.adapter:
        _known("adapter", methods.adapter, ADAPTERS)
        site: PlugInSite = {"depth": depth, "width": width, "grid": grid, "patch_size": host.patch_embed.patch_size}
        plugins |= dict(make_adapter(methods.adapter, **site, **methods.of("adapter")))
    if methods.selector in PART_SELECTORS:
        options = {key: value for key, value in methods.of("selector").items() if key != "patch_stride"}
        plugins["selector"] = make_part_selector(methods.selector, depth=depth, **options)
    if methods.reduction:
        plugins["reduction"] = make_reduction(
            methods.reduction,
            keep_rate=methods.keep_rate,
            layers=methods.reduction_layers or None,
            depth=depth,
            width=width,
            tokens=grid[0] * grid[1],
            **methods.of("reduction"),
        )
    if methods.cache:
        positions = not host.no_embed_class and host.pos_embed is not None
        plugins["cache"] = _made(
            "cache clc",
            CrossLayerCache,
            {"positions": positions, **methods.of("cache")},
            width,
            depth=depth,
            layers=methods.reduction_layers or None,
        )
    _check_grid(plugins)
    return plugins


def _check_grid(plugins: Mapping[str, Plugin]) -> None:
    for plugin in plugins.values():
        if isinstance(plugin, ILA | ConvPass):
            for name, other in plugins.items():
                if not other.keeps_grid:
                    raise UsageError(
                        f"{type(plugin).__name__} convolves over the grid of patches, and {name} "
                        f"{type(other).__name__} leaves none: use one of them"
                    )


def _headed(
    host: Any,
    plugins: Mapping[str, Plugin],
    head: str,
    num_classes: int,
    options: dict[str, Any],
    layers: tuple[int, ...],
    *,
    two_pass: bool,
) -> TokenVisionTransformer:
    depth, width = len(host.blocks), host.embed_dim
    if two_pass and head not in ("linear", "cls"):
        raise UsageError(f"a selector with two passes has a classifier of its own: leave head {head} out")
    if head in PATCH_HEADS:
        return TokenVisionTransformer(host, plugins, num_classes, patch_head(head, width, **options), reads="patches")
    ends = tuple(dict.fromkeys((*layers, depth - 1)))
    if head == "cla":
        make = partial(_made, "head cla", CLAHead, options, len(ends), width)
        return TokenVisionTransformer(host, plugins, num_classes, make, ends)
    if head == "ifa":
        groups = bool(options.pop("groups", False))
        taken = ends if groups else tuple(range(depth))
        make = partial(_made, "head ifa", IFAHead, options, len(taken), width)
        return TokenVisionTransformer(host, plugins, num_classes, make, taken)
    if head not in ("linear", "cls"):
        raise UsageError(f"head {head} does not go with token methods: there are linear, {', '.join(TOKEN_HEADS)}")
    if options:
        raise UsageError(f"head {head} takes no options, got {', '.join(sorted(options))}")
    if head == "cls":
        host.reset_classifier(0, "token")
    return TokenVisionTransformer(host, plugins, num_classes)


def _made(what: str, kind: Callable[..., Any], options: Mapping[str, Any], *given: Any, **site: Any) -> Any:
    """Call a class with options that somebody wrote, and say which there are if one is not among them."""
    parameters = list(inspect.signature(kind).parameters)
    known = [name for name in parameters[len(given) :] if name not in site]
    if unknown := sorted(options.keys() - set(known)):
        raise UsageError(f"{what} has no option {', '.join(unknown)}: there are {', '.join(known)}")
    return kind(*given, **site, **options)


def _known(part: str, name: str, there: Mapping[str, str]) -> None:
    if name and name not in there:
        near = nearest(name, there) or f"; there are {', '.join(there)}"
        raise UsageError(f"there is no {part} '{name}'{near}")


#: Every method by what it is, with one line each, for listings.
METHODS = {"selector": SELECTORS, "reduction": REDUCTIONS, "cache": CACHES, "adapter": ADAPTERS, "head": TOKEN_HEADS}
