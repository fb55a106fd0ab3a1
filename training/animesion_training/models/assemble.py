"""Assembly of a network from a timm model and fine-grained methods: plug-ins and their order, head, and wrapper.

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
from animesion_training.models.methods import PARTS, Methods
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
from animesion_training.tokens.tag_text import TagText
from animesion_training.tokens.twopass import GLSim, RAMSTrans

#: Heads that read the tokens of a vision transformer, by name; `linear` supports token methods as well.
TOKEN_HEADS = {
    "cls": "one linear layer on the class token",
    "ifa": "aggregation of the class tokens of every block, or of the last block of each group",
    "cla": "cross-layer aggregation of the class tokens of the last block of each group",
    **PATCH_HEADS,
}
_TWO_PASS = {
    "glsim": "second pass over a crop around the patches most similar to the whole image (GLSim)",
    "rams": "second pass over a crop chosen by attention rollout (RAMS-Trans)",
}

#: Selectors of parts, by name.
SELECTORS = {
    "cal": "counterfactual attention learning: 32 attention maps, the teacher of TGDA",
    **_TWO_PASS,
    **PART_SELECTORS,
}

#: Caches of tokens across blocks, by name.
CACHES = {"clc": "cross-layer cache: pooled tokens and registers are added again in later groups (CLCA)"}

#: Methods that read text beside the image, by name.
TEXTS = {"vilt": "the tags of each image as tokens after its patches, and a head that predicts masked tags (ViLT)"}

PlugInSite = dict[str, Any]


def assemble(
    backbone: nn.Module, methods: Methods, head: str, num_classes: int, head_options: Mapping[str, Any]
) -> nn.Module:
    """Assemble a network.

    Args:
        backbone: a timm model with its own classifier; modified in place.
        methods: the methods to add.
        head: name of the head.
        num_classes: number of classes.
        head_options: arguments of the head.

    Raises:
        UsageError: an unknown name or option, or methods that do not go together or with this backbone.
    """
    _check_known("selector", methods.selector, SELECTORS)
    _check_known("cache", methods.cache, CACHES)
    _check_known("text", methods.text, TEXTS)
    others = any(getattr(methods, part) for part in PARTS if part != "text")
    if methods.text and (others or head not in ("linear", "cls", "ifa")):
        raise UsageError(
            f"text {methods.text} goes with head linear, cls or ifa, and with no other method: leave the others out"
        )
    if methods.selector == "cal":
        if methods.reduction or methods.cache or methods.adapter or head != "linear":
            raise UsageError("selector cal has its own head and cannot be combined with other methods: leave them out")
        network: nn.Module = _make("selector cal", CALClassifier, methods.of("selector"), backbone, num_classes)
        return network
    host = check_backbone(backbone, _describe(methods, head), class_token=head not in PATCH_HEADS)
    if methods.text and head == "linear" and host.global_pool != "token":
        raise UsageError(
            f"text {methods.text} classifies from the class token, and this transformer pools by "
            f"{host.global_pool!r}: use head cls"
        )
    # before plug-ins are made, because their sizes depend on the grid
    stride = methods.of("selector").get("patch_stride") if methods.selector in PART_SELECTORS else None
    if stride is not None:
        overlap_patches(host, stride)
    plugins = _plugins(host, methods)
    encoder: nn.Module = _with_head(
        host,
        plugins,
        head,
        num_classes,
        dict(head_options),
        methods.reduction_layers,
        two_pass=methods.selector in _TWO_PASS,
    )
    if methods.selector == "glsim":
        encoder = _make("selector glsim", GLSim, methods.of("selector"), encoder, num_classes)
    if methods.selector == "rams":
        encoder = _make("selector rams", RAMSTrans, methods.of("selector"), encoder, num_classes)
    return encoder


def init_from_backbone(model: nn.Module) -> None:
    """Initialise methods from the weights of the backbone: the registers of a cache copy its class token."""
    for module in model.modules():
        if isinstance(module, TokenVisionTransformer):
            for plugin in module.plugins.values():
                if isinstance(plugin, CrossLayerCache):
                    plugin.copy_class_token(module.backbone.cls_token)


def _describe(methods: Methods, head: str) -> str:
    """The methods, or else the head, for messages."""
    named = [
        f"{part} {name}"
        for part in ("selector", "adapter", "reduction", "cache", "text")
        if (name := getattr(methods, part))
    ]
    return " and ".join(named) or f"head {head}"


def _plugins(host: Any, methods: Methods) -> dict[str, Plugin]:
    """The plug-ins, in the order in which hooks call them: adapters, part selection, reduction, cache."""
    depth, width, grid = len(host.blocks), host.embed_dim, host.patch_embed.grid_size
    plugins: dict[str, Plugin] = {}
    if methods.adapter:
        _check_known("adapter", methods.adapter, ADAPTERS)
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
        # registers have positions if the class token has one
        positions = not host.no_embed_class and host.pos_embed is not None
        plugins["cache"] = _make(
            "cache clc",
            CrossLayerCache,
            {"positions": positions, **methods.of("cache")},
            width,
            depth=depth,
            layers=methods.reduction_layers or None,
        )
    if methods.text:
        plugins["text"] = _make("text vilt", TagText, methods.of("text"), width)
    _check_grid(plugins)
    return plugins


def _check_grid(plugins: Mapping[str, Plugin]) -> None:
    """Raise `UsageError` if a plug-in needs the grid of patches, and another one does not keep it."""
    for plugin in plugins.values():
        if isinstance(plugin, ILA | ConvPass):
            for name, other in plugins.items():
                if not other.keeps_grid:
                    raise UsageError(
                        f"{type(plugin).__name__} convolves over the grid of patches, and {name} "
                        f"{type(other).__name__} leaves no grid: use one of the two"
                    )


def _with_head(
    host: Any,
    plugins: Mapping[str, Plugin],
    head: str,
    num_classes: int,
    options: dict[str, Any],
    layers: tuple[int, ...],
    *,
    two_pass: bool,
) -> TokenVisionTransformer:
    """The host with plug-ins and head.

    Args:
        host: the backbone.
        plugins: by name.
        head: name of the head.
        num_classes: number of classes.
        options: arguments of the head.
        layers: blocks that reduce, empty for the default; with the last block they are the ends of groups.
        two_pass: whether a selector with two passes wraps the host.
    """
    depth, width = len(host.blocks), host.embed_dim
    if two_pass and head not in ("linear", "cls"):
        raise UsageError(f"a selector with two passes has its own classifier: leave head {head} out")
    if head in PATCH_HEADS:
        return TokenVisionTransformer(host, plugins, num_classes, patch_head(head, width, **options), reads="patches")
    groups = head == "cla" or (head == "ifa" and bool(options.pop("groups", False)))
    # last blocks of groups, each once
    ends = tuple(dict.fromkeys((*reduction_layers(layers or None, depth), depth - 1))) if groups else ()
    if head == "cla":
        make = partial(_make, "head cla", CLAHead, options, len(ends), width)
        return TokenVisionTransformer(host, plugins, num_classes, make, ends)
    if head == "ifa":
        taken = ends if groups else tuple(range(depth))
        make = partial(_make, "head ifa", IFAHead, options, len(taken), width)
        return TokenVisionTransformer(host, plugins, num_classes, make, taken)
    if head not in ("linear", "cls"):
        raise UsageError(f"head {head} does not support token methods: there are linear, {', '.join(TOKEN_HEADS)}")
    if options:
        raise UsageError(f"head {head} takes no options, got {', '.join(sorted(options))}")
    if head == "cls":
        host.reset_classifier(0, "token")
    return TokenVisionTransformer(host, plugins, num_classes)


def _make(component: str, kind: Callable[..., Any], options: Mapping[str, Any], *given: Any, **site: Any) -> Any:
    """Call a class with the options of a user; the message on an unknown option lists the known ones."""
    parameters = list(inspect.signature(kind).parameters)
    known = [name for name in parameters[len(given) :] if name not in site]
    if unknown := sorted(options.keys() - set(known)):
        raise UsageError(f"{component} has no option {', '.join(unknown)}: there are {', '.join(known)}")
    return kind(*given, **site, **options)


def _check_known(part: str, name: str, known: Mapping[str, str]) -> None:
    if name and name not in known:
        near = nearest(name, known) or f"; there are {', '.join(known)}"
        raise UsageError(f"there is no {part} '{name}'{near}")


#: Descriptions of all methods by kind and name, for listings.
METHODS = {
    "selector": SELECTORS,
    "reduction": REDUCTIONS,
    "cache": CACHES,
    "adapter": ADAPTERS,
    "text": TEXTS,
    "head": TOKEN_HEADS,
}
