"""The state that flows through the blocks of a vision transformer: tokens, and what methods record about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from animesion_training.tokens.autocast import working_dtype


@dataclass(eq=False)
class Tokens:
    """What flows through the blocks. Plug-ins change it in place.

    The order of tokens is: prefix (the class token first), patches or what they were reduced to, extra.

    Attributes:
        x: (B, T, D).
        prefix: tokens in front that are no patches: class token, registers, prompts.
        grid: rows and columns of the patch tokens while they form a grid, else None.
        extra: tokens behind the patches: cross-layer registers and what a cache has given back.
        size: how many patches each token stands for, (B, T), None for one each; attention weighs keys by it.
        real: which tokens are no padding, (B, T) bool, None for all.
        policy: DynamicViT's decision for each token in training, (B, T), None for all kept.
        gathered: class tokens (B, D) taken at the ends of groups, in order.
        losses: further terms of the training loss by name, scalars; already weighted.
        targets: class ids (B,) or soft labels (B, num_classes), where the caller gave them for such terms.
        trace: what a plug-in chose, by `block{i}.<what>`, and each block's class token (`cls`) and number of tokens in
            and out (`tokens`); None when nobody looks.
        scratch: what a plug-in keeps from one hook to a later one, by a name of its own.
    """

    x: Tensor
    prefix: int
    grid: tuple[int, int] | None
    extra: int = 0
    size: Tensor | None = None
    real: Tensor | None = None
    policy: Tensor | None = None
    gathered: list[Tensor] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None
    trace: dict[str, Tensor] | None = None
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def class_token(self) -> Tensor:
        """(B, D)."""
        return self.x[:, 0]

    @property
    def patches(self) -> Tensor:
        """All but prefix and extra, (B, N, D)."""
        return self.x[:, self.prefix : self.x.shape[1] - self.extra]

    def bias(self) -> Tensor | None:
        """What attention adds to its scores, broadcast to (B, heads, T, T): log of sizes, and padding shut out."""
        bias: Tensor | None = None
        if self.size is None and self.real is None:
            return None
        dtype = working_dtype(self.x)
        if self.size is not None:
            bias = self.size.log()[:, None, None, :].to(dtype)
        if self.real is not None:
            both = self.real[:, None, :, None] & self.real[:, None, None, :]
            shut = torch.zeros_like(both, dtype=dtype).masked_fill_(~both, torch.finfo(dtype).min)
            bias = shut if bias is None else bias + shut
        return bias

    def append(self, tokens: Tensor) -> None:
        """Put tokens (B, n, D) behind all others as `extra`: real, of size one, kept."""
        self.x = torch.cat([self.x, tokens], dim=1)
        self.extra += tokens.shape[1]
        shape = tokens.shape[:2]
        if self.size is not None:
            self.size = torch.cat([self.size, self.size.new_ones(shape)], dim=1)
        if self.real is not None:
            self.real = torch.cat([self.real, self.real.new_ones(shape)], dim=1)
        if self.policy is not None:
            self.policy = torch.cat([self.policy, self.policy.new_ones(shape)], dim=1)

    def note(self, block: int, what: str, value: Tensor) -> None:
        """Keep what was chosen, when somebody looks."""
        if self.trace is not None:
            self.trace[f"block{block}.{what}"] = value.detach()
