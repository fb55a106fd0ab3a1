"""Inter-layer adapters: modules between blocks that also shrink the grid of patches (ILA, ILA+, ILA++).

Rios et al., "Down-Sampling Inter-Layer Adapter for Parameter and Computation Efficient Ultra-Fine-Grained Image
Recognition", ECCV Workshops 2024 (arXiv 2409.11051). ILA++ is `ILA` with the bottleneck adapters of
`in_block`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers._fx import register_notrace_module
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.options import in_range, one_of, whole_number
from animesion_training.tokens.adapters.base import as_map, as_tokens, grid_of, init_xavier, split_tokens
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens

Norm = Literal["bn", "ln", "none"]
Residual = Literal["near-ones", "ones", "xavier", "conv", "avg-pool", "identity", "none"]

_NORMS = ("bn", "ln", "none")
_RESIDUALS = ("near-ones", "ones", "xavier", "conv", "avg-pool", "identity", "none")
#: Standard deviation of the near-one weights.
_NEAR = 0.001


@torch.fx.wrap
def _check_values(hidden: Tensor) -> None:
    """Raise `UsageError` if tokens (B, T, d) have one value per channel, which has no batch statistics."""
    if hidden.shape[0] * hidden.shape[1] == 1:
        raise UsageError("adapter ila normalises over the batch and cannot train on one image with one patch left")


@register_notrace_module
class BatchNormOfTokens(nn.BatchNorm1d):
    """Batch norm of channels over all tokens of the batch, (B, T, d) to (B, T, d)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return super().forward(x.flatten(0, 1)).view_as(x)


