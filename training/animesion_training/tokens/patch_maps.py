"""Feature maps of a transformer whose methods drop and merge patches: a vector for each patch after each block."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor

from animesion.errors import UsageError


class PatchMaps:
    """The vectors of all patches of a batch on their way through the blocks.

    A patch has the vector of the token that it is part of. One that was dropped keeps the vector that it had last.

    Args:
        patches: embedded patches (B, N, D), before the first block.
        grid: their rows and columns.
        blocks: blocks after which a map is kept.

    Attributes:
        kept: (B, N, D) by block.
    """

    def __init__(self, patches: Tensor, grid: tuple[int, int], blocks: Collection[int]) -> None:
        self.grid = grid
        self.kept: dict[int, Tensor] = {}
        self._blocks = frozenset(blocks)
        self._vectors = patches
        # the token of each patch, counted from the end of the prefix; -1 for none
        self._count, self._moved = patches.shape[1], False
        self._places = torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[:2])

    @property
    def places(self) -> Tensor:
        """The token of each patch, (B, N), counted from the end of the prefix; -1 for a patch that was dropped."""
        return self._places

    def copy(self) -> PatchMaps:
        """A copy that is changed apart from this one."""
        other = copy.copy(self)
        other.kept = dict(self.kept)
        return other

    def move(self, places: Tensor) -> None:
        """Follow a reduction, which gives each of the n tokens after the prefix a new place: (B, n), -1 for dropped."""
        self._moved = True
        self._places = places.gather(1, self._places.clamp(min=0)).where(self._places >= 0, -1)

    def keep_rows(self, rows: Tensor, count: int) -> None:
        """Follow a reduction of `count` tokens after the prefix to the rows (B, K) of them; others are dropped."""
        places = rows.new_full((len(rows), count), -1)
        self.move(places.scatter(1, rows, torch.arange(rows.shape[1], device=rows.device).expand_as(rows)))

    def restore(self) -> None:
        """Follow a method that restores all patches to their places, in front of other tokens."""
        self._moved = True
        self._places = torch.arange(self._places.shape[1], device=self._places.device).expand_as(self._places)

    def shrink(self, old: tuple[int, int], new: tuple[int, int], extra: int) -> None:
        """Follow a method that cuts the border of a grid (rows, columns); patches of the border join the nearest one.

        Args:
            old: the grid before.
            new: the grid after it.
            extra: number of tokens behind the patches, which do not change.
        """
        device = self._places.device
        rows, columns = (
            (torch.arange(before, device=device) - (before - after) // 2).clamp(0, after - 1)
            for before, after in zip(old, new, strict=True)
        )
        patches = (rows[:, None] * new[1] + columns).flatten()
        behind = torch.arange(extra, device=device) + new[0] * new[1]
        self.move(torch.cat([patches, behind]).expand(len(self._places), -1))

    def after(self, block: int, tokens: Tensor) -> None:
        """Read the tokens (B, n, D) after the prefix, behind a block.

        Raises:
            UsageError: a method has removed tokens and not said which.
        """
        if tokens.shape[1] < self._count and not self._moved:
            raise UsageError(
                f"a method has removed tokens in block {block}, and nothing says to which patches they belong"
            )
        self._count, self._moved = tokens.shape[1], False
        index = self._places.clamp(min=0)[:, :, None].expand(-1, -1, tokens.shape[2])
        current = tokens.gather(1, index) if tokens.shape[1] else self._vectors
        self._vectors = current.where(self._places[:, :, None] >= 0, self._vectors)
        if block in self._blocks:
            self.kept[block] = self._vectors
