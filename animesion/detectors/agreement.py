"""Several detectors as one: boxes that two or more of them find are sure, boxes of a single one are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from animesion.detectors import matching
from animesion.schemas import Box

_Find = Callable[[Sequence[Image.Image], Sequence[Sequence[Box] | None]], list[list[Box]]]

_ALONE = 0.49
"""Boxes of one detector score at most this, and boxes of several at least 0.5."""


class Agreement:
    """Boxes of several detectors.

    Boxes of different detectors are the same if their intersection over union is at least `iou`; the closest pairs are
    joined first, with at most one box of each detector. The box is that of the detector that comes first.

    The score is `(1 + s) / 2` where two or more detectors have the box, with their best score s, and `0.49 * s` where
    one has it. A minimum score of 0.5 therefore asks for agreement and nothing else.

    Args:
        detectors: two or more detectors.
        iou: least intersection over union.
    """

    summary = "boxes that several detectors agree on"

    def __init__(self, detectors: Sequence[_Find], iou: float) -> None:
        self._detectors = list(detectors)
        self._iou = iou

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Boxes of each image, by descending score."""
        found = [detector(images, given) for detector in self._detectors]
        return [joined(of_image, self._iou) for of_image in zip(*found, strict=True)]


def joined(found: Sequence[Sequence[Box]], iou: float) -> list[Box]:
    """The boxes of one image, by descending score.

    Args:
        found: boxes of each detector.
        iou: least intersection over union of boxes that are the same.
    """
    places = [(detector, i) for detector, boxes in enumerate(found) for i in range(len(boxes))]
    group = {place: {place[0]: place[1]} for place in places}  # box by detector; shared by the members
    pairs = []
    for at, one in enumerate(places):
        for other in places[at + 1 :]:
            if one[0] != other[0]:
                shared = matching.overlap(found[one[0]][one[1]], found[other[0]][other[1]])
                if shared >= iou and shared > 0:
                    pairs.append((-shared, one, other))
    for _, one, other in sorted(pairs):
        if group[one] is not group[other] and group[one].keys().isdisjoint(group[other]):
            together = group[one] | group[other]
            for place in together.items():
                group[place] = together
    boxes = []
    for place in places:
        members = group[place]
        if min(members) != place[0]:  # counted once, where its first detector has it
            continue
        best = max(found[detector][i].score for detector, i in members.items())
        score = (1 + best) / 2 if len(members) > 1 else _ALONE * best
        boxes.append(found[place[0]][place[1]]._replace(score=score))
    return sorted(boxes, key=lambda box: (-box.score, box))
