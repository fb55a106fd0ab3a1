"""Attention rollout and attention distance, and the plug-in that records the weights that they need.

The functions are pure functions of recorded tensors. Crops by rollout are in `twopass.rams_trans`, drawing is in
`animesion_training.analysis.explain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.tokens.attention import Attended
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens


class AttentionRecorder(Plugin):
    """Keeps the attention weights of all blocks, while it is switched on; the network computes what it always does.

    Blocks are opened only then, and attention stays fused: the weights are computed beside it, without a gradient.
    They take `B * heads * T^2` numbers a block. Put it behind all other plug-ins, so that it sees what they make.

    Args:
        depth: number of blocks.
        average: keep the mean over heads, (B, T, T) a block, rather than each head's weights, (B, heads, T, T).
    """

    def __init__(self, depth: int, *, average: bool = False) -> None:
        super().__init__()
        self.average = average
        self._blocks = frozenset(range(depth))
        self._weights: list[Tensor] = []

    @contextmanager
    def on(self) -> Iterator[AttentionRecorder]:
        """Record every pass until the end of the `with` block; each pass begins anew."""
        self.opens = self._blocks
        try:
            yield self
        finally:
            self.opens = frozenset()

    def taken(self) -> list[Tensor]:
        """The last pass's weights, first block first, float32; the recorder lets go of them."""
        weights, self._weights = self._weights, []
        return weights

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        if self.opens:
            self._weights = []

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.between`."""
        with torch.no_grad():
            if "weights" in vars(attended):
                weights = attended.weights
            else:  # not through the property, which would keep weights without a gradient for other plug-ins
                scores = attended.scores()
                weights = attended.mixing(scores) if attended.mixing else scores.softmax(dim=-1)
            self._weights.append(weights.float().mean(1) if self.average else weights.float())


@contextmanager
def recording(model: TokenVisionTransformer, *, average: bool = False) -> Iterator[AttentionRecorder]:
    """Record attention for a while: in the `with` block run the network, then ask the recorder for what was `taken`.

    Args:
        model: the network; it carries the recorder until the end of the `with` block.
        average: see `AttentionRecorder`.
    """
    recorder = AttentionRecorder(len(model.backbone.blocks), average=average)
    name = "attention_recorder"
    model.plugins[name] = recorder
    try:
        with recorder.on():
            yield recorder
    finally:
        del model.plugins[name]


def rollout(weights: Tensor | Sequence[Tensor]) -> Tensor:
    """How much each token of the input has a part in each token of the output, through all blocks.

    `A_L ... A_2 A_1` with `A_i` the mean over heads of block i's weights, plus the identity for the residual
    connection, with rows that sum to one (Abnar and Zuidema, ACL 2020, arXiv 2005.00928). Costs O(L T^3).

    Args:
        weights: (L, B, heads, T, T), first block first; or as many (B, heads, T, T), or (B, T, T) averaged over heads.

    Returns:
        (B, T, T), float32 at least; row i holds the shares of all input tokens in output token i, and sums to one.

    Raises:
        UsageError: no blocks, or tokens that are dropped, merged or added between them.
    """
    first, *others = _steps(weights)
    joint = first
    for step in others:
        joint = step @ joint
    return joint


def class_rollout(weights: Tensor | Sequence[Tensor]) -> Tensor:
    """Row 0 of `rollout`, which is all that a map for the class token needs; costs O(L T^2).

    Args:
        weights: as `rollout` takes them.

    Returns:
        (B, T), float32 at least; sums to one.

    Raises:
        UsageError: as `rollout`.
    """
    *others, last = _steps(weights)
    row = last[:, :1]
    for step in reversed(others):
        row = row @ step
    return row[:, 0]


def _steps(weights: Iterable[Tensor]) -> list[Tensor]:
    steps: list[Tensor] = []
    for each in weights:
        mean = each.to(torch.promote_types(each.dtype, torch.float32))
        mean = mean.mean(1) if mean.dim() == 4 else mean
        if mean.shape[-1] != mean.shape[-2] or (steps and mean.shape != steps[0].shape):
            before = steps[0].shape[-1] if steps else mean.shape[-1]
            raise UsageError(
                f"attention rollout multiplies the attention of all blocks, and block {len(steps)} attends from "
                f"{mean.shape[-2]} to {mean.shape[-1]} tokens after {before}: leave out methods that change their "
                "number between blocks"
            )
        with_residual = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        steps.append(with_residual / with_residual.sum(-1, keepdim=True))
    if not steps:
        raise UsageError("attention rollout needs the attention of one block at least")
    return steps


def attention_distance(
    weights: Tensor | Sequence[Tensor], grid: tuple[int, int], patch: int | tuple[int, int]
) -> Tensor:
    """How far each head looks: the distance between patch centers, weighted by attention (Dosovitskiy et al., fig. 7).

    The mean over patches as queries and over the batch. Prefix tokens are neither queries nor keys: of each query the
    weights of patches are scaled to sum one, so a head that looks at the class token as well does not seem nearer.

    Args:
        weights: (L, B, heads, T, T), or as many (B, heads, T, T); the last rows x columns tokens are the patches.
        grid: rows and columns of patches.
        patch: side in pixels, or (height, width).

    Returns:
        (L, heads), pixels, float32 at least.

    Raises:
        UsageError: fewer tokens than the grid has patches.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    count = grid[0] * grid[1]
    distances: list[Tensor] = []
    for block, each in enumerate(weights):
        if min(each.shape[-2:]) < count:
            raise UsageError(
                f"a grid of {grid[0]}x{grid[1]} has {count} patches, and block {block} attends from {each.shape[-2]} "
                f"to {each.shape[-1]} tokens: methods that drop patches leave no distances between them"
            )
        inner = each[..., -count:, -count:].to(torch.promote_types(each.dtype, torch.float32))
        down = height * torch.arange(grid[0], device=inner.device, dtype=inner.dtype)
        right = width * torch.arange(grid[1], device=inner.device, dtype=inner.dtype)
        centers = torch.cartesian_prod(down, right).reshape(count, 2)
        apart = (centers[:, None] - centers).square().sum(-1).sqrt()
        shares = inner / inner.sum(-1, keepdim=True).clamp_min(torch.finfo(inner.dtype).tiny)
        distances.append((shares * apart).sum(-1).mean((0, 2)))
    return torch.stack(distances)
