"""Backbones of the originals: their names in timm of today, and networks that were fine-tuned without further methods.

FGIR-Backbones and FGIR-KD-Teacher were written for older versions of timm, whose defaults have changed since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.create import create_model
from animesion_training.models.pretrained import adapt_names
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter, set_statistics
from animesion_training.originals.students import STUDENT_HEAD

#: Name in the originals -> timm's name, with the weights that it started from. Other names are the same in both.
BACKBONES = {
    "vit_b16": "vit_base_patch16_224.orig_in21k",
    "cal_vit_b16": "vit_base_patch16_224.orig_in21k",
    "vgg19_bn": "vgg19_bn.tv_in1k",
    "swin_base_patch4_window7_224_in22k": "swin_base_patch4_window7_224.ms_in22k",
    "swin_large_patch4_window7_224_in22k": "swin_large_patch4_window7_224.ms_in22k",
    "swin_base_patch4_window7_224": "swin_base_patch4_window7_224.ms_in1k",
    "resnetv2_101x3_bitm_in21k": "resnetv2_101x3_bit.goog_in21k",
    "resnetv2_101": "resnetv2_101.a1h_in1k",
    "resnet101": "resnet101.a1h_in1k",
    "tv_resnet34": "resnet34.tv_in1k",
    "tv_resnet50": "resnet50.tv_in1k",
    "tv_resnet101": "resnet101.tv_in1k",
    "resnet18": "resnet18.tv_in1k",
    "convnext_base_in22k": "convnext_base.fb_in22k",
    "convnext_large_in22k": "convnext_large.fb_in22k",
    "convnext_base": "convnext_base.fb_in1k",
    "beitv2_base_patch16_224_in22k": "beitv2_base_patch16_224.in1k_ft_in22k",
    "deit3_base_patch16_224_in21ft1k": "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "deit3_large_patch16_224_in21ft1k": "deit3_large_patch16_224.fb_in22k_ft_in1k",
    "deit3_base_patch16_224": "deit3_base_patch16_224.fb_in1k",
}
_HEAD = "head.head."


def backbone_name(config: Config) -> str:
    """The name of the architecture in timm for the name in a config.

    Raises:
        UsageError: there is no name, or timm has no such network.
    """
    name = config.get("model_name")
    if not isinstance(name, str) or not name:
        raise UsageError("the config of a CAL teacher needs model_name, the name of its backbone")
    full = BACKBONES.get(name, name)
    # weights tags differ between versions of timm, and these weights replace those of the tag anyway
    return full if full in timm.list_pretrained(f"{full.partition('.')[0]}.*") else full.partition(".")[0]


def _classifier(weights: StateDict) -> str:
    """Prefix of the classifier: the originals' own, or that of a student beside a CAL teacher; empty for others."""
    return next((prefix for prefix in (_HEAD, STUDENT_HEAD) if f"{prefix}weight" in weights), "")


def _is_finetuned(config: Config, weights: StateDict) -> bool:
    name = config.get("model_name")
    known = isinstance(name, str) and (name in BACKBONES or timm.is_model(name))
    return known and bool(_classifier(weights)) and not any(key.startswith("dfsm.attentions.") for key in weights)


def _build_finetuned(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    """The network of timm with its own pooling; the originals pool likewise, by the class token where there is one."""
    prefix = _classifier(weights)
    backbone = {
        key.removeprefix("encoder.").removeprefix("0."): value
        for key, value in weights.items()
        if not key.startswith(prefix)
    }
    last = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    options: dict[str, Any] = {}
    if "cls_token" in backbone:
        options["global_pool"] = "token"  # the norm is then before the pooling, as in the originals
    elif "pos_embed" in backbone:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    model: Any = create_model(
        backbone_name(config),
        len(last["weight"]),
        config.get("student_image_size") or config.get("image_size"),
        **options,
    )
    names: Any = model.pretrained_cfg["classifier"]
    own: Mapping[str, Tensor] = model.state_dict()
    head = {f"{names}.{leaf}": value.reshape(own[f"{names}.{leaf}"].shape) for leaf, value in last.items()}
    load_all(model, adapt_names(backbone, model) | head, "fine-tuned network")
    set_statistics(model, config)
    result: nn.Module = model
    return result


register_converter(Converter("fine-tuned network", _is_finetuned, _build_finetuned))
