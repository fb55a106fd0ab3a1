"""Base of the token reductions: the plan of layers and keep rates, the plug-in that carries it, and the choice of rows.

Methods that drop tokens are in `pruning`, methods that merge them in `merging`, names and factory in `factory`. The
cross-layer cache that restores dropped information is in `tokens.cache`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens

#: Blocks that reduce in the originals, from 0, in a transformer of twelve blocks.
DEFAULT_LAYERS = (3, 6, 9)


def reduction_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the blocks that reduce, after a check.

    Args:
        layers: block numbers from 0, ascending; None or empty for those of `DEFAULT_LAYERS` that exist.
        depth: number of blocks.

    Raises:
        UsageError: numbers out of range or not ascending, or no default that exists.
    """
    if not layers:
        chosen = tuple(layer for layer in DEFAULT_LAYERS if layer < depth)
        if not chosen:
            raise UsageError(f"a transformer of {depth} blocks has none of {DEFAULT_LAYERS}: give reduction_layers")
        return chosen
    chosen = tuple(layers)
    integers = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in chosen)
    if not integers or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise UsageError(f"reduction_layers are ascending numbers of blocks from 0 to {depth - 1}, not {list(chosen)}")
    return chosen


@dataclass(frozen=True)
class ReductionPlan:
    """The blocks in which tokens are reduced, and the share that each of them keeps.

    Methods count in one of two ways, as in the code of CLCA. Relative (TopK, EViT): each stage keeps a share of the
    tokens that it receives. Absolute (all others): the number of tokens after each stage follows from the number of
    patches.

    Attributes:
        layers: blocks that reduce, ascending.
        keep_rates: share that each of them keeps, in (0, 1]; a stage with 1 does nothing.
        depth: number of blocks.
        width: D.
        tokens: N, number of patches.
        reference_compat: reproduce what we consider faults of the original, as documented in each method.
    """

    layers: tuple[int, ...]
    keep_rates: tuple[float, ...]
    depth: int
    width: int
    tokens: int
    reference_compat: bool = False

    @classmethod
    def of(
        cls,
        keep_rate: float | Sequence[float],
        layers: Sequence[int] | None,
        *,
        depth: int,
        width: int,
        tokens: int,
        reference_compat: bool = False,
    ) -> ReductionPlan:
        """Make a plan from the settings of a user.

        Args:
            keep_rate: one for all stages, or one per stage.
            layers: see `reduction_layers`.
            depth: number of blocks.
            width: D.
            tokens: number of patches.
            reference_compat: see the class.

        Raises:
            UsageError: a rate outside (0, 1], a number of rates other than that of layers, or layers that do not exist.
        """
        chosen = reduction_layers(layers, depth)
        given = list(keep_rate) if isinstance(keep_rate, Sequence) else [keep_rate]
        rates = given * len(chosen) if len(given) == 1 else given
        if len(rates) != len(chosen):
            raise UsageError(
                f"keep_rate is one number or one for each of the {len(chosen)} layers {list(chosen)}, "
                f"got {len(given)} numbers"
            )
        for rate in rates:
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
                raise UsageError(f"keep_rate must be a share of tokens above 0 and at most 1, not {rate!r}")
        if tokens < 1:
            raise UsageError(f"there are no patches to reduce: {tokens}")
        return cls(chosen, tuple(float(rate) for rate in rates), depth, width, tokens, reference_compat)

    @property
    def stages(self) -> dict[int, int]:
        """Block -> index of its stage, for the stages that reduce."""
        return {layer: j for j, (layer, rate) in enumerate(zip(self.layers, self.keep_rates, strict=True)) if rate < 1}

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the patches left after each stage.

        The product of the rates so far. The original raises the rate of the stage to the power of the number of stages
        so far, which is the same for equal rates.
        """
        rates = self.keep_rates
        if self.reference_compat or len(set(rates)) == 1:
            return tuple(rate ** (j + 1) for j, rate in enumerate(rates))
        return tuple(math.prod(rates[: j + 1]) for j in range(len(rates)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of tokens after each stage of an absolute plan: `floor(N * share)`, at least 1.

        The original can plan 0.
        """
        if self.reference_compat:
            return tuple(int(share * self.tokens) for share in self.shares)
        # rounded first, because a product such as 0.7 ** 2 * 100 is a little below its exact value, a whole number
        return tuple(max(1, math.floor(round(share * self.tokens, 6))) for share in self.shares)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Number of tokens that each stage of an absolute plan removes."""
        before = (self.tokens, *self.counts)
        return tuple(earlier - later for earlier, later in zip(before, self.counts, strict=False))

    def kept(self, stage: int, count: int) -> int:
        """Number of tokens that a stage of a relative plan keeps of `count`: `ceil(rate * count)`, at least 1."""
        product = self.keep_rates[stage] * count
        # rounded first, because 0.55 * 100 is a little above 55
        return max(1, math.ceil(product if self.reference_compat else round(product, 6)))


class Reduction(Plugin):
    """A plug-in that reduces tokens by a plan.

    Prefix tokens (class token, registers, prompts) are never reduced. All others are. Tokens of a cache are treated
    like patches, unless a method documents otherwise.

    Attributes:
        plan: blocks and keep rates.
    """

    keeps_grid = False

    def __init__(self, plan: ReductionPlan) -> None:
        super().__init__()
        self.plan = plan
        self.stages = plan.stages
        self.keeps_grid = not self.stages

    def extra_repr(self) -> str:
        """Layers and rates, for print(model)."""
        return f"layers={self.plan.layers}, keep_rates={self.plan.keep_rates}"


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Gather rows (B, K) of values (B, T) or (B, T, D)."""
    if values.dim() == 3:
        rows = rows[:, :, None].expand(-1, -1, values.shape[-1])
    return values.gather(1, rows)


def keep_rows(tokens: Tokens, rows: Tensor) -> None:
    """Keep the prefix and some of the other tokens, in a new order; they form no grid, and none of them is extra.

    Args:
        tokens: modified in place.
        rows: (B, K), indices of the tokens to keep, counted from the end of the prefix.
    """
    prefix = tokens.prefix
    if tokens.maps is not None:
        tokens.maps.keep_rows(rows, tokens.x.shape[1] - prefix)

    def kept(values: Tensor) -> Tensor:
        return torch.cat([values[:, :prefix], take(values[:, prefix:], rows)], dim=1)

    tokens.x = kept(tokens.x)
    tokens.size = None if tokens.size is None else kept(tokens.size)
    tokens.real = None if tokens.real is None else kept(tokens.real)
    tokens.policy = None if tokens.policy is None else kept(tokens.policy)
    tokens.grid, tokens.extra = None, 0


def init_linear(module: nn.Module) -> None:
    """Initialise all linear layers of a module as timm's ViT does: truncated normal (std 0.02), zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
