"""The attention of one block, open to plug-ins: they read or replace queries, keys, values and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional


class Attended:
    """The attention of an opened block: queries, keys and values; scores, weights and output on request.

    Args:
        attention: timm's module.
        normed: the block's normalised input, (B, T, D).
        bias: added to the scores, broadcast to (B, heads, T, T); None for no bias.

    Attributes:
        q: (B, heads, Tq, d), d the width of a head; after the norm of queries, not scaled. A plug-in may replace it.
        k: (B, heads, Tk, d); likewise.
        v: (B, heads, Tk, d); likewise.
        bias: as above; a plug-in may replace it along with them.
        mixing: replaces the softmax: a function from scores (B, heads, Tq, Tk), bias included, to weights.
        normed: the block's normalised input, (B, Tq, D), as `Plugin.parallel` receives it.
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
        # not `cached_property`, whose lock (Python 3.11) torch.compile cannot trace
        self._weights: Tensor | None = None
        self._class_row: Tensor | None = None

    def scores(self, rows: slice = slice(None)) -> Tensor:
        """Scaled dot products of the queries in `rows` with all keys, plus the bias: (B, heads, rows, Tk)."""
        scores: Tensor = (self.q[:, :, rows] * self.attention.scale) @ self.k.transpose(-2, -1)
        if self.bias is None:
            return scores
        same_for_all_queries = self.bias.shape[-2] == 1
        return scores + (self.bias if same_for_all_queries else self.bias[:, :, rows])

    @property
    def class_row(self) -> Tensor:
        """Attention weights of the class token, (B, heads, Tk).

        This one row is computed in addition to the fused attention, which stays in use.
        """
        if self._class_row is None:
            if self._weights is None:
                self._class_row = self.scores(slice(0, 1)).softmax(dim=-1)[:, :, 0]
            else:
                self._class_row = self._weights[:, :, 0]
        return self._class_row

    @property
    def has_weights(self) -> bool:
        """Whether a plug-in has read all weights of this block."""
        return self._weights is not None

    @property
    def weights(self) -> Tensor:
        """All attention weights, (B, heads, Tq, Tk), before dropout. Reading them disables the fused attention."""
        if self._weights is None:
            scores = self.scores()
            self._weights = self.mixing(scores) if self.mixing else scores.softmax(dim=-1)
        return self._weights

    def output(self) -> Tensor:
        """The module's output, (B, Tq, D)."""
        module = self.attention
        if self.mixing or self._weights is not None:
            mixed = module.attn_drop(self.weights) @ self.v
        else:
            mixed = functional.scaled_dot_product_attention(
                self.q, self.k, self.v, self.bias, module.attn_drop.p if module.training else 0.0
            )
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, heads, Tq, d) to (B, Tq, D)
        out: Tensor = module.proj_drop(module.proj(module.norm(mixed)))
        return out
