"""`create_model`: a network by name, image size and head, and what the rest of the package asks of it.

A model stays a timm model (or wraps one), so timm's optimisers, layer decay and feature extraction work on it. What it
was made from is kept in its `spec`, from which weight files rebuild it.
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

from animesion.errors import UsageError
from animesion_training.models.assemble import TOKEN_HEADS, assemble, weights_loaded
from animesion_training.models.baselines import timm_name
from animesion_training.models.heads import CosineHead
from animesion_training.models.ifa import IFA_MODELS, IFAVisionTransformer
from animesion_training.models.methods import Methods
from animesion_training.models.pretrained import downloads, head_names, load_weights
from animesion_training.models.shorthand import merge_methods, split_name

#: Arguments of timm's factory that would make a name mean something else, or read files behind our back.
_OURS = {
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
_LARGEST = {"img_size": 8192, "num_classes": 1_000_000}


@dataclass(frozen=True)
class ModelSpec:
    """What `create_model` was asked for, apart from weights; JSON-ready, and enough to build the same network.

    Attributes:
        name: name as given, short or timm's.
        num_classes: number of classes.
        img_size: side in pixels, or (height, width).
        head: name of the head.
        head_options: arguments of the head.
        norm_eps: epsilon of all layer norms, None for the architecture's own.
        options: further arguments of the timm model.
        methods: fine-grained methods that it carries.
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
        """The network, freshly initialised; never with weights, whatever the options say.

        Raises:
            UsageError: as `create_model`.
        """
        if taken := sorted((_OURS | inspect.signature(create_model).parameters.keys()) & self.options.keys()):
            raise UsageError(f"a model's options cannot hold {', '.join(taken)}")
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
    """What images a model expects.

    Attributes:
        size: (height, width) in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel.
        interpolation: name of the resampling that its weights were trained with.
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
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    methods: Methods | None = None,
    head_options: Mapping[str, Any] | None = None,
    norm_eps: float | None = None,
    **options: Any,
) -> nn.Module:
    """Build a classifier.

    Args:
        name: `resnet18` ... `vit_large_patch32`, one of `vit_*_ifa`, or any of timm's, with a weights tag or without;
            words for methods may stand in front, see `shorthand`.
        num_classes: number of classes.
        img_size: side in pixels or (height, width); position embeddings are resampled by timm. None for the size that
            the architecture was published for. Convolutional networks take any size; a vision transformer leaves out
            the border that is narrower than a patch.
        head: `linear` (timm's own), `cosine`, or one of `assembling.TOKEN_HEADS`: `cls`, `ifa`, `cla`, ...
        pretrained: True for the weights that timm publishes (over the network or from its cache), or a weight file;
            a classifier with another number of classes is replaced.
        reduction: token reduction, one of `tokens.reductions.REDUCTIONS`.
        keep_rate: share of tokens that each reduction keeps, in (0, 1]; one for all of them or one each.
        reduction_layers: blocks that reduce, from 0; None for the reduction's own.
        cache: `clc`, the cross-layer cache.
        adapter: adapter between or in blocks, one of `tokens.adapters.ADAPTERS`.
        selector: how parts are found, one of `assembling.SELECTORS`.
        method_options: further arguments by `reduction`, `cache`, `adapter` or `selector`.
        methods: in place of the seven before, all of them at once.
        head_options: arguments of the head, such as `{"scale": 30.0, "learn_scale": False}` for `cosine`.
        norm_eps: epsilon of all layer norms; the originals' transformers have 1e-12 where timm's have 1e-6.
        **options: further arguments of the timm model, such as `drop_path_rate=0.1`.

    Returns:
        A timm model, or one with the same methods: `model(x)` takes (B, C, H, W), normalised with its `input_config`,
        to logits (B, num_classes); `forward_features`, `num_classes`, `pretrained_cfg`, `get_classifier` and
        `group_matcher` as in timm; `spec` says how it was made.

    Raises:
        UsageError: unknown name, head or argument, a head that the architecture cannot carry, or an unusable file.
        AnimesionError: weights that cannot be fetched.
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
        )
    methods = merge_methods(named, methods, given)
    if named_head:
        if head not in ("linear", named_head):
            raise UsageError(f"{given} says head {named_head}, and {head} is asked for: say it once")
        head = named_head
    if architecture.partition(".")[0] in IFA_MODELS and head == "linear":
        head = "ifa"  # the name says it
    _check(num_classes, img_size, head, options)
    if head == "ifa" and not methods:
        # the registered name where there is one: timm can rebuild it
        hosts = {host: ours for ours, host in IFA_MODELS.items()}
        bare, dot, tag = architecture.partition(".")
        architecture = f"{hosts.get(bare, bare)}{dot}{tag}"
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
        if not sized:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in sized.items())
        raise UsageError(f"{name} cannot be built with {given}: {str(error) or 'a check of timm failed'}") from error
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and 0 in grid:
        raise UsageError(f"{name} cuts images into patches, and img_size={img_size} is smaller than one")
    made_by: Any = model.pretrained_cfg
    if norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
    if methods or head not in HEADS:
        model = assemble(model, methods, head, num_classes, head_options)
    else:
        model = HEADS[head](model, num_classes, head_options)
    _describe(model, made_by, img_size)
    height, width = input_config(model).size
    side = height if height == width else (height, width)
    vars(model)["spec"] = ModelSpec(name, num_classes, side, head, head_options, norm_eps, dict(options), methods)
    if pretrained is not True and pretrained is not False:
        load_weights(model, pretrained)
    else:
        weights_loaded(model)
    return model