class InterLayerAdapter(nn.Module):
    """One adapter: a bottleneck with a convolution over the grid (SDS), added to a residual path (RSDS).

    SDS: `Linear(D, d)`, norm, GELU; for patches a depthwise `k x k` convolution, norm, GELU and a pointwise
    convolution, for all other tokens a separate pointwise convolution; norm, GELU, `Linear(d, D)`, dropout.

    RSDS: the identity for class token and others, and the module that `residual` names for patches. `near-ones`, the
    paper's choice, is a depthwise convolution without bias whose weights start near one. It sums over its window, so
    patches grow about k^2 times; the norms of the following blocks undo that.

    Without padding a side g becomes `g - dilation * (k - 1)`.

    Args:
        width: D.
        dim: d.
        kernel: k; odd where there is padding.
        dilation: dilation of the convolutions over the grid.
        multiplier: outputs per channel of the depthwise convolution of SDS.
        norms: the norms of SDS, in order: `bn`, `ln` (over channels) or `none`. The original has `bn` in all places;
            the journal extension of the paper writes LN for the first and the last.
        residual: `near-ones`, `ones` and `xavier` are initial values of the depthwise convolution, `conv` mixes
            channels, `avg-pool` has no parameters, `identity` needs padding, `none` leaves out RSDS.
        padding: keep the grid's size.
        class_conv: use a separate pointwise convolution for tokens that are not patches; without it each of them passes
            alone through the convolutions of the patches, which must be padded.
        dropout: dropout rate of the output of SDS.
        drop_path: rate of stochastic depth of SDS, in place of the dropout.

    Shape:
        (B, T, D) to (B, T', D).

    Raises:
        UsageError: invalid values, alone or together.
    """

    cls: nn.Linear | None
    residual_conv: nn.Conv2d | None

    def __init__(
        self,
        width: int,
        *,
        dim: int = 8,
        kernel: int = 3,
        dilation: int = 1,
        multiplier: int = 1,
        norms: Sequence[Norm] = ("bn", "bn", "bn"),
        residual: Residual = "near-ones",
        padding: bool = False,
        class_conv: bool = True,
        dropout: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        whole_number("dim", dim)
        reach = whole_number("dilation", dilation) * (whole_number("kernel", kernel) - 1)
        inner = whole_number("multiplier", multiplier) * dim
        _check(norms, residual, padding, class_conv, kernel, dilation)
        self.reach = 0 if padding else reach  # rows and columns that the grid loses
        self.kind = residual
        self.kernel = kernel
        pad = reach // 2 if padding else 0
        self.pad = pad
        self.down = nn.Linear(width, dim)
        self.norm1 = _norm(norms[0], dim)
        self.conv = nn.Conv2d(dim, inner, kernel, padding=pad, dilation=dilation, groups=dim)
        self.norm2 = _norm(norms[1], inner)
        self.point = nn.Linear(inner, dim)  # a pointwise convolution, on tokens
        self.cls = nn.Linear(dim, dim) if class_conv else None
        self.norm3 = _norm(norms[2], dim)
        self.act = nn.GELU()
        self.up = nn.Linear(dim, width)
        drop: Any = DropPath(drop_path) if drop_path else nn.Dropout(dropout)
        self.drop = drop
        learned = residual in ("near-ones", "ones", "xavier", "conv")
        self.residual_conv = (
            nn.Conv2d(
                width,
                width,
                kernel,
                padding=pad,
                dilation=dilation,
                groups=1 if residual == "conv" else width,
                bias=False,
            )
            if learned
            else None
        )
        init_xavier(self)
        if self.residual_conv is not None and residual in ("near-ones", "ones"):
            nn.init.normal_(self.residual_conv.weight, 1.0, _NEAR if residual == "near-ones" else 0.0)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return all tokens after the module.

        Args:
            x: (B, T, D).
            tokens: the layout of x: which rows are patches, and their grid; not changed.

        Raises:
            UsageError: patches that form no grid, or a grid smaller than the kernel; a batch too small for batch norm
                in training.
        """
        grid = grid_of(tokens, "ila")
        self.output_grid(grid)
        hidden = self.act(self.norm1(self.down(x)))
        prefix, patches, extra = split_tokens(hidden, tokens)
        convolved = self._over_grid(as_map(patches, grid))
        hidden = torch.cat([self._pointwise(prefix), convolved, self._pointwise(extra)], dim=1)
        out: Tensor = self.drop(self.up(self.act(self.norm3(hidden))))
        return out if self.kind == "none" else out + self._residual(x, tokens, grid)

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid (rows, columns) after the module, from the one before.

        Raises:
            UsageError: nothing would be left of it.
        """
        if min(grid) <= self.reach:
            raise UsageError(
                f"adapter ila shrinks each side of the grid by {self.reach}, and only {grid[0]}x{grid[1]} patches are "
                "left: give fewer locations, a smaller kernel or larger images"
            )
        return grid[0] - self.reach, grid[1] - self.reach

    def _over_grid(self, features: Tensor) -> Tensor:
        """SDS between the first and the last norm, (B, d, h, w) to (B, h' w', d)."""
        hidden: Any = as_tokens(self.conv(features))  # (B, h' w', d * multiplier)
        if self.training and isinstance(self.norm2, nn.BatchNorm1d):
            _check_values(hidden)
        out: Tensor = self.point(self.act(self.norm2(hidden)))
        return out

    def _pointwise(self, hidden: Tensor) -> Tensor:
        """The same part of SDS for tokens (B, n, d) that are not patches, each separately."""
        if self.cls is not None:
            out: Tensor = self.cls(hidden)
            return out
        if not hidden.shape[1]:
            return hidden
        maps = hidden.flatten(0, 1)[:, :, None, None]  # (B n, d, 1, 1): maps of one pixel
        return self._over_grid(maps).view_as(hidden)

    def _residual(self, x: Tensor, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
        if self.kind == "identity":
            return x
        prefix, patches, extra = split_tokens(x, tokens)
        features = as_map(patches, grid)
        if self.residual_conv is not None:
            features = self.residual_conv(features)
        else:
            features = functional.avg_pool2d(features, self.kernel, stride=1, padding=self.pad)
        return torch.cat([prefix, as_tokens(features), extra], dim=1)


def _check(norms: Sequence[str], residual: str, padding: bool, class_conv: bool, kernel: int, dilation: int) -> None:
    one_of("residual of adapter ila", residual, _RESIDUALS)
    if isinstance(norms, str) or len(norms) != 3:
        raise UsageError(f"norms of adapter ila are three, of {', '.join(_NORMS)}, not {norms!r}")
    for norm in norms:
        one_of("norms of adapter ila", norm, _NORMS)
    if not padding and not class_conv:
        raise UsageError("adapter ila without class_conv convolves single tokens: set padding")
    if not padding and residual == "identity":
        raise UsageError("adapter ila shrinks the grid, so it has no residual identity: set padding")
    if padding and kernel % 2 == 0:
        raise UsageError(f"adapter ila keeps the grid only with an odd kernel, not {kernel}")
    if residual == "avg-pool" and dilation > 1:
        raise UsageError("residual avg-pool of adapter ila has no dilation: choose another residual")


def _norm(kind: str, width: int) -> nn.Module:
    return {"bn": BatchNormOfTokens, "ln": nn.LayerNorm}[kind](width) if kind != "none" else nn.Identity()


class ILA(Plugin):
    """Inter-layer adapters after some blocks.

    Trained with a frozen backbone: the adapters and the class token.

    Trace: `ila_ds{j}.out` and `ila{j}.out`, (B, T', D), the output of the j-th module of `locations` and of `padded`.

    Args:
        width: D.
        depth: number of blocks.
        grid: (rows, columns) of patches.
        locations: blocks, from 0, after which a module shrinks the grid; None for the ends of the first two thirds,
            which are 3 and 7 of 12.
        padded: blocks after which a module keeps the grid, with padding and the residual `identity`; None for all that
            are not in `locations` (ILA+).
        **options: arguments of all modules, see `InterLayerAdapter`; padding and residual are those of `locations`.

    Raises:
        UsageError: blocks that do not exist or are given twice, a grid that would shrink to nothing, or an invalid
            value; in the forward pass, patches that form no grid, or tokens that represent several patches.
    """

    also_trains = frozenset({"cls_token"})

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        grid: tuple[int, int],
        locations: Sequence[int] | None = None,
        padded: Sequence[int] | None = (),
        dim: int = 8,
        kernel: int = 3,
        dilation: int = 1,
        multiplier: int = 1,
        norms: Sequence[Norm] = ("bn", "bn", "bn"),
        residual: Residual = "near-ones",
        padding: bool = False,
        class_conv: bool = True,
        dropout: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        in_range("dropout", dropout, low=0.0, high=1.0, high_open=True)
        in_range("drop_path", drop_path, low=0.0, high=1.0, high_open=True)
        if locations is None:
            locations = _thirds(depth)
        if padded is None:
            padded = [block for block in range(depth) if block not in locations]
        self.locations = _blocks("locations", locations, depth)
        self.padded = _blocks("padded", padded, depth)
        if both := sorted({*self.locations} & {*self.padded}):
            raise UsageError(
                f"adapter ila has at most one module after a block: blocks {both} are in locations and in padded"
            )
        common: dict[str, Any] = {
            "dim": dim,
            "kernel": kernel,
            "dilation": dilation,
            "multiplier": multiplier,
            "norms": tuple(norms),
            "class_conv": class_conv,
            "dropout": dropout,
            "drop_path": drop_path,
        }
        self.down_sampling = nn.ModuleList(
            InterLayerAdapter(width, residual=residual, padding=padding, **common) for _ in self.locations
        )
        self.keeping = nn.ModuleList(
            InterLayerAdapter(width, residual="identity", padding=True, **common) for _ in self.padded
        )
        for module in self.down_sampling:  # raises if nothing of the grid is left
            grid = module.output_grid(grid)  # type: ignore[operator]

    def after(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.after`."""
        if block in self.locations:
            j = self.locations.index(block)
            module: Any = self.down_sampling[j]
            name = f"ila_ds{j}.out"
        elif block in self.padded:
            j = self.padded.index(block)
            module = self.keeping[j]
            name = f"ila{j}.out"
        else:
            return
        if tokens.size is not None or tokens.real is not None or tokens.policy is not None:
            raise UsageError(
                "adapter ila needs tokens that are one patch each: leave out the token reduction before it"
            )
        old = grid_of(tokens, "ila")
        tokens.x = module(tokens.x, tokens)  # reads the old grid
        tokens.grid = new = module.output_grid(old)
        if tokens.maps is not None and new != old:
            tokens.maps.shrink(old, new, tokens.extra)
        if tokens.trace is not None:
            tokens.trace[name] = tokens.x.detach()


def _thirds(depth: int) -> tuple[int, ...]:
    """The last blocks of the first two thirds."""
    if depth < 3:
        raise UsageError(f"a transformer of {depth} blocks has no three groups: give locations of adapter ila")
    return depth // 3 - 1, 2 * depth // 3 - 1


def _blocks(option: str, blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the value of an option that is a list of blocks, after a check."""
    chosen = tuple(blocks)
    integers = all(isinstance(block, int) and not isinstance(block, bool) for block in chosen)
    ascending = integers and list(chosen) == sorted(set(chosen))
    if not ascending or (chosen and not 0 <= chosen[0] <= chosen[-1] < depth):
        raise UsageError(
            f"{option} of adapter ila are ascending numbers of blocks from 0 to {depth - 1}, not {blocks!r}"
        )
    return chosen
