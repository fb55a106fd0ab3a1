"""Aggregators of GLSim: small networks that combine the tokens of both passes before the classifier."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.options import whole_number


class ConvAggregator(nn.Module):
    """Combine all tokens into one by a convolution over them (an ablation of GLSim).

    Norm, Conv1d with kernel n, norm; a depthwise convolution is followed by GELU, a 1x1 Conv1d and another norm.

    Args:
        width: D, width of the tokens.
        inputs: n, number of tokens.
        depthwise: convolve each channel separately, and mix channels afterwards.
        eps: epsilon of the norms.

    Shape:
        (B, n, D) to (B, 1, D).

    Raises:
        UsageError: the number of tokens is not n.
    """

    def __init__(self, width: int, inputs: int, *, depthwise: bool, eps: float) -> None:
        super().__init__()
        self.inputs = inputs
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.conv1 = nn.Conv1d(width, width, inputs, groups=width if depthwise else 1)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mix = nn.Sequential()
        if depthwise:
            self.mix.add_module("act", nn.GELU())
            self.mix.add_module("conv", nn.Linear(width, width))  # a 1x1 convolution
            self.mix.add_module("norm", nn.LayerNorm(width, eps=eps))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.shape[1] != self.inputs:
            raise UsageError(f"this aggregator convolves {self.inputs} tokens, got {x.shape[1]}")
        combined = self.conv1(self.norm1(x).transpose(1, 2)).transpose(1, 2)  # (B, D, n) to (B, D, 1) to (B, 1, D)
        mixed: Tensor = self.mix(self.norm2(combined))
        return mixed


def transformer_aggregator(width: int, depth: int, heads: int | None, eps: float, last_eps: float) -> nn.Sequential:
    """Transformer blocks and a final norm, (B, n, D) to (B, n, D).

    Args:
        width: D.
        depth: number of blocks.
        heads: number of heads of each block; None for heads of width 64.
        eps: epsilon of the norms in the blocks.
        last_eps: epsilon of the final norm.

    Raises:
        UsageError: the number of heads does not divide D, or a number is not positive.
    """
    whole_number("aggregator_depth", depth)
    if heads is None:
        # the largest number that divides D, from D / 64 down: heads are wider than 64 where 64 does not divide D
        heads = next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0)
    if width % whole_number("aggregator_heads", heads):
        raise UsageError(f"aggregator_heads must divide the width {width} of the tokens, and {heads} does not")
    norm: Any = partial(nn.LayerNorm, eps=eps)
    blocks = [Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(width, eps=last_eps))
