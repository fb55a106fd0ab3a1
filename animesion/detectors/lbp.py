"""Anime faces by OpenCV's cascade of local binary patterns: no network and no GPU needed.

The cascade is a file of its own (nagadomi's `lbpcascade_animeface.xml`, MIT), see `installing`. It finds upright faces
seen from the front and from half the side; others need a trained detector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from animesion.detectors import model_files
from animesion.errors import UsageError
from animesion.schemas import Box

_LONGEST = 1600
"""Pixels of the longest side at which an image is searched: larger ones cost more and show no more faces."""

_LEAST = 24
"""Side of the cascade's window in pixels: a smaller face is not seen."""

_SCALE, _NEIGHBOURS = 1.1, 2


class LbpCascade:
    """The cascade.

    A box's score is the logistic function of the last stage's sum of votes. The votes at its threshold give 0.5; what
    lies above 0.75 is hardly ever wrong.
    """

    summary = "anime faces by an LBP cascade (OpenCV), on any CPU"

    def __init__(self) -> None:
        path = self.file()
        cv2 = _opencv()
        self._cascade: Any = cv2.CascadeClassifier()
        try:
            read = self._cascade.load(str(path))
        except cv2.error:
            read = False
        if not read:
            raise UsageError(f"{path} is no cascade that OpenCV can read; {model_files.how('lbp')}")

    @classmethod
    def file(cls) -> Path:
        """The cascade.

        Raises:
            UsageError: it is not installed.
        """
        return model_files.installed("lbp")

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """The faces of each image, the surest first."""
        return [self._faces(image) for image in images]

    def _faces(self, image: Image.Image) -> list[Box]:
        cv2 = _opencv()
        width, height = image.size
        grey = np.asarray(image.convert("L"))
        if (shrink := _LONGEST / max(width, height)) < 1:
            size = max(1, round(width * shrink)), max(1, round(height * shrink))
            grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        rows, columns = grey.shape
        if min(rows, columns) < _LEAST:
            return []
        found, _, votes = self._cascade.detectMultiScale3(
            cv2.equalizeHist(grey),
            scaleFactor=_SCALE,
            minNeighbors=_NEIGHBOURS,
            minSize=(_LEAST, _LEAST),
            outputRejectLevels=True,
        )
        boxes = [
            Box(
                int(left) / columns,
                int(top) / rows,
                min(1.0, int(left + wide) / columns),
                min(1.0, int(top + tall) / rows),
                1 / (1 + math.exp(-float(vote))),
            )
            for (left, top, wide, tall), vote in zip(found, np.ravel(votes), strict=True)
        ]
        return sorted(boxes, key=lambda box: (-box.score, box))


def _opencv() -> Any:
    """OpenCV, with one thread: images are what is done side by side."""
    try:
        import cv2
    except ImportError:
        raise UsageError(
            "the detector 'lbp' needs OpenCV, which is not installed; install it with: pip install 'animesion[detect]'"
        ) from None
    cv2.setNumThreads(1)
    return cv2
