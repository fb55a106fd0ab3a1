"""Position embeddings of a file for the grid of a model: resampled from the size that the file was trained at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from animesion.errors import UsageError

_POSITIONS, _PATCHES = "pos_embed", "patch_embed.proj.weight"
_Grid = tuple[int, int]


def match_positions(
    given: Mapping[str, Tensor], model: nn.Module, size: tuple[int, int] | None, path: Path
) -> tuple[dict[str, Tensor], str]:
    """Resample the position embeddings (1, P + h w, D) of plain vision transformers, P for class token and registers.

    timm takes embeddings that do not have the number of the model's to be of a square image, and others for those of
    the model, whatever its aspect ratio.

    Args:
        given: weights by name.
        model: the model that they are for.
        size: (height, width) in pixels of the images that they were trained with; None if it is unknown, so a square
            number of positions is taken for a square image.
        path: the file, for messages.

    Returns:
        The weights, and a note; empty if nothing was changed or assumed.

    Raises:
        UsageError: the size is unknown and the positions are of no square, or the model has relative positions which
            cannot be resampled from an image that is not square.
    """
    matched, note = dict(given), ""
    for name, host in _hosts(model):
        _check_relative(given, host, size, path)
        keys = [key for key in (f"{name}{_POSITIONS}", _POSITIONS) if key in given]
        if not keys or given[keys[0]].ndim != 3 or getattr(host, _POSITIONS, None) is None:
            continue
        key = keys[0]
        old = given[key]
        prefix = 0 if getattr(host, "no_embed_class", False) else getattr(host, "num_prefix_tokens", 1)
        new: _Grid = tuple(host.patch_embed.grid_size)
        count = old.shape[1] - prefix
        grid = _trained_grid(given, host, size, count)
        if grid is None:
            side = math.isqrt(max(count, 0))
            if count == new[0] * new[1]:
                if new[0] != new[1]:
                    note = f"positions taken as those of {new[0]}x{new[1]} patches, as the file does not state its size"
                continue
            if side * side != count:
                raise UsageError(
                    f"{path}: its {count} position embeddings are of no square image, and the file does not state the "
                    f"size: it cannot be resampled to the {new[0]}x{new[1]} patches of this model"
                )
            grid = (side, side)
        if grid != new:
            matched[key] = resample_abs_pos_embed(
                old, new_size=list(new), old_size=list(grid), num_prefix_tokens=prefix
            )
            note = f"position embeddings resampled from {grid[0]}x{grid[1]} to {new[0]}x{new[1]} patches"
    return matched, note


def _hosts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The transformers in a model that have a grid of patches, with the prefix of their names."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "patch_embed", None), "grid_size", None) is not None:
            yield f"{name}." if name else "", module


def _trained_grid(given: Mapping[str, Tensor], host: Any, size: _Grid | None, count: int) -> _Grid | None:
    """The grid of the file: rows and columns of patches; None if it is unknown or has another number of positions."""
    if size is None:
        return None
    patch = tuple(host.patch_embed.patch_size)
    for key, value in given.items():
        if key.endswith(_PATCHES) and value.ndim == 4:
            patch = (value.shape[2], value.shape[3])
    grid = (size[0] // patch[0], size[1] // patch[1])
    return grid if grid[0] * grid[1] == count else None


def _check_relative(given: Mapping[str, Tensor], host: Any, size: _Grid | None, path: Path) -> None:
    """Raise if relative positions are of windows that are not square, here or in the file, and of another size."""
    target = tuple(getattr(host.patch_embed, "img_size", None) or ())
    if size is None or target == size or not target:
        return
    for key in given:
        if key.endswith("relative_position_bias_table"):
            windows = [getattr(module, "window_size", None) for module in host.modules()]
            square = all(len(set(window)) == 1 for window in windows if isinstance(window, tuple | list))
            if not square or size[0] != size[1]:
                raise UsageError(
                    f"{path} has relative positions of images of {size[0]}x{size[1]} pixels, which cannot be resampled "
                    f"to {target[0]}x{target[1]}: build the model for the size of the file, or for a square"
                )
            return
