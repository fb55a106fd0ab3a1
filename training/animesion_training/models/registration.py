"""Registration of the usual combinations of methods and baselines with timm, under the names of `shorthand`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from timm.models import register_model
from torch import nn

from animesion_training.models.create import create_model
from animesion_training.models.shorthand import combinations

#: Arguments that timm's factory passes to an entry point, and `create_model` sets itself.
_OF_FACTORY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _entry_point(name: str, words: str, baseline: str) -> Callable[..., nn.Module]:
    """Return a function that `timm.models.register_model` accepts."""

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        for key in _OF_FACTORY:
            options.pop(key, None)
        return create_model(name, options.pop("num_classes", 1000), pretrained=pretrained, **options)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`{baseline}` with {words.replace('_', ' and ')}."
    return build


for _name, _words, _baseline in combinations():
    # an attribute of this module, because timm looks its entry points up by name
    setattr(sys.modules[__name__], _name, register_model(_entry_point(_name, _words, _baseline)))
