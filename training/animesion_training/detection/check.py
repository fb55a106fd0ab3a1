"""Figures of a trained network on labelled illustrations, and the calibration of its scores."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from animesion.dataset.box_tables import ImageBoxes
from animesion.detectors import evaluation
from animesion.detectors.anime import AnimeDetector, AnimeOptions
from animesion_training.detection.labels import FACES, Labelled

LEAST = 0.02
"""Least score of the boxes that are judged."""


def judged(path: Path, labels: Mapping[str, ImageBoxes], images: Mapping[str, Labelled]) -> list[evaluation.Judged]:
    """What a network finds in labelled images.

    Args:
        path: of the network.
        labels: by digest.
        images: by digest.
    """
    detector = AnimeDetector(AnimeOptions(file=str(path), score=LEAST))
    found = []
    for digest, labelled in sorted(images.items()):
        with Image.open(io.BytesIO(labelled.content)) as opened:
            image = opened.convert("RGB")
        of = labels[digest]
        others = {each.kind for each in of.boxes} - FACES
        [boxes] = detector([image], [None])
        found.append(evaluation.judge(boxes, of.boxes, others, 0.5, of.width, of.height))
    return found


def calibration(images: Sequence[evaluation.Judged]) -> tuple[float, float]:
    """Gain and offset that make the logistic function of a logit the share of such boxes that are faces.

    Platt's scaling, fitted by Newton's method; each class counts one box more than there is, so that no score is 0 or
    1. A gain below 0.2 or above 5 is cut off, as it comes from too few boxes.
    """
    pairs = [
        (box.score, at >= 0)
        for image in images
        for box, at in zip(image.boxes, image.found, strict=True)
        if at < 0 or not image.ignored[at]
    ]
    right = sum(hit for _, hit in pairs)
    if right < 5 or len(pairs) - right < 5:
        return 1.0, 0.0
    scores = np.array([score for score, _ in pairs]).clip(1e-4, 1 - 1e-4)
    logits = np.log(scores / (1 - scores))
    high, low = (right + 1) / (right + 2), 1 / (len(pairs) - right + 2)
    wanted = np.where([hit for _, hit in pairs], high, low)
    design = np.column_stack([logits, np.ones_like(logits)])
    fitted = np.array([1.0, 0.0])
    for _ in range(50):
        shares = 1 / (1 + np.exp(-design @ fitted))
        slope = design.T @ (wanted - shares)
        curve = (design * (shares * (1 - shares))[:, None]).T @ design + 1e-6 * np.eye(2)
        step = np.linalg.solve(curve, slope)
        fitted = fitted + step * min(1.0, 2.0 / max(1e-9, float(np.abs(step).max())))
    gain, offset = float(fitted[0]), float(fitted[1])
    if not (math.isfinite(gain) and math.isfinite(offset)) or not 0.2 <= gain <= 5:
        return 1.0, 0.0
    return gain, offset
