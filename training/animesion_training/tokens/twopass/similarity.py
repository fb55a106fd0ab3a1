"""Which patches an image is recognised by, and the box around them: the selection of GLSim, as pure functions.

Global-local similarity scores patches, `select` takes the best of them, `patch_box` and `mask_box` turn a choice into
pixels. All are batched on the device and never wait for it. Scores from attention are in `rollout`, crops in
`animesion_training.data.views`, the networks that use them in `twopass`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from animesion.errors import UsageError

Metric = Literal["cos", "l1", "l2"]
BoxRule = Literal["corrected", "reference"]

#: Name -> what it is; cosines are a similarity, the others distances.
METRICS = {
    "cos": "cosine over all channels, in [-1, 1]; the largest are selected",
    "l1": "mean over channels of the absolute difference; the smallest are selected",
    "l2": "mean over channels of the squared difference; the smallest are selected",
}
#: Name -> which pixels the box takes in.
BOXES = {
    "corrected": "all of every selected patch",
    "reference": "without the last selected row and column of patches, unless there is one alone, as the original",
}


def global_local_similarity(global_token: Tensor, patches: Tensor, metric: Metric = "cos") -> Tensor:
    """How like each patch is to the whole image (GLS; Rios et al., arXiv 2407.12891).

    Costs O(N D) and needs no attention weights. Computed in float32 at least.

    Args:
        global_token: the class token, (B, D).
        patches: (B, N, D), of the same block and under the same norm.
        metric: one of `METRICS`.

    Returns:
        (B, N), without a gradient; a distance, >= 0, for `l1` and `l2`.

    Raises:
        UsageError: an unknown metric.
    """
    if metric not in METRICS:
        raise UsageError(f"no similarity metric is called {metric!r}: there are {', '.join(METRICS)}")
    exact = torch.promote_types(patches.dtype, torch.float32)
    whole, parts = global_token.detach().to(exact)[:, None], patches.detach().to(exact)
    if metric == "cos":
        return functional.cosine_similarity(whole, parts, dim=-1)
    difference = whole - parts
    return difference.abs().mean(-1) if metric == "l1" else difference.square().mean(-1)


def select(scores: Tensor, top: int, *, smallest: bool = False) -> Tensor:
    """The patches with the best scores, best first; of equal ones the first in the grid.

    Args:
        scores: (B, N).
        top: O, how many; all where there are fewer.
        smallest: whether small scores are the good ones.

    Returns:
        (B, min(O, N)), int64.

    Raises:
        UsageError: `top` is no positive number.
    """
    return scores.sort(dim=1, descending=not smallest, stable=True).indices[:, : check_top(top)]


def check_top(top: int) -> int:
    """A number of patches to select.

    Raises:
        UsageError: it is no positive whole number.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise UsageError(f"top is how many patches are selected, from 1, not {top!r}")
    return top


def patch_box(indices: Tensor, grid: tuple[int, int], size: tuple[int, int], box: BoxRule = "corrected") -> Tensor:
    """The box in pixels around selected patches.

    The grid covers all of `size`: a cell is `size / grid` pixels, and a box ends at whole pixels that its cells touch.

    Args:
        indices: (B, O), int64, row * columns + column.
        grid: rows and columns of patches.
        size: (height, width) in pixels of what the grid covers.
        box: one of `BOXES`.

    Returns:
        (B, 4), int64: y0, y1, x0, x1, the ends exclusive; never empty.

    Raises:
        UsageError: an unknown kind of box.
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
    """The box in pixels around marked cells; around the whole grid where none is marked.

    Args:
        mask: (B, rows, columns), bool, of cells of `pool` by `pool` patches; the last ones may have fewer.
        grid: rows and columns of patches.
        size: (height, width) in pixels of what the grid covers.
        box: one of `BOXES`.
        pool: patches along the side of a cell.

    Returns:
        (B, 4), int64, as `patch_box`.

    Raises:
        UsageError: an unknown kind of box.
    """
    spans: list[Tensor] = []
    for side, hit in enumerate((mask.any(2), mask.any(1))):
        marks = hit.to(torch.uint8)
        first, last = marks.argmax(1), marks.shape[1] - 1 - marks.flip(1).argmax(1)
        start, end = _span(first, last, grid[side], size[side], box, pool)
        anything = hit.any(1)
        spans += [start.where(anything, 0), end.where(anything, size[side])]
    return torch.stack(spans, dim=1)


def _span(first: Tensor, last: Tensor, patches: int, pixels: int, box: BoxRule, pool: int = 1) -> tuple[Tensor, Tensor]:
    """Pixels from the first to the last cell along one side of so many patches."""
    if box not in BOXES:
        raise UsageError(f"no box is called {box!r}: there are {', '.join(BOXES)}")
    beyond = last + 1 if box == "corrected" else torch.maximum(last, first + 1)
    beyond = (beyond * pool).clamp(max=patches)
    return first * pool * pixels // patches, -(-beyond * pixels // patches)
