"""Google's vision transformers in `.npz` files, under timm's names.

The names and layouts are those of the JAX models (vision_transformer and big_vision): kernels are (in, out), and those
of attention have one axis for the heads. Heads that pool by attention are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animesion.errors import UsageError

_PATCHES = "embedding/kernel"
_PREFIXES = ("", "opt/target/", "params/", "params/img/")
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/LayerNorm_0/scale")
#: Name in the file -> timm's name, for what is outside of the blocks.
_NAMES = {
    "cls": "cls_token",
    "embedding/bias": "patch_embed.proj.bias",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "head/bias": "head.bias",
}
_POSITIONS = ("Transformer/posembed_input/pos_embedding", "pos_embedding")


def is_google(content: Any) -> bool:
    """Whether tensors by name are Google's vision transformer."""
    return isinstance(content, Mapping) and _prefix(content) is not None


def _prefix(content: Mapping[Any, Any]) -> str | None:
    for prefix in _PREFIXES:
        if f"{prefix}{_PATCHES}" in content and f"{prefix}Transformer/encoder_norm/scale" in content:
            return prefix
    return None


def from_google(content: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename and transpose weights for timm's VisionTransformer.

    Args:
        content: arrays of the file by name.
        path: the file, for messages.

    Returns:
        Weights with the classifier, if the file has one.

    Raises:
        UsageError: weights are missing, or are not of a plain vision transformer.
    """
    prefix = _prefix(content) or ""
    arrays = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    if any(name.startswith(("conv_root/", "MAPHead_0/")) for name in arrays):
        raise UsageError(f"{path} is a vision transformer on a ResNet or with a pooling head: only plain ones are read")
    blocks = sorted(int(match[1]) for name in arrays if (match := _BLOCK.fullmatch(name)))
    if not blocks or blocks != list(range(len(blocks))):
        raise UsageError(f"{path}: the blocks of this vision transformer are incomplete")
    try:
        renamed = {ours: arrays[theirs].float() for theirs, ours in _NAMES.items() if theirs in arrays}
        renamed["patch_embed.proj.weight"] = arrays[_PATCHES].float().permute(3, 2, 0, 1).contiguous()
        positions = next(arrays[name] for name in _POSITIONS if name in arrays).float()
        renamed["pos_embed"] = positions.reshape(1, -1, positions.shape[-1])
        if "head/kernel" in arrays:
            renamed["head.weight"] = arrays["head/kernel"].float().T.contiguous()
        for i in blocks:
            renamed |= _block(arrays, f"Transformer/encoderblock_{i}/", f"blocks.{i}.")
    except (KeyError, StopIteration, RuntimeError, IndexError) as error:
        missing = error.args[0] if isinstance(error, KeyError) else "its position embeddings, or they have another form"
        raise UsageError(f"{path}: this vision transformer lacks {missing}") from error
    return renamed


def _block(arrays: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    # the modules of a block are numbered together in one code base, and by kind in the other
    together = f"{theirs}LayerNorm_2/scale" in arrays
    attention = f"{theirs}MultiHeadDotProductAttention_{1 if together else 0}/"
    mlp, second = f"{theirs}MlpBlock_{3 if together else 0}/", f"{theirs}LayerNorm_{2 if together else 1}/"
    renamed: dict[str, Tensor] = {}
    for name, norm in (("norm1", f"{theirs}LayerNorm_0/"), ("norm2", second)):
        renamed[f"{ours}{name}.weight"] = arrays[f"{norm}scale"].float()
        renamed[f"{ours}{name}.bias"] = arrays[f"{norm}bias"].float()
    parts = ("query", "key", "value")  # kernels (D, heads, width of a head)
    renamed[f"{ours}attn.qkv.weight"] = torch.cat(
        [arrays[f"{attention}{p}/kernel"].float().flatten(1).T for p in parts]
    )
    renamed[f"{ours}attn.qkv.bias"] = torch.cat([arrays[f"{attention}{p}/bias"].float().flatten() for p in parts])
    # the kernel (heads, width of a head, D)
    renamed[f"{ours}attn.proj.weight"] = arrays[f"{attention}out/kernel"].float().flatten(0, 1).T.contiguous()
    renamed[f"{ours}attn.proj.bias"] = arrays[f"{attention}out/bias"].float()
    for number, name in enumerate(("fc1", "fc2")):
        renamed[f"{ours}mlp.{name}.weight"] = arrays[f"{mlp}Dense_{number}/kernel"].float().T.contiguous()
        renamed[f"{ours}mlp.{name}.bias"] = arrays[f"{mlp}Dense_{number}/bias"].float()
    return renamed
