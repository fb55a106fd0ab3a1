"""`create_model`: a network by name, image size, head and methods; and functions that describe it.

A model is a timm model (or wraps one), so timm's optimisers, layer decay and feature extraction work on it. Its `spec`
has all arguments that it was made with, from which weight files rebuild it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.models import packages
from animesion_training.models.assemble import TOKEN_HEADS, assemble, init_from_backbone
from animesion_training.models.baselines import timm_name
from animesion_training.models.heads import CosineHead
from animesion_training.models.ifa import IFA_MODELS, IFAVisionTransformer
from animesion_training.models.methods import Methods
from animesion_training.models.pretrained import downloads, head_names, load_weights
from animesion_training.models.shorthand import merge_methods, split_name

#: Arguments of timm's factory that would change the meaning of a name, or read files that the caller did not name.
_RESERVED = {
    "cache_dir",
    "checkpoint_path",
    "features_only",
    "num_classes",
    "img_size",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
}
_LIMITS = {"img_size": 8192, "num_classes": 1_000_000}


@dataclass(frozen=True)
class ModelSpec:
    """The arguments of `create_model` without weights; JSON-ready, and sufficient to build the same network.

    Attributes:
        name: the given name, short or timm's.
        num_classes: number of classes.
        img_size: side in pixels, or (height, width).
        head: name of the head.
        head_options: arguments of the head.
        norm_eps: epsilon of all layer norms, None for the architecture's own.
        options: further arguments of the timm model.
        methods: fine-grained methods.
    """

    name: str
    num_classes: int
    img_size: int | tuple[int, int]
    head: str = "linear"
    head_options: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    methods: Methods = field(default_factory=Methods)

    def build(self) -> nn.Module:
        """Build the network with initial weights.

        Raises:
            UsageError: see `create_model`; also options that are arguments of `create_model`, such as weights.
        """
        if taken := sorted((_RESERVED | inspect.signature(create_model).parameters.keys()) & self.options.keys()):
            raise UsageError(f"options of a model cannot contain {', '.join(taken)}: leave them out")
        return create_model(
            self.name,
            self.num_classes,
            self.img_size,
            self.head,
            head_options=self.head_options,
            norm_eps=self.norm_eps,
            methods=self.methods,
            **self.options,
        )


@dataclass(frozen=True)
class InputConfig:
    """The images that a model expects.

    Attributes:
        size: (height, width) in pixels.
        mean: mean per channel, for values in [0, 1].
        std: standard deviation per channel.
        interpolation: name of the resampling filter that its weights were trained with.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def create_model(
    name: str,
    num_classes: int,
    img_size: int | tuple[int, int] | None = None,
    head: str = "linear",
    pretrained: bool | Path | str = False,
    *,
    reduction: str | None = None,
    keep_rate: float | Sequence[float] = 1.0,
    reduction_layers: Sequence[int] | None = None,
    cache: str | None = None,
    adapter: str | None = None,
    selector: str | None = None,
    text: str | None = None,
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    methods: Methods | None = None,
    head_options: Mapping[str, Any] | None = None,
    norm_eps: float | None = None,
    **options: Any,
) -> nn.Module:
    """Build a classifier.

    Args:
        name: `resnet18` ... `vit_large_patch32`, one of `vit_*_ifa`, or any of timm's, with or without a weights tag.
            It may begin with words for methods, see `shorthand`.
        num_classes: number of classes; 0 for features in place of logits.
        img_size: side in pixels or (height, width); position embeddings are resampled by timm. None for the
            published size of the architecture. Convolutional networks accept any size; a vision transformer leaves out
            a border narrower than a patch.
        head: `linear` (timm's own), `cosine`, or one of `assemble.TOKEN_HEADS`: `cls`, `ifa`, `cla`, ...
        pretrained: True for the weights that timm publishes (over the network or from its cache), a weight file, or
            `package:NAME` for the file in an installed Python package, see `packages`. A classifier for another number
            of classes is replaced.
        reduction: token reduction, one of `tokens.reductions.REDUCTIONS`.
        keep_rate: share of tokens that each reduction keeps, in (0, 1]; one for all of them or one per reduction.
        reduction_layers: blocks that reduce, from 0; None for the reduction's own.
        cache: `clc`, the cross-layer cache.
        adapter: adapter between or in blocks, one of `tokens.adapters.ADAPTERS`.
        selector: selector of parts, one of `assemble.SELECTORS`.
        text: what the network reads beside images, one of `assemble.TEXTS`.
        method_options: further arguments by `reduction`, `cache`, `adapter`, `selector` or `text`.
        methods: all methods at once, in place of the eight arguments before.
        head_options: arguments of the head, such as `{"scale": 30.0, "learn_scale": False}` for `cosine`.
        norm_eps: epsilon of all layer norms; the originals' transformers use 1e-12, timm's 1e-6.
        **options: further arguments of the timm model, such as `drop_path_rate=0.1`.

    Returns:
        A timm model, or one with the same interface: `model(x)` maps images (B, C, H, W), normalised with its
        `input_config`, to logits (B, num_classes); `forward_features`, `num_classes`, `pretrained_cfg`,
        `get_classifier` and `group_matcher` work as in timm; `spec` is its `ModelSpec`.

    Raises:
        UsageError: an unknown name, head or argument, a head that the architecture does not support, or an unusable
            file.
        AnimesionError: weights cannot be downloaded.
    """
    given = name
    name, named, named_head = split_name(name)
    architecture = timm_name(name)
    head_options = dict(head_options or {})
    if methods is None:
        methods = Methods(
            reduction or named.reduction,
            keep_rate if isinstance(keep_rate, int | float) else tuple(keep_rate),
            tuple(reduction_layers or ()),
            cache or "",
            adapter or "",
            selector or "",
            method_options or {},
            text or "",
        )
    methods = merge_methods(named, methods, given)
    if named_head:
        if head not in ("linear", named_head):
            raise UsageError(f"{given} has head {named_head}, and {head} is requested as well: leave one out")
        head = named_head
    if architecture.partition(".")[0] in IFA_MODELS and head == "linear":
        head = "ifa"  # part of the name
    _check(num_classes, img_size, head, options)
    if head == "ifa" and not methods:
        # the registered name, if there is one, so that timm can rebuild the model
        hosts = {host: ours for ours, host in IFA_MODELS.items()}
        bare, dot, tag = architecture.partition(".")
        architecture = f"{hosts.get(bare, bare)}{dot}{tag}"
    # only architectures with a fixed input size accept img_size; the others take any size anyway
    sized = dict(options)
    config = timm.get_pretrained_cfg(architecture)
    if img_size is not None and config is not None and config.fixed_input_size:
        sized["img_size"] = img_size
    try:
        with downloads(architecture) if pretrained is True else nullcontext():
            model: nn.Module = timm.create_model(
                architecture, pretrained=pretrained is True, num_classes=num_classes, **sized
            )
    except (TypeError, AssertionError, ValueError) as error:
        if not sized:  # not caused by an argument of the user
            raise
        arguments = ", ".join(f"{key}={value!r}" for key, value in sized.items())
        reason = str(error) or "a check of timm failed"
        raise UsageError(f"{name} cannot be built with {arguments}: {reason}") from error
    # timm builds such a model without complaint, and fails in its first forward pass
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and 0 in grid:
        raise UsageError(f"{name} splits images into patches, and img_size={img_size} is smaller than a patch")
    timm_config: Any = model.pretrained_cfg
    if norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
    if methods or head not in HEADS:
        model = assemble(model, methods, head, num_classes, head_options)
    else:
        model = HEADS[head](model, num_classes, head_options)
    _describe(model, timm_config, img_size)
    height, width = input_config(model).size  # the actual size, also if img_size is None
    side = height if height == width else (height, width)
    vars(model)["spec"] = ModelSpec(name, num_classes, side, head, head_options, norm_eps, dict(options), methods)
    if isinstance(pretrained, str) and pretrained.startswith(packages.PREFIX):
        load_weights(model, packages.package_weights(pretrained, architecture))
    elif pretrained is not True and pretrained is not False:
        load_weights(model, pretrained)
    else:
        init_from_backbone(model)  # `load_weights` does this itself
    return model


