"""The plain vision transformer behind checkpoints in timm's parameter names, which CLCA, GLSim and ILA share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from animesion.errors import UsageError
from animesion_training.originals.base import StateDict

#: Epsilon of layer norms. CLIP's transformers, which begin with a norm, have torch's.
_EPS, _CLIP_EPS = 1e-6, 1e-5


def timm_backbone(settings: Mapping[str, Any], weights: StateDict, registers: int = 0) -> tuple[Any, bool]:
    """The plain transformer for weights under timm's names, and whether its class token has a position.

    Args:
        settings: `num_heads`, unless heads have width 64; `img_size`, unless images are square.
        weights: weights of the transformer, and possibly of other modules.
        registers: number of additional tokens that have positions if the class token has one.

    Raises:
        UsageError: the positions fit no grid.
    """
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    width, channels, *patch = weights["patch_embed.proj.weight"].shape
    reg_tokens = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    rows = weights["pos_embed"].shape[1]
    clip = "norm_pre.weight" in weights
    prefix = 1 + reg_tokens + registers
    grid = _grid(settings, (patch[0], patch[1]), rows, prefix)
    embedded = rows == grid[0] * grid[1] + prefix  # whether the prefix has positions
    backbone = VisionTransformer(
        img_size=(grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=(patch[0], patch[1]),
        in_chans=channels,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=int(settings.get("num_heads") or max(1, width // 64)),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        init_values=1e-6 if "blocks.0.ls1.gamma" in weights else None,
        no_embed_class=not embedded,
        reg_tokens=reg_tokens,
        pre_norm=clip,
        norm_layer=partial(nn.LayerNorm, eps=_CLIP_EPS if clip else _EPS),
    )
    return backbone, embedded


def _grid(settings: Mapping[str, Any], patch: tuple[int, int], rows: int, prefix: int) -> tuple[int, int]:
    """The grid (rows, columns) with this number of positions, with or without the prefix.

    It follows from the size of images in the settings; without one it is square.
    """
    image_size = settings.get("img_size") or settings.get("image_size")
    sides = {round(count**0.5) for count in (rows, rows - prefix) if count > 0}
    grids = [(side, side) for side in sorted(sides, reverse=True)]
    if image_size:
        height, width = image_size if isinstance(image_size, list | tuple) else (image_size, image_size)
        grids = [(int(height) // patch[0], int(width) // patch[1])]
    for grid in grids:
        if rows - grid[0] * grid[1] in (0, prefix):
            return grid
    raise UsageError(
        f"this checkpoint has {rows} positions, which fit neither a square image nor the image size {image_size}: "
        "set img_size to the size that it was trained at"
    )
