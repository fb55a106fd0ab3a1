"""Compare boxes: overlap, the assignment of boxes to true ones, precision and recall."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from animesion.schemas import Box


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, 0 to 1; 0 for boxes without an area."""
    wide = max(0.0, min(a.right, b.right) - max(a.left, b.left))
    tall = max(0.0, min(a.bottom, b.bottom) - max(a.top, b.top))
    areas = [max(0.0, box.right - box.left) * max(0.0, box.bottom - box.top) for box in (a, b)]
    union = sum(areas) - wide * tall
    return wide * tall / union if union > 0 else 0.0


def matches(boxes: Sequence[Box], truth: Sequence[Box], iou: float) -> list[int]:
    """The true box that each box finds.

    As in COCO's evaluation: by descending score, each takes the true box that it overlaps most among those that no
    better box has taken.

    Args:
        boxes: what a detector found.
        truth: true boxes.
        iou: least intersection over union.

    Returns:
        For each box, in the order given, the index of its true box; -1 if it finds none.
    """
    found = [-1] * len(boxes)
    left = set(range(len(truth)))
    for i in sorted(range(len(boxes)), key=lambda i: -boxes[i].score):
        overlaps = {j: overlap(boxes[i], truth[j]) for j in sorted(left)}
        best = max(overlaps, key=lambda j: overlaps[j], default=-1)
        if best >= 0 and overlaps[best] >= iou:
            found[i] = best
            left.remove(best)
    return found


def average_precision(scored: Iterable[tuple[float, bool]], truth: int) -> float | None:
    """Average precision as COCO computes it: the mean of the precision at 101 levels of recall.

    Args:
        scored: score of each box, and whether it finds a true one.
        truth: number of true boxes.

    Returns:
        0 to 1; None without a true box. Precision at a recall is the best at that recall or a higher one, and boxes of
        equal score count together, so that their order does not matter.
    """
    if truth < 1:
        return None
    ranked = sorted(scored, key=lambda each: -each[0])
    points: list[tuple[float, float]] = []  # recall and precision
    hits = 0
    for i, (score, hit) in enumerate(ranked):
        hits += hit
        if i + 1 == len(ranked) or ranked[i + 1][0] != score:
            points.append((hits / truth, hits / (i + 1)))
    best = 0.0
    envelope = []
    for recall, precision in reversed(points):
        best = max(best, precision)
        envelope.append((recall, best))
    envelope.reverse()
    total, at = 0.0, 0
    for level in range(101):
        while at < len(envelope) and envelope[at][0] < level / 100 - 1e-12:
            at += 1
        total += envelope[at][1] if at < len(envelope) else 0.0
    return total / 101


def interval(part: int, whole: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share (Wilson, JASA 22, 1927); 0 to 1 where there is nothing to count."""
    if whole < 1:
        return 0.0, 1.0
    share, z = part / whole, 1.96
    middle = share + z * z / (2 * whole)
    spread = z * math.sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole))
    return max(0.0, (middle - spread) / (1 + z * z / whole)), min(1.0, (middle + spread) / (1 + z * z / whole))


def percent(part: int, whole: int) -> str:
    """A share in percent with its 95% interval, as text."""
    if whole < 1:
        return "-"
    low, high = interval(part, whole)
    return f"{100 * part / whole:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
