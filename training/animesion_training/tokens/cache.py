"""The cross-layer cache (CLC) of CLCA: it restores information that token reductions drop, as a few pooled tokens.

Reductions are in `reductions`, the head that CLCA combines with the cache is in `models.cla`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.options import whole_number
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.reductions.base import reduction_layers
from animesion_training.tokens.state import Tokens

_CACHED, _EXCLUDED = "clc.cached", "clc.excluded"


class CrossLayerCache(Plugin):
    """Cross-layer registers, a cache of pooled tokens, and their recovery (CLCA, arXiv 2501.00243).

    Learned registers (CLR) follow the patches. After each block, the mean of the patches (GAP) and the registers are
    cached. After the blocks that reduce, and after the second to last block, all cached tokens are appended to the
    tokens, in the order of blocks, GAP before CLR. Nothing is cached after the last recovery.

    GAP is the mean of the tokens between the prefix and those that the last recovery appended; before the first
    recovery it leaves out the registers. CLR is the last tokens, which after a recovery are the registers cached last.

    With padding (ATS), the mean is over real tokens. The original includes padding; `reference_compat` does the same.

    Args:
        width: D.
        depth: number of blocks.
        layers: blocks that reduce, as in the reduction; None for 3, 6 and 9, also without a reduction.
        num_clr: number of registers.
        include_gap: cache the mean.
        recover_at_last: also recover after block `depth - 2`.
        pool_cls: include the class token in the mean.
        pool_clr: include the registers in the mean before the first recovery.
        positions: give the registers learned positions; use it where the class token has one.
        reference_compat: see above.

    Raises:
        UsageError: nothing to cache, an invalid value, or layers that do not exist.
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
        whole_number("num_clr of cache clc", num_clr, 0)
        switches = {"include_gap": include_gap, "recover_at_last": recover_at_last, "pool_cls": pool_cls}
        for name, value in (switches | {"pool_clr": pool_clr}).items():
            if not isinstance(value, bool):
                raise UsageError(f"{name} of cache clc is true or false, not {value!r}")
        if not num_clr and not include_gap:
            raise UsageError("cache clc has nothing to cache: set num_clr or include_gap")
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
        """Initialise the registers with the class token (1, 1, D); call it after loading the backbone's weights."""
        if self.clr is not None:
            with torch.no_grad():
                self.clr.copy_(class_token.expand_as(self.clr))

    def extra_tokens(self) -> Tensor | None:
        """The registers, (1, num_clr, D)."""
        if self.clr is None or self.positions is None:
            return self.clr
        return self.clr + self.positions

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        tokens.scratch[_CACHED] = []
        # number of tokens at the end that the mean leaves out
        tokens.scratch[_EXCLUDED] = 0 if self.pool_clr else self.num_clr

    def after(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.after`."""
        cached: list[Tensor] = tokens.scratch[_CACHED]
        if block in self.recovery:
            tokens.scratch[_EXCLUDED] = 0
            if cached:
                recovered = torch.cat(cached, dim=1)  # (B, cached tokens, D)
                tokens.append(recovered)
                tokens.scratch[_EXCLUDED] = recovered.shape[1]
                cached.clear()
        if block < max(self.recovery):
            if self.include_gap:
                cached.append(self._pool(tokens))
            if self.num_clr:
                cached.append(tokens.x[:, -self.num_clr :])

    def _pool(self, tokens: Tokens) -> Tensor:
        """The mean of the tokens to pool (GAP), (B, 1, D)."""
        end = tokens.x.shape[1] - tokens.scratch[_EXCLUDED]

        def select(values: Tensor) -> Tensor:
            body = values[:, tokens.prefix : end]
            return torch.cat([values[:, :1], body], dim=1) if self.pool_cls else body

        selected = select(tokens.x)
        if tokens.real is None or self.reference_compat:
            return selected.mean(dim=1, keepdim=True)
        real = select(tokens.real)[:, :, None].to(selected.dtype)
        return (selected * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)

    def no_weight_decay(self) -> set[str]:
        """Registers and their positions."""
        return {name for name, _ in self.named_parameters()}
