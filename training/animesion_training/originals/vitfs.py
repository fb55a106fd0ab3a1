"""ViTFS of the original: networks and TGDA's students, with convolutional stem, with or without aggregators.

The original's residual stems (`rpds`, `dw_rpds`) are not supported.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.create import ModelSpec
from animesion_training.models.vitfs import SIZES
from animesion_training.models.vitfs_layers import PATCH, sincos_positions
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter
from animesion_training.originals.students import is_student, set_normalisation, student_side, without_wrapper

_POSITIONS = "sin2d_embedding"
#: Pattern of the original's names -> ours; other names are the same.
_NAMES = (
    (r"patch_embed\.conv3x3layers\.(\d+)\.", r"patch_embed.stages.\1."),
    (r"patch_embed\.conv1x1\.", "patch_embed.proj."),
    (r"^((?:blocks\.\d+\.)?norm[12]?)\.1\.", r"\1.bn."),
)
_OURS = re.compile(r"(?:patch_embed\.(?:stages|proj)|blocks|norm|head)\.|reg_token$")
#: Largest difference of the original's positions from ours; half precision is accepted.
_TOLERANCE = 1e-3


def _is_vitfs(config: Config, weights: StateDict) -> bool:
    """ViTFS has its own stem and position embedding; with attention maps in the head it is a CAL teacher."""
    bare = {key.removeprefix("encoder.0.") for key in weights}
    return not bare.isdisjoint({_POSITIONS, "patch_embed.conv3x3layers.0.conv.weight"}) and not any(
        key.startswith("dfsm.attentions.") for key in weights
    )


def _build_vitfs(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    """Sizes follow from the weights; heads have width 64; the kind of classifier decides which tokens are averaged."""
    renamed = without_wrapper(weights, "encoder.0.", "head.")
    for pattern, ours in _NAMES:
        renamed = {re.sub(pattern, ours, key): value for key, value in renamed.items()}
    side = _side(renamed.pop(_POSITIONS, None), student_side(config, 224))
    others = {key: renamed.pop(key) for key in list(renamed) if not _OURS.match(key)}
    try:
        width, channels = (
            renamed["patch_embed.proj.weight"].shape[0],
            renamed["patch_embed.stages.0.conv.weight"].shape[1],
        )
        hidden = renamed["blocks.0.mlp.fc1.weight"].shape[0]
        num_classes = renamed["head.weight"].shape[0]
    except KeyError as error:
        raise UsageError(
            f"this ViTFS checkpoint lacks {error.args[0]}: the convolutional stem is supported, residual ones are not"
        ) from None
    size = next((size for size, (known, _) in SIZES.items() if known == width), "tiny")
    registers = renamed["reg_token"].shape[1] if "reg_token" in renamed else 0
    aggregators, dca_blocks = _aggregators(others)
    found: dict[str, tuple[Any, Any]] = {  # value, and the default
        "in_chans": (channels, 3),
        "embed_dim": (width, SIZES[size][0]),
        "num_heads": (max(1, width // 64), SIZES[size][1]),
        "depth": (1 + max(int(key.split(".")[1]) for key in renamed if key.startswith("blocks.")), 12),
        "mlp_ratio": (hidden / width, 4.0),
        "norm_layer": ("batchnorm" if "norm.bn.weight" in renamed else "layernorm", "batchnorm"),
        "init_values": (1e-5 if "blocks.0.ls1.gamma" in renamed else 0.0, 1e-5),
        "reg_tokens": (registers, 4),
        "dca_blocks": (dca_blocks, 0),
        "reference_compat": (reference_compat and registers > 0, False),
        "pool_include_prefix": (reference_compat and registers > 0 and is_student(weights), False),
    }
    options = {option: value for option, (value, default) in found.items() if value != default}
    model = ModelSpec(f"vitfs_{size}_patch16", num_classes, side, options=options).build()
    load_all(model, renamed | aggregators, "original ViTFS")
    set_normalisation(model, config)
    return model


def _side(positions: Tensor | None, otherwise: int) -> int:
    """Side of the images in pixels; the positions (N, D) of the original are checked, because ours are computed."""
    if positions is None:
        return otherwise
    grid: int = round(positions.shape[0] ** 0.5)
    if positions.ndim != 2 or grid * grid != positions.shape[0] or positions.shape[1] < 8:
        raise UsageError(f"{_POSITIONS} of shape {tuple(positions.shape)} is not a position embedding of a square grid")
    ours = sincos_positions(grid, grid, positions.shape[1], positions.device).flatten(0, 1)
    if not torch.allclose(positions.float(), ours, rtol=0, atol=_TOLERANCE):
        raise UsageError(f"{_POSITIONS} is not the 2-D sin-cos position embedding of ViTFS")
    return grid * PATCH


def _aggregators(others: StateDict) -> tuple[dict[str, Tensor], int]:
    """Rename the remaining tensors as aggregators, and return them with the number of blocks of each, 0 for none.

    They are recognised by shapes, in order: each has two batch norms and a depthwise convolution of (1, n).

    Raises:
        UsageError: they are not parameters of aggregators.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in others.items():
        module, _, leaf = key.rpartition(".")
        modules.setdefault(module, {})[leaf] = value
    every = list(modules.values())
    renamed: dict[str, Tensor] = {}
    blocks = 0
    for j in range(0, len(every), 3):
        norms = [each for each in every[j : j + 3] if "running_mean" in each]
        convs = [each for each in every[j : j + 3] if each.get("weight", torch.empty(0)).ndim == 4]
        if len(norms) != 2 or len(convs) != 1:
            raise UsageError(
                f"this checkpoint has {len(others)} parameters beyond those of ViTFS: {', '.join(sorted(others)[:3])}"
            )
        blocks = convs[0]["weight"].shape[-1]
        for name, tensors in (("norm1", norms[0]), ("conv", convs[0]), ("norm2", norms[1])):
            renamed |= {f"aggregators.{j // 3}.{name}.{leaf}": value for leaf, value in tensors.items()}
    return renamed, blocks


register_converter(Converter("ViTFS", _is_vitfs, _build_vitfs))
