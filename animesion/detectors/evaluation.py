"""How well a detector finds labelled boxes, and how far detectors agree."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from animesion.dataset.box_tables import KindBox
from animesion.detectors import matching
from animesion.schemas import Box

#: Sizes as in COCO's evaluation: least and largest side in pixels, the square root of the box's area.
SIZES = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, math.inf)}

#: Precisions for which the best recall is stated.
PRECISIONS = (0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Judged:
    """An image, its true boxes and what a detector found.

    Attributes:
        width: of the upright image in pixels.
        height: of the upright image in pixels.
        truth: true boxes.
        ignored: whether each true box is ignored: it need not be found, and who finds it is not wrong.
        boxes: what the detector found.
        found: for each box the index of the true box that it finds, -1 for none.
    """

    width: int
    height: int
    truth: tuple[KindBox, ...]
    ignored: tuple[bool, ...]
    boxes: tuple[Box, ...]
    found: tuple[int, ...]

    def side(self, box: Box) -> float:
        """Square root of a box's area in pixels."""
        return math.sqrt((box.right - box.left) * self.width * (box.bottom - box.top) * self.height)

    def missed(self, min_score: float) -> list[int]:
        """Indices of the true boxes that no box of that score finds."""
        hit = {at for at, box in zip(self.found, self.boxes, strict=True) if box.score >= min_score}
        return [at for at, ignored in enumerate(self.ignored) if not ignored and at not in hit]

    def wrong(self, min_score: float) -> list[int]:
        """Indices of the boxes of that score that find no true box."""
        return [at for at, box in enumerate(self.boxes) if self.found[at] < 0 and box.score >= min_score]


