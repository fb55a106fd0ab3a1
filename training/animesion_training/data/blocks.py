"""Cut shards into blocks: ranges of bytes that are read at once, and that the schedule shuffles as a whole.

A cell of a grid over a shard holds the samples that start in it. A block is the range from the first of them to the end
of the last. Blocks are a function of the dataset alone, so the order is too. `schedule` gives each rank few of them,
and `remote` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from animesion_training.data.seeds import IntArray

#: A dataset has about this many blocks, within the limits of their size in bytes. More would make more requests, fewer
#: would make ranks share more of them.
_COUNT = 2048
_LEAST, _MOST = 2**18, 2**20


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a dataset, by file and start; all arrays have shape (M,), int64.

    Attributes:
        files: numbers of the shards.
        starts: offsets of the first byte.
        ends: offsets behind the last byte.
    """

    files: IntArray
    starts: IntArray
    ends: IntArray

    def __len__(self) -> int:
        return len(self.files)


def block_bytes(total: int) -> int:
    """Choose the grid of a dataset whose shards have `total` bytes."""
    return min(_MOST, max(_LEAST, total // _COUNT))


def cut_blocks(files: IntArray, offsets: IntArray, sizes: IntArray, grid: int) -> tuple[IntArray, Blocks]:
    """Cut shards into blocks.

    Args:
        files: shard of each sample, shape (N,).
        offsets: in the shard, shape (N,), 0 or more.
        sizes: in bytes, shape (N,).
        grid: distance of the lines between blocks in bytes, see `block_bytes`.

    Returns:
        The block of each sample, shape (N,), and the blocks.
    """
    cells = offsets // grid
    width = int(cells.max(initial=0)) + 1
    keys, blocks = np.unique(files * width + cells, return_inverse=True)
    starts = np.full(len(keys), np.iinfo(np.int64).max)
    np.minimum.at(starts, blocks, offsets)
    ends = np.zeros(len(keys), dtype=np.int64)
    np.maximum.at(ends, blocks, offsets + sizes)
    return blocks.astype(np.int64), Blocks(keys // width, starts, ends)