def _check(num_classes: int, img_size: int | tuple[int, int] | None, head: str, options: Mapping[str, Any]) -> None:
    if head not in {*HEADS, *TOKEN_HEADS}:
        heads = list(dict.fromkeys([*HEADS, *TOKEN_HEADS]))
        raise UsageError(f"there is no head '{head}'{nearest(head, heads)}; there are {', '.join(heads)}")
    if not 0 <= num_classes <= _LIMITS["num_classes"]:
        raise UsageError(f"num_classes must be from 0 to {_LIMITS['num_classes']:,}, not {num_classes}")
    sides = () if img_size is None else (img_size,) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) > 2 or any(not 1 <= side <= _LIMITS["img_size"] for side in sides):
        raise UsageError(f"img_size must be from 1 to {_LIMITS['img_size']:,} pixels per side, not {img_size}")
    if taken := sorted(_RESERVED & options.keys()):
        raise UsageError(f"create_model sets {', '.join(taken)} itself: leave it out of the model's arguments")


def _describe(model: nn.Module, timm_config: Mapping[str, Any], img_size: int | tuple[int, int] | None) -> None:
    """Set `pretrained_cfg` to a copy with the size and the number of classes that the model was built for."""
    channels, *published = timm_config.get("input_size") or (3, 224, 224)
    size = published if img_size is None else (img_size, img_size) if isinstance(img_size, int) else img_size
    config = {**timm_config, "input_size": (channels, *size), "num_classes": getattr(model, "num_classes", None)}
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config


