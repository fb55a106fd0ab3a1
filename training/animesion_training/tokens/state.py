"""The state that flows through the blocks of a vision transformer: tokens, and the values that methods record."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from animesion_training.tokens.autocast import working_dtype
from animesion_training.tokens.patch_maps import PatchMaps


@dataclass(eq=False)
class Tokens:
    """The tokens of a batch on their way through the blocks. Plug-ins change them in place.

    The order of tokens is: prefix (class token first), patches or the tokens they were reduced to, extra.

    Attributes:
        x: (B, T, D).
        prefix: number of tokens in front of the patches: class token, registers, prompts.
        grid: (rows, columns) of the patch tokens while they form a grid, else None.
        extra: number of tokens after the patches: cross-layer registers and tokens that a cache restored.
        size: number of patches that each token represents, (B, T), None for one each; attention weighs keys by it.
        real: (B, T) bool, False for padding; None where there is no padding.
        policy: DynamicViT's decisions in training, (B, T), 1 for kept and 0 for dropped; None where all are kept.
        gathered: class tokens (B, D) after the blocks in `TokenVisionTransformer.gathers`, in order.
        losses: additional terms of the training loss by name; weighted scalars.
        targets: class ids (B,) or soft labels (B, num_classes) for such terms, None if the caller passed none.
        text: token ids of the tags of each image, (B, n) int64, None if the caller passed none.
        trace: choices of plug-ins by `block{i}.<name>`, and per block the class token (`cls`) and the number of tokens
            in and out (`tokens`); None when no trace is recorded.
        maps: the vectors of all patches; None where no feature maps were requested. A method that moves or drops
            tokens calls its `move` or `keep_rows`.
        scratch: values that a plug-in passes from one hook to a later one, under a name of its own. They are here and
            not in the plug-in, because an opened block runs twice where activations are recomputed.
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
    text: Tensor | None = None
    trace: dict[str, Tensor] | None = None
    maps: PatchMaps | None = None
    scratch: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Tokens:
        """A copy that plug-ins can change without changing this one; tensors, which they replace, are shared."""
        return replace(
            self,
            gathered=list(self.gathered),
            losses=dict(self.losses),
            trace=None if self.trace is None else dict(self.trace),
            maps=None if self.maps is None else self.maps.copy(),
            scratch={name: list(each) if isinstance(each, list) else each for name, each in self.scratch.items()},
        )

    def become(self, other: Tokens) -> None:
        """Take the values of another one."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    @property
    def class_token(self) -> Tensor:
        """The class token, (B, D)."""
        return self.x[:, 0]

    @property
    def patches(self) -> Tensor:
        """The tokens between prefix and extra, (B, N, D)."""
        return self.x[:, self.prefix : self.x.shape[1] - self.extra]

    def bias(self) -> Tensor | None:
        """The bias of attention scores, broadcast to (B, heads, T, T); None where there is none.

        It adds the log of sizes, and masks padding.
        """
        bias: Tensor | None = None
        if self.size is None and self.real is None:
            return None
        dtype = working_dtype(self.x)
        if self.size is not None:
            bias = self.size.log()[:, None, None, :].to(dtype)  # (B, 1, 1, T)
        if self.real is not None:
            # (B, 1, T, T): a query and a key see each other only where both are real
            both = self.real[:, None, :, None] & self.real[:, None, None, :]
            # the least finite value of this very type: float32's would be -inf in float16, and a row of -inf gives NaN
            mask = torch.zeros_like(both, dtype=dtype).masked_fill_(~both, torch.finfo(dtype).min)
            bias = mask if bias is None else bias + mask
        return bias

    def append(self, tokens: Tensor) -> None:
        """Append tokens (B, n, D) as `extra`: real, of size one, kept."""
        self.x = torch.cat([self.x, tokens], dim=1)
        self.extra += tokens.shape[1]
        shape = tokens.shape[:2]
        if self.size is not None:
            self.size = torch.cat([self.size, self.size.new_ones(shape)], dim=1)
        if self.real is not None:
            self.real = torch.cat([self.real, self.real.new_ones(shape)], dim=1)
        if self.policy is not None:
            self.policy = torch.cat([self.policy, self.policy.new_ones(shape)], dim=1)

    def record(self, block: int, name: str, value: Tensor) -> None:
        """Add a value to the trace, if one is recorded."""
        if self.trace is not None:
            self.trace[f"block{block}.{name}"] = value.detach()
