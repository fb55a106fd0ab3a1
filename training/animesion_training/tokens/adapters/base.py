"""Helpers that the adapters share: initialisation, and the layout of tokens as a map.

The adapters are in `in_block`, `ila` and `prompts`, names and factory in `factory`.
"""

from __future__ import annotations

from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.tokens.state import Tokens


def init_xavier(module: nn.Module) -> None:
    """Xavier weights and zero biases for all linear layers and convolutions inside."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def parted(x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """What is of prefix, patches and extra tokens, of x (B, T, d)."""
    end = x.shape[1] - tokens.extra
    return x[:, : tokens.prefix], x[:, tokens.prefix : end], x[:, end:]


def grid_of(tokens: Tokens, what: str) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        UsageError: a method has dropped or merged some, so that they form none.
    """
    if tokens.grid is None:
        raise UsageError(f"adapter {what} needs patches that form a grid: leave out the token reduction before it")
    return tokens.grid


def as_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, N, d) as a map (B, d, rows, columns)."""
    batch, _, width = patches.shape
    return patches.reshape(batch, *grid, width).permute(0, 3, 1, 2)


def as_tokens(features: Tensor) -> Tensor:
    """A map (B, d, rows, columns) as patches (B, N, d)."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)