def _linear(model: nn.Module, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    _no_options("linear", options)
    return model


def _cosine(model: nn.Module, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    known = set(inspect.signature(CosineHead).parameters) - {"in_features", "num_classes"}
    if unknown := sorted(set(options) - known):
        raise UsageError(f"head cosine has no option {', '.join(unknown)}: there are {', '.join(sorted(known))}")
    scale = options.get("scale", 16.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"head cosine needs a positive scale, not {scale!r}")
    get: Any = getattr(model, "get_classifier", None)
    classifier = get() if get else None
    path = next((path for path, module in model.named_modules() if module is classifier), None)
    if not isinstance(classifier, nn.Linear) or not path:
        raise UsageError(
            f"head cosine replaces a linear classifier, and {type(model).__name__} ends in "
            f"{type(classifier).__name__}: choose head linear"
        )
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, CosineHead(classifier.in_features, num_classes, **options))
    return model


def _ifa(model: nn.Module, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    _no_options("ifa", options)
    return model if isinstance(model, IFAVisionTransformer) else IFAVisionTransformer(model, num_classes)


def _no_options(head: str, options: Mapping[str, Any]) -> None:
    if options:
        raise UsageError(f"head {head} has no options, got {', '.join(sorted(options))}")


#: Name of a head -> function from the timm model, number of classes and options of the head to the model with it.
HEADS: dict[str, Callable[[nn.Module, int, Mapping[str, Any]], nn.Module]] = {
    "linear": _linear,
    "cosine": _cosine,
    "ifa": _ifa,
}


def spec_of(model: nn.Module) -> ModelSpec:
    """Return the spec of a model, also if `torch.compile` or DistributedDataParallel wraps it.

    Raises:
        UsageError: the model was not made by `create_model`.
    """
    spec = getattr(bare(model), "spec", None)
    if not isinstance(spec, ModelSpec):
        raise UsageError(f"{type(model).__name__} was not made by create_model, so it cannot be described in a file")
    return spec


def bare(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of `torch.compile` and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def input_config(model: nn.Module) -> InputConfig:
    """Return size and normalisation of the images that a model expects."""
    config: Any = bare(model).pretrained_cfg
    size = config.get("input_size") or (3, 224, 224)
    return InputConfig(
        size=(int(size[1]), int(size[2])),
        mean=tuple(float(value) for value in config.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN),
        std=tuple(float(value) for value in config.get("std") or timm.data.IMAGENET_DEFAULT_STD),
        interpolation=str(config.get("interpolation") or "bicubic"),
    )


def head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the classifier, to train them alone or with another learning rate."""
    names = head_names(bare(model))
    return (value for name, value in bare(model).named_parameters() if name in names)
