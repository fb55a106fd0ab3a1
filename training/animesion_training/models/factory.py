"""What timm's factory expects of the entry points of our networks: default configs, devices, types and feature nets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from animesion_training.models.assemble import init_from_backbone


def build_model(
    make: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Build a network with timm's `build_model_with_cfg`, on a device and of a type.

    Args:
        make: the network's class, or a function that makes it.
        name: registered name.
        pretrained: load timm's weights.
        device: device of all parameters and buffers; None for torch's default.
        dtype: their floating-point type; None for float32.
        **options: further arguments of `build_model_with_cfg` and `make`.
    """
    with torch.device(device) if device is not None else nullcontext():
        model = build_model_with_cfg(make, name, pretrained, **options)
    return model if dtype is None else model.to(dtype)


def build_on_backbone(make: Callable[..., nn.Module], name: str, pretrained: bool, **options: Any) -> Any:
    """Build a network around a backbone, for which timm publishes weights; all others keep their initial values."""

    def adapt(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        adapted = model.adapt_state_dict(state_dict)
        return {key: adapted.get(key, value) for key, value in model.state_dict().items()}

    features = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    model = build_model(make, name, pretrained, feature_cfg=features, pretrained_filter_fn=adapt, **options)
    if pretrained:
        init_from_backbone(model)
    return model


def backbone_configs(name: str, host: str, tags: Iterable[str], *, prefix: str, classifier: str) -> dict[str, Any]:
    """The configs of timm for a backbone, for a network around it, by full name.

    Args:
        name: registered name.
        host: timm's name of the backbone.
        tags: tags of its weights.
        prefix: prefix of the backbone's parameters in the network.
        classifier: name of the classifier's last layer in the network.
    """
    default = timm.get_pretrained_cfg(host)
    configs = {}
    for tag in tags:
        config = timm.get_pretrained_cfg(f"{host}.{tag}" if tag else host)
        if config is None:
            continue
        # a star marks the default, the same as the backbone's
        star = "*" if default is not None and tag and tag == default.tag else ""
        configs[f"{name}.{tag}{star}" if tag else name] = dataclasses.replace(
            config,
            architecture=name,
            first_conv=f"{prefix}patch_embed.proj",
            classifier=classifier,
            custom_load=False,
        )
    return configs