def _check(num_classes: int, img_size: int | tuple[int, int] | None, head: str, options: Mapping[str, Any]) -> None:
    if head not in {*HEADS, *TOKEN_HEADS}:
        raise UsageError(f"no head is called {head!r}: there are {', '.join(dict.fromkeys([*HEADS, *TOKEN_HEADS]))}")
    if not 1 <= num_classes <= _LARGEST["num_classes"]:
        raise UsageError(f"num_classes must be from 1 to {_LARGEST['num_classes']:,}, not {num_classes}")
    sides = () if img_size is None else (img_size,) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) > 2 or any(not 1 <= side <= _LARGEST["img_size"] for side in sides):
        raise UsageError(f"img_size must be from 1 to {_LARGEST['img_size']:,} pixels a side, not {img_size}")
    if taken := sorted(_OURS & options.keys()):
        raise UsageError(f"create_model decides on {', '.join(taken)} itself: leave it out of the model's arguments")


def _describe(model: nn.Module, made_by: Mapping[str, Any], img_size: int | tuple[int, int] | None) -> None:
    """Let `pretrained_cfg` tell the size that the model was built for, in a copy of its own."""
    channels, *published = made_by.get("input_size") or (3, 224, 224)
    size = published if img_size is None else (img_size, img_size) if isinstance(img_size, int) else img_size
    config = {**made_by, "input_size": (channels, *size), "num_classes": getattr(model, "num_classes", None)}
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
    place = next((path for path, module in model.named_modules() if module is classifier), None)
    if not isinstance(classifier, nn.Linear) or not place:
        raise UsageError(
            f"head cosine replaces a linear classifier, and {type(model).__name__} ends in "
            f"{type(classifier).__name__}: choose head linear"
        )
    parent, _, last = place.rpartition(".")
    setattr(model.get_submodule(parent), last, CosineHead(classifier.in_features, num_classes, **options))
    return model


def _ifa(model: nn.Module, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    _no_options("ifa", options)
    return model if isinstance(model, IFAVisionTransformer) else IFAVisionTransformer(model, num_classes)


def _no_options(head: str, options: Mapping[str, Any]) -> None:
    if options:
        raise UsageError(f"head {head} takes no options, got {', '.join(sorted(options))}")


#: Head by name: takes the timm model, the number of classes and the head's options, gives the model that has it.
HEADS: dict[str, Callable[[nn.Module, int, Mapping[str, Any]], nn.Module]] = {
    "linear": _linear,
    "cosine": _cosine,
    "ifa": _ifa,
}


def spec_of(model: nn.Module) -> ModelSpec:
    """How a model was made, also through `torch.compile` and DistributedDataParallel.

    Raises:
        UsageError: not a model of `create_model`.
    """
    spec = getattr(bare(model), "spec", None)
    if not isinstance(spec, ModelSpec):
        raise UsageError(f"{type(model).__name__} was not made by create_model, so it cannot be described in a file")
    return spec


def bare(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` and DistributedDataParallel put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def input_config(model: nn.Module) -> InputConfig:
    """Size and normalisation of the images that a model expects."""
    config: Any = bare(model).pretrained_cfg
    size = config.get("input_size") or (3, 224, 224)
    return InputConfig(
        size=(int(size[1]), int(size[2])),
        mean=tuple(float(value) for value in config.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN),
        std=tuple(float(value) for value in config.get("std") or timm.data.IMAGENET_DEFAULT_STD),
        interpolation=str(config.get("interpolation") or "bicubic"),
    )


def head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the classifier, to train them alone or at a rate of their own."""
    names = head_names(bare(model))
    return (value for name, value in bare(model).named_parameters() if name in names)
