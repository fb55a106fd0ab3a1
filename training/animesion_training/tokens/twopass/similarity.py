"""The selection of GLSim as pure functions: scores of patches, the best of them, and the box around these.

`global_local_similarity` scores patches, `select` returns the best of them, `patch_box` and `mask_box` return a box in
pixels. All run batched on the device without synchronisation. Scores from attention are in `rollout`, crops in
`animesion_training.data.views`, the networks that use them in `glsim` and `rams_trans`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from animesion.errors import UsageError

Metric = Literal["cos", "l1", "l2"]
BoxRule = Literal["corrected", "reference"]

#: Name -> description; the cosine is a similarity, the others are distances.
METRICS = {
    "cos": "cosine over all channels, in [-1, 1]; the largest are selected",
    "l1": "mean over channels of the absolute difference; the smallest are selected",
    "l2": "mean over channels of the squared difference; the smallest are selected",
}
#: Name -> the pixels inside the box.
BOXES = {
    "corrected": "all of every selected patch",
    "reference": "without the last selected row and column of patches, unless there is one alone, as the original",
}


def global_local_similarity(global_token: Tensor, patches: Tensor, metric: Metric = "cos") -> Tensor:
    """Similarity of each patch to the whole image (GLS; Rios et al., arXiv 2407.12891).

    Costs O(N D) and needs no attention weights. Computed in float32 at least.

    Args:
        global_token: the class token, (B, D).
        patches: (B, N, D), after the same block and norm as the class token.
        metric: one of `METRICS`.

    Returns:
        (B, N), without a gradient. In [-1, 1] for `cos`; a distance, >= 0, for `l1` and `l2`.

    Raises:
        UsageError: an unknown metric.
    """
    if metric not in METRICS:
        raise UsageError(f"no similarity metric is called {metric!r}: there are {', '.join(METRICS)}")
    exact = torch.promote_types(patches.dtype, torch.float32)
    image, parts = global_token.detach().to(exact)[:, None], patches.detach().to(exact)  # (B, 1, D), (B, N, D)
    if metric == "cos":
        return functional.cosine_similarity(image, parts, dim=-1)
    difference = image - parts
    return difference.abs().mean(-1) if metric == "l1" else difference.square().mean(-1)


def select(scores: Tensor, top: int, *, smallest: bool = False) -> Tensor:
    """Indices of the patches with the best scores, best first; of equal scores, the first in the grid.

    Args:
        scores: (B, N).
        top: O, how many; all if there are fewer.
        smallest: whether small scores are the best.

    Returns:
        (B, min(O, N)), int64.

    Raises:
        UsageError: `top` is not a positive number.
    """
    return scores.sort(dim=1, descending=not smallest, stable=True).indices[:, : check_top(top)]


def check_top(top: int) -> int:
    """Return a number of patches to select, after a check.

    Raises:
        UsageError: it is not a positive whole number.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise UsageError(f"top is the number of selected patches, a whole number from 1, not {top!r}")
    return top


def patch_box(indices: Tensor, grid: tuple[int, int], size: tuple[int, int], box: BoxRule = "corrected") -> Tensor:
    """The box in pixels around selected patches.

    The grid covers all of `size`: a cell is `size / grid` pixels. A box is rounded outwards to whole pixels.

    Args:
        indices: (B, O), int64, row * columns + column.
        grid: (rows, columns) of patches.
        size: (height, width) of the grid in pixels.
        box: one of `BOXES`.

    Returns:
        (B, 4), int64: y0, y1, x0, x1, the ends exclusive; never empty.

    Raises:
        UsageError: an unknown name of a box.
    """
    rows, columns = indices // grid[1], indices % grid[1]
    return torch.stack(
        (
            *_span(rows.amin(1), rows.amax(1), grid[0], size[0], box),
            *_span(columns.amin(1), columns.amax(1), grid[1], size[1], box),
        ),
        dim=1,
    )


def mask_box(
    mask: Tensor, grid: tuple[int, int], size: tuple[int, int], box: BoxRule = "corrected", *, pool: int = 1
) -> Tensor:
    """The box in pixels around marked cells; around the whole grid if no cell is marked.

    Args:
        mask: (B, rows, columns), bool, of cells of `pool` by `pool` patches; cells at the end may have fewer patches.
        grid: (rows, columns) of patches.
        size: (height, width) of the grid in pixels.
        box: one of `BOXES`.
        pool: patches along the side of a cell.

    Returns:
        (B, 4), int64, as `patch_box`.

    Raises:
        UsageError: an unknown name of a box.
    """
    spans: list[Tensor] = []
    for side, hit in enumerate((mask.any(2), mask.any(1))):
        marks = hit.to(torch.uint8)  # (B, rows) or (B, columns)
        # argmax returns the first maximum, so these are the first and the last marked index
        first, last = marks.argmax(1), marks.shape[1] - 1 - marks.flip(1).argmax(1)
        start, end = _span(first, last, grid[side], size[side], box, pool)
        anything = hit.any(1)
        spans += [start.where(anything, 0), end.where(anything, size[side])]
    return torch.stack(spans, dim=1)


def _span(first: Tensor, last: Tensor, patches: int, pixels: int, box: BoxRule, pool: int = 1) -> tuple[Tensor, Tensor]:
    """First and last pixel, the end exclusive, of the cells `first` to `last` along one side."""
    if box not in BOXES:
        raise UsageError(f"no box is called {box!r}: there are {', '.join(BOXES)}")
    beyond = last + 1 if box == "corrected" else torch.maximum(last, first + 1)
    beyond = (beyond * pool).clamp(max=patches)
    start = first * pool * pixels // patches  # rounded down
    end = -(-beyond * pixels // patches)  # rounded up
    return start, end