@dataclass(frozen=True)
class Row:
    """Recall, precision and average precision of a part of the true boxes.

    Attributes:
        name: of the part.
        truth: number of true boxes.
        found: number of them that are found.
        boxes: number of boxes that count; those that find an ignored box do not.
        right: number of them that find a true box.
        average: average precision, over every score; None without a true box.
    """

    name: str
    truth: int
    found: int
    boxes: int
    right: int
    average: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, shares with their 95% intervals."""
        shares = {"recall": (self.found, self.truth), "precision": (self.right, self.boxes)}
        fields: dict[str, Any] = {"name": self.name, "truth": self.truth, "found": self.found, "boxes": self.boxes}
        for name, (part, whole) in shares.items():
            fields[name] = round(part / whole, 6) if whole else None
            fields[f"{name}_interval"] = [round(each, 6) for each in matching.interval(part, whole)]
        return {**fields, "average_precision": None if self.average is None else round(self.average, 6)}


def judge(
    boxes: Sequence[Box], truth: Sequence[KindBox], ignore: Collection[str], iou: float, width: int, height: int
) -> Judged:
    """Match the boxes of an image.

    True boxes that count are matched first; a box that finds none of them may find an ignored one.

    Args:
        boxes: what a detector found.
        truth: true boxes.
        ignore: kinds and flags of true boxes that are ignored.
        iou: least intersection over union.
        width: of the upright image in pixels.
        height: of the upright image in pixels.
    """
    ignored = [each.kind in ignore or not {*each.flags}.isdisjoint(ignore) for each in truth]
    counted = [at for at, skip in enumerate(ignored) if not skip]
    found = [at if at < 0 else counted[at] for at in matching.matches(boxes, [truth[at].box for at in counted], iou)]
    for i, box in enumerate(boxes):
        if found[i] < 0:
            # several boxes may find the same ignored one
            near = [at for at, skip in enumerate(ignored) if skip and matching.overlap(box, truth[at].box) >= iou]
            found[i] = near[0] if near else -1
    return Judged(width, height, tuple(truth), tuple(ignored), tuple(boxes), tuple(found))


def rows(images: Sequence[Judged], min_score: float) -> list[Row]:
    """One row for all true boxes, and one for each size that occurs."""
    found = [_row("all", images, min_score, 0.0, math.inf)]
    found += [_row(name, images, min_score, *limits) for name, limits in SIZES.items()]
    return [row for row in found if row.name == "all" or row.truth or row.boxes]


def recalls(images: Sequence[Judged], min_score: float) -> dict[str, tuple[int, int]]:
    """Found and all true boxes by kind, and by flag (`+flag`), if there are several or any."""
    all_of: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for image in images:
        gone = set(image.missed(min_score))
        for at, (each, ignored) in enumerate(zip(image.truth, image.ignored, strict=True)):
            if not ignored:
                names = [each.kind or "(no kind)", *(f"+{flag}" for flag in dict.fromkeys(each.flags))]
                all_of.update(names)
                missed.update(names if at in gone else ())
    if len(all_of) < 2:
        return {}
    return {name: (all_of[name] - missed[name], all_of[name]) for name in sorted(all_of)}


def operating_points(images: Sequence[Judged]) -> dict[float, tuple[float, int, int, int]]:
    """For each of `PRECISIONS` that is reached: the least score, true boxes found, boxes right and boxes counted.

    It is the score with the highest recall among those whose precision is at least that.
    """
    scored = sorted(_scored(images, 0.0, math.inf), reverse=True)
    points: dict[float, tuple[float, int, int, int]] = {}
    right = 0
    for i, (score, hit) in enumerate(scored):
        right += hit
        if i + 1 < len(scored) and scored[i + 1][0] == score:
            continue
        for precision in PRECISIONS:
            if right >= precision * (i + 1) and right:
                points[precision] = score, right, right, i + 1
    return points


def _row(name: str, images: Sequence[Judged], min_score: float, least: float, most: float) -> Row:
    truth = found = 0
    for image in images:
        gone = set(image.missed(min_score))
        for at, each in enumerate(image.truth):
            if not image.ignored[at] and least <= image.side(each.box) < most:
                truth += 1
                found += at not in gone
    scored = list(_scored(images, least, most))
    counted = [hit for score, hit in scored if score >= min_score]
    return Row(name, truth, found, len(counted), sum(counted), matching.average_precision(scored, truth))


def _scored(images: Iterable[Judged], least: float, most: float) -> Iterable[tuple[float, bool]]:
    """Score of each box of a size that counts, and whether it finds a true box.

    The size of a box that finds a true box is that of the true box.
    """
    for image in images:
        for box, at in zip(image.boxes, image.found, strict=True):
            if at >= 0 and image.ignored[at]:
                continue
            if least <= image.side(image.truth[at].box if at >= 0 else box) < most:
                yield box.score, at >= 0


# -- agreement ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """How far two detectors agree.

    Attributes:
        first: name of one.
        second: name of the other.
        boxes: number of boxes of each.
        both: number of boxes that both have.
        iou: mean intersection over union of these; 0 if there are none.
        images: number of images in which every box of either is one of the other.
    """

    first: str
    second: str
    boxes: tuple[int, int]
    both: int
    iou: float
    images: int

    @property
    def agreement(self) -> float | None:
        """Share of all different boxes that both have; None without a box."""
        together = sum(self.boxes) - self.both
        return self.both / together if together else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        share = self.agreement
        fields = {"first": self.first, "second": self.second, "boxes": list(self.boxes), "both": self.both}
        return {**fields, "agreement": share, "mean_iou": round(self.iou, 6), "equal_images": self.images}


def agreements(found: Mapping[str, Sequence[Sequence[Box]]], iou: float) -> list[Pair]:
    """How far each pair of detectors agrees.

    Args:
        found: by detector, the boxes of each image, images in one order.
        iou: least intersection over union of boxes that are the same.
    """
    pairs = []
    for first, second in itertools.combinations(found, 2):
        shared: list[float] = []
        images = 0
        for ours, theirs in zip(found[first], found[second], strict=True):
            matched = [(box, at) for box, at in zip(ours, matching.matches(ours, theirs, iou), strict=True) if at >= 0]
            shared += [matching.overlap(box, theirs[at]) for box, at in matched]
            images += len(matched) == len(ours) == len(theirs)
        boxes = sum(map(len, found[first])), sum(map(len, found[second]))
        mean = sum(shared) / len(shared) if shared else 0.0
        pairs.append(Pair(first, second, boxes, len(shared), mean, images))
    return pairs
