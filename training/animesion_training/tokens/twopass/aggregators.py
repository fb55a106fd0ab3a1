"""Aggregators of GLSim: small networks that combine the tokens of both passes before the classifier."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.tokens.options import whole_number


class ConvAggregator(nn.Module):
    """All tokens to one, by a convolution over them (an ablation of GLSim).

    Norm, Conv1d of kernel n, norm; depthwise it is followed by GELU, a 1x1 Conv1d and another norm.

    Args:
        width: of the tokens.
        inputs: n, number of tokens.
        depthwise: convolve each channel by itself, and mix channels after.
        eps: of the norms.

    Shape:
        (B, n, width) to (B, 1, width).

    Raises:
        UsageError: another number of tokens.
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
            raise UsageError(f"this aggregator convolves {self.inputs} tokens, and it is given {x.shape[1]}")
        joined = self.conv1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = self.mix(self.norm2(joined))
        return mixed


def transformer_aggregator(width: int, depth: int, heads: int | None, eps: float, last_eps: float) -> nn.Sequential:
    """Transformer blocks and a norm."""
    whole_number("aggregator_depth", depth)
    if heads is None:  # of width 64, or somewhat wider where that does not divide the width
        heads = next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0)
    if width % whole_number("aggregator_heads", heads):
        raise UsageError(f"aggregator_heads must divide the width {width} of the tokens, {heads} does not")
    norm: Any = partial(nn.LayerNorm, eps=eps)
    blocks = [Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(width, eps=last_eps))
