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

#: Blocks, from 0, of the originals: the ends of three groups of a transformer of twelve.
DEFAULT_LAYERS = (3, 6, 9)


def reduction_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The blocks that reduce.

    Args:
        layers: block numbers from 0, ascending; None or empty for those of `DEFAULT_LAYERS` that there are.
        depth: number of blocks.

    Raises:
        UsageError: numbers that are not of this transformer, not ascending, or none that there is.
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
    """Where tokens are reduced and how much of them is kept.

    Methods count in one of two ways, as in the code of CLCA. Relative: each stage keeps a share of the tokens that it
    finds, whatever they are: TopK, EViT. Absolute: the number after each stage follows from the number of patches: all
    others.

    Attributes:
        layers: blocks that reduce, ascending.
        keep_rates: share that each of them keeps, in (0, 1]; at 1 a stage does nothing.
        depth: number of blocks.
        width: D.
        tokens: N, number of patches.
        reference_compat: reproduce what we hold to be faults of the original; each method says which.
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
        """Check settings as a user gives them.

        Args:
            keep_rate: one for all stages, or one each.
            layers: see `reduction_layers`.
            depth: number of blocks.
            width: D.
            tokens: number of patches.
            reference_compat: see the class.

        Raises:
            UsageError: a rate outside (0, 1], not as many rates as layers, or layers that there are not.
        """
        chosen = reduction_layers(layers, depth)
        given = list(keep_rate) if isinstance(keep_rate, Sequence) else [keep_rate]
        rates = given * len(chosen) if len(given) == 1 else given
        if len(rates) != len(chosen):
            raise UsageError(
                f"keep_rate is one number or one for each of the {len(chosen)} layers {list(chosen)}, "
                f"and {len(given)} are given"
            )
        for rate in rates:
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
                raise UsageError(f"keep_rate is a share of tokens above 0 and at most 1, not {rate!r}")
        if tokens < 1:
            raise UsageError(f"there are no patches to reduce: {tokens}")
        return cls(chosen, tuple(float(rate) for rate in rates), depth, width, tokens, reference_compat)

    @property
    def stages(self) -> dict[int, int]:
        """Block -> number of its stage, for the stages that do something."""
        return {layer: j for j, (layer, rate) in enumerate(zip(self.layers, self.keep_rates, strict=True)) if rate < 1}

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the patches that is left after each stage.

        The original takes the stage's own rate to the power of stages so far, which is the same for equal rates.
        """
        rates = self.keep_rates
        if self.reference_compat or len(set(rates)) == 1:
            return tuple(rate ** (j + 1) for j, rate in enumerate(rates))
        return tuple(math.prod(rates[: j + 1]) for j in range(len(rates)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens after each stage of an absolute plan: `floor(N * share)`, at least 1; the original plans 0 as well."""
        if self.reference_compat:
            return tuple(int(share * self.tokens) for share in self.shares)
        return tuple(max(1, math.floor(round(share * self.tokens, 6))) for share in self.shares)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Tokens that each stage of an absolute plan takes away."""
        before = (self.tokens, *self.counts)
        return tuple(earlier - later for earlier, later in zip(before, self.counts, strict=False))

    def kept(self, stage: int, count: int) -> int:
        """How many of `count` tokens a stage of a relative plan keeps: `ceil(rate * count)`, at least 1."""
        product = self.keep_rates[stage] * count
        # 0.55 * 100 is a little above 55
        return max(1, math.ceil(product if self.reference_compat else round(product, 6)))


class Reduction(Plugin):
    """A plug-in that reduces tokens by a plan.

    Prefix tokens (class token, registers, prompts) are never reduced. All others are: those of a cache like patches,
    except where a method says otherwise.

    Attributes:
        plan: where and how much.
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
    """Rows (B, K) of values (B, T) or (B, T, D)."""
    if values.dim() == 3:
        rows = rows[:, :, None].expand(-1, -1, values.shape[-1])
    return values.gather(1, rows)


def keep_rows(tokens: Tokens, rows: Tensor) -> None:
    """Leave only some tokens, in a new order: prefix tokens stay in front, the rest form neither grid nor extra.

    Args:
        tokens: changed in place.
        rows: which, (B, K), counted behind the prefix.
    """
    prefix = tokens.prefix

    def kept(values: Tensor) -> Tensor:
        return torch.cat([values[:, :prefix], take(values[:, prefix:], rows)], dim=1)

    tokens.x = kept(tokens.x)
    tokens.size = None if tokens.size is None else kept(tokens.size)
    tokens.real = None if tokens.real is None else kept(tokens.real)
    tokens.policy = None if tokens.policy is None else kept(tokens.policy)
    tokens.grid, tokens.extra = None, 0


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights with deviation 0.02 and zero biases for all linear layers inside, as in timm's ViT."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
