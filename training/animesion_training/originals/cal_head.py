"""The head of counterfactual attention learning (CAL) without a backbone, as ILA's repository has it.

Networks with this head are read by `cal`.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from animesion_training.models.cal import CALHead
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter

_CAL_ATTENTION, _CAL_CLASSIFIER = "attentions.conv.weight", "fc.weight"

_CAL_PARTS = ("attentions.", "fc.")


class CALLogits(nn.Module):
    """CAL's head with logits as its only output: feature map (B, C, h, w) to (B, num_classes)."""

    def __init__(self, head: CALHead) -> None:
        super().__init__()
        self.head = head
        self.num_classes = head.num_classes

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(features).logits
        return logits


def _without_prefix(weights: StateDict) -> dict[str, Tensor]:
    return {re.sub(r"^(head|dfsm)\.", "", key): value for key, value in weights.items()}


def _is_cal_head(config: Config, weights: StateDict) -> bool:
    renamed = _without_prefix(weights)
    return (
        _CAL_ATTENTION in renamed and _CAL_CLASSIFIER in renamed and all(key.startswith(_CAL_PARTS) for key in renamed)
    )


def _build_cal_head(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    renamed = _without_prefix(weights)
    maps, channels = renamed[_CAL_ATTENTION].shape[:2]
    head = CALHead(channels, len(renamed[_CAL_CLASSIFIER]), maps)
    load_all(head, renamed, "CAL head")
    return CALLogits(head)


register_converter(Converter("CAL head", _is_cal_head, _build_cal_head))
