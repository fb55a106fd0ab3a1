"""The attention of one block, opened so that a plug-in can read or replace its queries, keys, values and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn import functional


class Attended:
    """The attention of an opened block: its queries, keys and values, and what follows from them when asked for.

    Args:
        attention: timm's module.
        normed: the block's normalised input, (B, T, D).
        bias: added to the scores, broadcast to (B, heads, T, T).

    Attributes:
        q: (B, heads, Tq, head width), normalised as the module says, not scaled; may be replaced by a plug-in.
        k: (B, heads, Tk, head width); likewise.
        v: (B, heads, Tk, head width); likewise.
        bias: may be replaced along with them.
        mixing: in place of the softmax, a function from scores (B, heads, Tq, Tk), bias included, to weights.
        normed: the block's normalised input, (B, Tq, D), as `Plugin.beside` gets it.
    """

    def __init__(self, attention: Any, normed: Tensor, bias: Tensor | None) -> None:
        batch, count, _ = normed.shape
        qkv = attention.qkv(normed).reshape(batch, count, 3, attention.num_heads, attention.head_dim)
        q, k, self.v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        self.q, self.k = attention.q_norm(q), attention.k_norm(k)
        self.attention = attention
        self.normed = normed
        self.bias = bias
        self.mixing: Callable[[Tensor], Tensor] | None = None

    def scores(self, rows: slice = slice(None)) -> Tensor:
        """Scaled products of some queries with all keys, plus the bias: (B, heads, rows, Tk)."""
        scores: Tensor = (self.q[:, :, rows] * self.attention.scale) @ self.k.transpose(-2, -1)
        if self.bias is None:
            return scores
        return scores + (self.bias if self.bias.shape[-2] == 1 else self.bias[:, :, rows])

    @cached_property
    def class_row(self) -> Tensor:
        """Attention weights of the class token, (B, heads, Tk): one row beside the fused attention, not all of them."""
        if "weights" in vars(self):
            return self.weights[:, :, 0]
        return self.scores(slice(0, 1)).softmax(dim=-1)[:, :, 0]

    @cached_property
    def weights(self) -> Tensor:
        """All attention weights, (B, heads, Tq, Tk), before dropout. Asking for them gives up the fused attention."""
        scores = self.scores()
        return self.mixing(scores) if self.mixing else scores.softmax(dim=-1)

    def output(self) -> Tensor:
        """The module's output, (B, Tq, D)."""
        module = self.attention
        if self.mixing or "weights" in vars(self):
            mixed = module.attn_drop(self.weights) @ self.v
        else:
            mixed = functional.scaled_dot_product_attention(
                self.q, self.k, self.v, self.bias, module.attn_drop.p if module.training else 0.0
            )
        mixed = mixed.transpose(1, 2).flatten(2)
        out: Tensor = module.proj_drop(module.proj(module.norm(mixed)))
        return out
