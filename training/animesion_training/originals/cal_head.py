"""The head of counterfactual attention learning (CAL) alone, on a feature map, as ILA's repository compares with it.

Whole networks with this head are read by `cal`.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from animesion_training.models.cal import CALHead
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter

_CAL_ATTENTION, _CAL_CLASSIFIER = "attentions.conv.weight", "fc.weight"

_CAL_PARTS = ("attentions.", "fc.")


class CALLogits(nn.Module):
    """CAL's head where logits alone are wanted: a feature map (B, C, h, w) to (B, num_classes)."""

    def __init__(self, head: CALHead) -> None:
        super().__init__()
        self.head = head
        self.num_classes = head.num_classes

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(features).logits
        return logits


def _bare(weights: StateDict) -> dict[str, Tensor]:
    return {re.sub(r"^(head|dfsm)\.", "", key): value for key, value in weights.items()}


def _is_cal_head(config: Config, weights: StateDict) -> bool:
    bare = _bare(weights)
    return _CAL_ATTENTION in bare and _CAL_CLASSIFIER in bare and all(key.startswith(_CAL_PARTS) for key in bare)


def _build_cal_head(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    bare = _bare(weights)
    maps, channels = bare[_CAL_ATTENTION].shape[:2]
    head = CALHead(channels, len(bare[_CAL_CLASSIFIER]), maps)
    load_all(head, bare, "CAL head")
    return CALLogits(head)


register_converter(Converter("CAL head", _is_cal_head, _build_cal_head))
