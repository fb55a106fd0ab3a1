"""Putting fine-grained methods on a timm model: which plug-ins, in which order, under which head and wrapper.

The methods themselves are in `tokens` and `cal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from animesion.errors import UsageError
from animesion.settings import nearest
from animesion_training.models.methods import Methods

#: Heads that need the tokens of a vision transformer; `linear` too, where there are token methods.
TOKEN_HEADS = {
    "cls": "one linear layer on the class token",
    "ifa": "aggregation of the class tokens of every block",
    "cla": "cross-layer aggregation of the class tokens at the ends of groups",
}

#: How parts are found.
SELECTORS = {
    "cal": "counterfactual attention learning: 32 attention maps, the teacher of TGDA",
}


def assemble(
    backbone: nn.Module, methods: Methods, head: str, num_classes: int, head_options: Mapping[str, Any]
) -> nn.Module:
    """Put methods and head on a model.

    Args:
        backbone: a timm model with its own classifier.
        methods: what to put on it.
        head: name of the head.
        num_classes: number of classes.
        head_options: arguments of the head.

    Raises:
        UsageError: an unknown name, or methods that do not go together or not with this backbone.
    """
    if methods.selector and methods.selector not in SELECTORS:
        near = nearest(methods.selector, SELECTORS) or f"; there are {', '.join(SELECTORS)}"
        raise UsageError(f"there is no selector '{methods.selector}'{near}")
    if methods.selector == "cal":
        return _cal(backbone, methods, head, num_classes)
    raise UsageError(f"head {head} is not there yet")


def _cal(backbone: nn.Module, methods: Methods, head: str, num_classes: int) -> nn.Module:
    from animesion_training.models.cal import CALClassifier

    if methods.reduction or methods.cache or methods.adapter or head != "linear":
        raise UsageError("selector cal has a head of its own and goes with no other method: leave the others out")
    return CALClassifier(backbone, num_classes, **methods.of("selector"))
