"""Anime faces by OpenCV's cascade of local binary patterns (LBP); needs no neural network and no GPU.

The cascade is a separate file (nagadomi's `lbpcascade_animeface.xml`, MIT), see `model_files`. It finds upright frontal
and three-quarter faces; others need a trained detector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from animesion import model_files
from animesion.errors import UsageError
from animesion.schemas import Box

_LONGEST = 1600
"""Longest side in pixels; a larger image is shrunk to it, as more pixels cost time and show no more faces."""

_LEAST = 24
"""Side of the cascade's window in pixels; smaller faces are not found."""

_SCALE, _NEIGHBOURS = 1.1, 2


class LbpCascade:
    """Detector that runs the cascade.

    The score of a box is the logistic function of the last stage's sum of votes: 0.5 at the stage's threshold. Boxes
    above 0.75 are almost always faces.
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
            raise UsageError(f"{path} is not a cascade that OpenCV can read; {model_files.install_hint('lbp')}")

    @classmethod
    def file(cls) -> Path:
        """Path of the cascade.

        Raises:
            UsageError: it is not installed.
        """
        return model_files.path_of("lbp")

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Faces of each image, by descending score."""
        return [self._faces(image) for image in images]

    def _faces(self, image: Image.Image) -> list[Box]:
        cv2 = _opencv()
        width, height = image.size
        grey = np.asarray(image.convert("L"))
        # boxes are relative to the image, so shrinking it does not change them
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
    """Import OpenCV and limit it to one thread, as worker processes already use every core."""
    try:
        import cv2
    except ImportError:
        raise UsageError(
            "the detector 'lbp' needs OpenCV, which is not installed; install it with: pip install 'animesion[detect]'"
        ) from None
    cv2.setNumThreads(1)
    return cv2
