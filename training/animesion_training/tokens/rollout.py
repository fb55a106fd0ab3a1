"""Attention rollout and attention distance, and the plug-in that records the weights that they need.

The functions are pure functions of recorded tensors. Rollout of whole networks, with methods that move tokens, is in
`token_flow`, crops by rollout in `twopass.rams_trans`, drawing in `animesion_training.analysis`.
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

_RECORDED = "rollout.weights"


def attention_weights(attended: Attended) -> Tensor:
    """The weights of an attention, (B, heads, Tq, Tk), float32; reading them here leaves the fused attention in use."""
    if attended.has_weights:
        return attended.weights.float()
    # not the property, which would cache weights without a gradient for other plug-ins
    scores = attended.scores()
    return (attended.mixing(scores) if attended.mixing else scores.softmax(dim=-1)).float()


class AttentionRecorder(Plugin):
    """Records the attention weights of all blocks while it is switched on; the output of the network does not change.

    Blocks are open only then, and attention stays fused: the weights are computed in addition to it, without a
    gradient. They take `B * heads * T^2` numbers per block. Add it after all other plug-ins, so that it records
    their changes.

    Args:
        depth: number of blocks.
        average: record the mean over heads, (B, T, T) per block, instead of the weights of each head, (B, heads, T, T).
    """

    def __init__(self, depth: int, *, average: bool = False) -> None:
        super().__init__()
        self.average = average
        self._blocks = frozenset(range(depth))
        self._weights: list[Tensor] = []

    @contextmanager
    def recording(self) -> Iterator[AttentionRecorder]:
        """Record every forward pass until the end of the `with` block; each pass replaces the last one."""
        self.opens = self._blocks
        try:
            yield self
        finally:
            self.opens = frozenset()

    def pop_weights(self) -> list[Tensor]:
        """Return the weights of the last pass, first block first, float32, and remove them from the recorder."""
        weights, self._weights = self._weights, []
        return weights

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        if self.opens:
            tokens.scratch[_RECORDED] = []

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.between`."""
        with torch.no_grad():
            weights = attention_weights(attended)
            tokens.scratch[_RECORDED].append(weights.mean(1) if self.average else weights)

    def finish(self, tokens: Tokens) -> None:
        """See `Plugin.finish`."""
        if self.opens:
            self._weights = tokens.scratch.pop(_RECORDED)


@contextmanager
def record_attention(model: TokenVisionTransformer, *, average: bool = False) -> Iterator[AttentionRecorder]:
    """Record attention in a `with` block: run the network, then call `pop_weights` of the recorder.

    Args:
        model: the network; the recorder is one of its plug-ins until the end of the `with` block.
        average: see `AttentionRecorder`.
    """
    recorder = AttentionRecorder(len(model.backbone.blocks), average=average)
    name = "attention_recorder"
    model.plugins[name] = recorder
    try:
        with recorder.recording():
            yield recorder
    finally:
        del model.plugins[name]


def rollout(weights: Tensor | Sequence[Tensor]) -> Tensor:
    """Attention rollout: the contribution of each input token to each output token, through all blocks.

    `A_L ... A_2 A_1` with `A_i` the mean over heads of the weights of block i, plus the identity for the residual
    connection, normalised to rows that sum to one (Abnar and Zuidema, ACL 2020, arXiv 2005.00928). Costs O(L T^3).

    Args:
        weights: (L, B, heads, T, T), first block first; or a sequence of L tensors (B, heads, T, T), or (B, T, T) if
            averaged over heads.

    Returns:
        (B, T, T), float32 at least; row i has the shares of all input tokens in output token i, and sums to one.

    Raises:
        UsageError: no blocks, or a number of tokens that changes between blocks.
    """
    product, *others = _steps(weights)
    for step in others:
        product = step @ product
    return product


def class_rollout(weights: Tensor | Sequence[Tensor]) -> Tensor:
    """Row 0 of `rollout`, the map of the class token, at the cost of O(L T^2).

    Args:
        weights: see `rollout`.

    Returns:
        (B, T), float32 at least; sums to one.

    Raises:
        UsageError: see `rollout`.
    """
    *others, last = _steps(weights)
    row = last[:, :1]  # (B, 1, T); multiplied from the last block back, no product of matrices is needed
    for step in reversed(others):
        row = row @ step
    return row[:, 0]


def _steps(weights: Iterable[Tensor]) -> list[Tensor]:
    """The factors `A_i` of `rollout`, (B, T, T) each, first block first."""
    steps: list[Tensor] = []
    for of_block in weights:
        mean = of_block.to(torch.promote_types(of_block.dtype, torch.float32))
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
        raise UsageError("attention rollout needs the attention of at least one block")
    return steps


def attention_distance(
    weights: Tensor | Sequence[Tensor], grid: tuple[int, int], patch: int | tuple[int, int]
) -> Tensor:
    """Mean attention distance per head: distances between patch centers, weighted by attention.

    Dosovitskiy et al., ICLR 2021, figure 7. The mean is over patches as queries and over the batch. Prefix tokens are
    neither queries nor keys: the weights of patches are normalised per query, so attention to the class token does not
    lower the distance.

    Args:
        weights: (L, B, heads, T, T), or a sequence of L tensors (B, heads, T, T); the last rows * columns tokens are
            the patches.
        grid: (rows, columns) of patches.
        patch: side of a patch in pixels, or (height, width).

    Returns:
        (L, heads), in pixels, float32 at least.

    Raises:
        UsageError: fewer tokens than the grid has patches.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    count = grid[0] * grid[1]
    distances: list[Tensor] = []
    for block, of_block in enumerate(weights):
        if min(of_block.shape[-2:]) < count:
            raise UsageError(
                f"a grid of {grid[0]}x{grid[1]} has {count} patches, and block {block} attends from "
                f"{of_block.shape[-2]} to {of_block.shape[-1]} tokens: leave out methods that drop them"
            )
        inner = of_block[..., -count:, -count:].to(torch.promote_types(of_block.dtype, torch.float32))
        down = height * torch.arange(grid[0], device=inner.device, dtype=inner.dtype)
        right = width * torch.arange(grid[1], device=inner.device, dtype=inner.dtype)
        centers = torch.cartesian_prod(down, right).reshape(count, 2)  # up to a shift common to all
        between = (centers[:, None] - centers).square().sum(-1).sqrt()  # (N, N)
        shares = inner / inner.sum(-1, keepdim=True).clamp_min(torch.finfo(inner.dtype).tiny)  # (B, heads, N, N)
        distances.append((shares * between).sum(-1).mean((0, 2)))
    return torch.stack(distances)
