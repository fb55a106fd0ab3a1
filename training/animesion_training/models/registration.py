"""Registration of the usual combinations of methods and baselines with timm, under the names of `shorthand`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

from animesion.errors import UsageError
from animesion_training.models.baselines import BASELINES
from animesion_training.models.create import create_model
from animesion_training.models.factory import backbone_configs, build_on_backbone
from animesion_training.models.shorthand import combinations

#: Words whose network has other prefixes of the backbone, or another last layer of the classifier.
_PREFIXES = {"glsim": "encoder.backbone.", "rams": "encoder.backbone."}
_CLASSIFIERS = {"cal": "head.fc", "rams": "encoder.head"}


def _entry_point(name: str, words: str, baseline: str) -> Callable[..., nn.Module]:
    """Return a function that `timm.models.register_model` accepts."""

    def make(num_classes: int = 1000, **options: Any) -> nn.Module:
        try:
            return create_model(name, num_classes, **options)
        except UsageError as error:
            if isinstance(error.__cause__, TypeError):  # timm's error for an unknown argument
                raise TypeError(str(error)) from error
            raise

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = build_on_backbone(make, name, pretrained, **options)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`{baseline}` with {words.replace('_', ' and ')}."
    return build


def _configs() -> dict[str, Any]:
    configs: dict[str, Any] = {}
    for name, words, baseline in combinations():
        default = timm.get_pretrained_cfg(BASELINES[baseline])
        configs |= backbone_configs(
            name,
            BASELINES[baseline],
            [(default.tag if default else "") or ""],
            prefix=_PREFIXES.get(words, "backbone."),
            classifier="head.fc" if words.endswith("clca") else _CLASSIFIERS.get(words, "head"),
        )
    return dict(generate_default_cfgs(configs))


default_cfgs = _configs()

for _name, _words, _baseline in combinations():
    # an attribute of this module, because timm looks its entry points up by name
    setattr(sys.modules[__name__], _name, register_model(_entry_point(_name, _words, _baseline)))
