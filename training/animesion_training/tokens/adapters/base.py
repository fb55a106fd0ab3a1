"""Helpers that the adapters share: initialisation, and the layout of tokens as a map.

The adapters are in `in_block`, `ila` and `prompts`, names and factory in `factory`.
"""

from __future__ import annotations

from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.tokens.state import Tokens


def init_xavier(module: nn.Module) -> None:
    """Initialise all linear layers and convolutions of a module with Xavier weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def split_tokens(x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Split x (B, T, d) into its rows for prefix, patches and extra tokens."""
    end = x.shape[1] - tokens.extra
    return x[:, : tokens.prefix], x[:, tokens.prefix : end], x[:, end:]


def grid_of(tokens: Tokens, adapter: str) -> tuple[int, int]:
    """The grid of patches, (rows, columns); `adapter` is a name for the message.

    Raises:
        UsageError: a method has dropped or merged patches, so that they form no grid.
    """
    if tokens.grid is None:
        raise UsageError(f"adapter {adapter} needs patches that form a grid: leave out the token reduction before it")
    return tokens.grid


def as_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshape patches (B, N, d) to a map (B, d, rows, columns)."""
    batch, _, width = patches.shape
    return patches.reshape(batch, *grid, width).permute(0, 3, 1, 2)


def as_tokens(features: Tensor) -> Tensor:
    """Reshape a map (B, d, rows, columns) to patches (B, N, d)."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)
