"""LRNet of the original: networks and TGDA's students, of any depth and width."""

from __future__ import annotations

from typing import Any

from torch import nn

from animesion.errors import UsageError
from animesion_training.models.create import ModelSpec
from animesion_training.models.lrnet import CHANNELS, DEEP_STEM_WIDTH, LRNETS, STEM_WIDTH
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter
from animesion_training.originals.students import set_normalisation, student_side, without_wrapper

_STAGES = range(1, 6)


def _is_lrnet(config: Config, weights: StateDict) -> bool:
    """LRNet has a fifth stage, unlike a ResNet; with attention maps in the head it is a CAL teacher."""
    fifth = {"layer5.0.conv1.weight", "encoder.layer5.0.conv1.weight"}
    return not fifth.isdisjoint(weights) and not any(key.startswith("dfsm.attentions.") for key in weights)


def _build_lrnet(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    """All sizes follow from the weights; the original has no known faults to reproduce."""
    renamed = without_wrapper(weights, "encoder.", "fc.")
    block = "bottleneck" if "layer1.0.conv3.weight" in renamed else "basic"
    deep = "conv1.0.weight" in renamed
    try:
        stem = renamed["conv1.0.weight" if deep else "conv1.weight"]
        num_classes = renamed["fc.weight"].shape[0]
        found: dict[str, Any] = {
            "in_chans": stem.shape[1],
            "stem_width": renamed["bn1.weight"].shape[0],
            "channels": [renamed[f"layer{stage}.0.conv1.weight"].shape[0] for stage in _STAGES],
            "deep_stem_width": stem.shape[0] if deep else DEEP_STEM_WIDTH,
            "layers": [_blocks(renamed, stage) for stage in _STAGES],
        }
    except KeyError as error:
        raise UsageError(f"this LRNet checkpoint lacks {error.args[0]}") from None
    # the registered name of this size, or of any with these blocks, whose defaults the options replace
    name = next((name for name, kind in LRNETS.items() if kind == (block, tuple(found["layers"]))), None)
    name = name or next(name for name, kind in LRNETS.items() if kind[0] == block)
    usual = {
        "in_chans": 3,
        "stem_width": STEM_WIDTH,
        "channels": list(CHANNELS),
        "deep_stem_width": DEEP_STEM_WIDTH,
        "layers": list(LRNETS[name][1]),
    }
    options = {option: value for option, value in found.items() if value != usual[option]}
    spec = ModelSpec(f"{name}d" if deep else name, num_classes, student_side(config, 128), options=options)
    model = spec.build()
    load_all(model, renamed, "LRNet")
    set_normalisation(model, config)
    return model


def _blocks(weights: StateDict, stage: int) -> int:
    return 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(f"layer{stage}."))


register_converter(Converter("LRNet", _is_lrnet, _build_lrnet))
