"""The cross-layer cache (CLC) of CLCA: what token reductions drop comes back as a few tokens.

Reductions are in `pruning` and `merging`, the head that goes with the cache in `models.cla`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.reductions.base import reduction_layers
from animesion_training.tokens.state import Tokens

_CACHED, _BEHIND = "clc.cached", "clc.behind"


class CrossLayerCache(Plugin):
    """Cross-layer registers, a cache of pooled tokens and their recovery (CLCA, arXiv 2501.00243).

    Learned registers (CLR) stand behind the patches. After each block, the mean of the patches (GAP) and the registers
    are cached. After the blocks that reduce, and after the last block but one, everything cached so far is put behind
    the tokens, by block and then GAP before CLR. Nothing is cached after the last recovery.

    GAP is of all tokens between the prefix and what the last recovery put behind them; before the first recovery the
    registers are left out. CLR is of the last tokens, which after a recovery are the registers that were cached last.

    With padding (ATS) the mean is of the real tokens. The original counts padding too: `reference_compat` does so.

    Args:
        width: D.
        depth: number of blocks.
        layers: blocks that reduce, the reduction's own; None for 3, 6 and 9, also where nothing is reduced.
        num_clr: number of registers.
        include_gap: cache the mean.
        recover_at_last: also recover after block `depth - 2`.
        pool_cls: the class token counts in the mean.
        pool_clr: before the first recovery the registers count in the mean.
        positions: the registers have learned positions of their own, as they must where the class token has one.
        reference_compat: see above.

    Raises:
        UsageError: nothing to cache, fewer than no registers, a switch that is none, or layers that there are not.
    """

    clr: nn.Parameter | None
    positions: nn.Parameter | None

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        layers: Sequence[int] | None = None,
        num_clr: int = 1,
        include_gap: bool = True,
        recover_at_last: bool = True,
        pool_cls: bool = False,
        pool_clr: bool = False,
        positions: bool = True,
        reference_compat: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(num_clr, bool) or not isinstance(num_clr, int) or num_clr < 0:
            raise UsageError(f"num_clr of cache clc is a number from 0, not {num_clr!r}")
        switches = {"include_gap": include_gap, "recover_at_last": recover_at_last, "pool_cls": pool_cls}
        for name, value in (switches | {"pool_clr": pool_clr}).items():
            if not isinstance(value, bool):
                raise UsageError(f"{name} of cache clc is true or false, not {value!r}")
        if not num_clr and not include_gap:
            raise UsageError("cache clc has nothing to cache: give num_clr or include_gap")
        recovery = set(reduction_layers(layers, depth))
        if recover_at_last and depth >= 2:
            recovery.add(depth - 2)
        self.recovery = frozenset(recovery)
        self.num_clr, self.include_gap = num_clr, include_gap
        self.pool_cls, self.pool_clr = pool_cls, pool_clr
        self.reference_compat = reference_compat
        self.clr = nn.Parameter(torch.zeros(1, num_clr, width)) if num_clr else None
        self.positions = nn.Parameter(torch.randn(1, num_clr, width) * 0.02) if num_clr and positions else None

    def copy_class_token(self, class_token: Tensor) -> None:
        """Start the registers where the class token (1, 1, D) is; call it once the backbone's weights are read."""
        if self.clr is not None:
            with torch.no_grad():
                self.clr.copy_(class_token.expand_as(self.clr))

    def appended(self) -> Tensor | None:
        """The registers, (1, num_clr, D)."""
        if self.clr is None or self.positions is None:
            return self.clr
        return self.clr + self.positions

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        tokens.scratch[_CACHED] = []
        tokens.scratch[_BEHIND] = 0 if self.pool_clr else self.num_clr

    def after(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.after`."""
        cached: list[Tensor] = tokens.scratch[_CACHED]
        if block in self.recovery:
            tokens.scratch[_BEHIND] = 0
            if cached:
                recovered = torch.cat(cached, dim=1)
                tokens.append(recovered)
                tokens.scratch[_BEHIND] = recovered.shape[1]
                cached.clear()
        if block < max(self.recovery):
            if self.include_gap:
                cached.append(self._pooled(tokens))
            if self.num_clr:
                cached.append(tokens.x[:, -self.num_clr :])

    def _pooled(self, tokens: Tokens) -> Tensor:
        """Mean of tokens, (B, 1, D)."""
        end = tokens.x.shape[1] - tokens.scratch[_BEHIND]

        def pool(values: Tensor) -> Tensor:
            body = values[:, tokens.prefix : end]
            return torch.cat([values[:, :1], body], dim=1) if self.pool_cls else body

        pooled = pool(tokens.x)
        if tokens.real is None or self.reference_compat:
            return pooled.mean(dim=1, keepdim=True)
        real = pool(tokens.real)[:, :, None].to(pooled.dtype)
        return (pooled * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)

    def no_weight_decay(self) -> set[str]:
        """Registers and their positions."""
        return {name for name, _ in self.named_parameters()}
