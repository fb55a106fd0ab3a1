"""Recall, precision and speed of a detector on composed illustrations: faces pasted on drawn scenes.

    python tests/benchmarks/detector_recall.py --faces ../shared/data/holo-faces/faces-train-128.tar
        [--detector lbp] [--set score=0.4] [--images 300] [--scores 0 0.6 0.75 0.85]

Each scene has 900 x 700 px and zero to three faces of 60 to 260 px that do not touch. `tight` pastes the crops
unchanged, `blended` blends their edges into the scene, and `drawn` uses the heads of the sample world instead (without
--faces); their boxes include the hair. A face is found if a box overlaps it with an IoU of at least 0.5; each box
counts for one face. Intervals are 95% Wilson intervals.
"""

from __future__ import annotations

import argparse
import io
import math
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from animesion import detectors
from animesion.config.settings import apply
from animesion.schemas import Box
from animesion_sample.characters import CAST
from animesion_sample.drawing import Drawing, heads, render
from animesion_sample.scenes import SCENES

WIDTH, HEIGHT = 900, 700

Composed = tuple[Image.Image, list[Box]]


def pasted(faces: list[bytes], count: int, *, blended: bool) -> Iterator[Composed]:
    """Scenes with real faces."""
    for number in range(count):
        rng = Random(f"recall/{number}")
        ground = SCENES[rng.choice(sorted(SCENES))]((WIDTH, HEIGHT), rng).convert("RGB")
        placed: list[tuple[int, int, int]] = []
        truth = []
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            side = rng.randint(60, 260)
            left, top = rng.randint(0, WIDTH - side), rng.randint(0, HEIGHT - side)
            if any(left < x + s and x < left + side and top < y + s and y < top + side for x, y, s in placed):
                continue
            placed.append((left, top, side))
            with Image.open(io.BytesIO(rng.choice(faces))) as face:
                cut = face.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            mask = Image.new("L", cut.size, 255)
            if blended:
                mask = Image.new("L", cut.size, 0)
                ImageDraw.Draw(mask).ellipse((0, 0, side - 1, side - 1), fill=255)
                mask = mask.filter(ImageFilter.GaussianBlur(side / 16))
            ground.paste(cut, (left, top), mask)
            truth.append(Box(left / WIDTH, top / HEIGHT, (left + side) / WIDTH, (top + side) / HEIGHT, 1.0))
        yield ground, truth


def drawn(count: int) -> Iterator[Composed]:
    """Images of the sample world, with the boxes of their heads."""
    for number in range(count):
        rng = Random(f"recall/{number}")
        cast = tuple(design.name for design in rng.sample(CAST, rng.choice((0, 1, 1, 2))))
        image = Drawing(f"recall/{number}", cast, WIDTH, HEIGHT)
        yield render(image), [Box(*head.box, 1.0) for head in heads(image)]


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    wide = max(0.0, min(a.right, b.right) - max(a.left, b.left))
    tall = max(0.0, min(a.bottom, b.bottom) - max(a.top, b.top))
    areas = [(box.right - box.left) * (box.bottom - box.top) for box in (a, b)]
    return wide * tall / (sum(areas) - wide * tall)


def matches(boxes: list[Box], truth: list[Box], iou: float) -> list[bool]:
    """Whether each box, by descending score, finds a face that no better box has found."""
    left, right = list(truth), []
    for box in sorted(boxes, key=lambda each: -each.score):
        best = max(left, key=lambda face: overlap(box, face), default=None)
        hit = best is not None and overlap(box, best) >= iou
        right.append(hit)
        if hit and best is not None:
            left.remove(best)
    return right


def share(part: int, whole: int) -> str:
    """A share in percent with its 95% Wilson interval, as text."""
    if not whole:
        return f"{'-':>22}"
    p, z = part / whole, 1.96
    middle, spread = p + z * z / (2 * whole), z * math.sqrt(p * (1 - p) / whole + z * z / (4 * whole * whole))
    low, high = ((middle + sign * spread) / (1 + z * z / whole) for sign in (-1, 1))
    return f"{100 * p:5.1f}% ({100 * low:4.1f} to {100 * high:5.1f})"


def measure(name: str, composed: Iterator[Composed], detector: detectors.Detector, scores: list[float]) -> None:
    """Print one line per minimum score."""
    seen: list[tuple[list[Box], list[Box]]] = []
    seconds = 0.0
    for image, truth in composed:
        start = time.perf_counter()
        [boxes] = detector([image], [None])
        seconds += time.perf_counter() - start
        seen.append((boxes, truth))
    faces = sum(len(truth) for _, truth in seen)
    print(f"{name}: {len(seen)} images, {faces} faces, {1000 * seconds / len(seen):.0f} ms per image")
    for least in scores:
        hits = [hit for boxes, truth in seen for hit in matches([b for b in boxes if b.score >= least], truth, 0.5)]
        print(f"  score >= {least:.2f}  recall {share(sum(hits), faces)}  precision {share(sum(hits), len(hits))}")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, help="tar of face crops")
    parser.add_argument("--detector", default="lbp")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the detector")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--scores", type=float, nargs="+", default=[0.0, 0.6, 0.75, 0.85])
    given = parser.parse_args()
    options: dict[str, Any] = {}
    for setting in given.set:
        apply(options, setting)
    detector = detectors.load(given.detector, options)
    if given.faces:
        with tarfile.open(given.faces) as tar:
            members = sorted((each for each in tar.getmembers() if each.isfile()), key=lambda each: each.name)
            chosen = Random("recall/faces").sample(members, min(len(members), 3 * given.images))
            faces = [file.read() for each in chosen if (file := tar.extractfile(each))]
        measure("tight", pasted(faces, given.images, blended=False), detector, given.scores)
        measure("blended", pasted(faces, given.images, blended=True), detector, given.scores)
    measure("drawn", drawn(given.images), detector, given.scores)


if __name__ == "__main__":
    main()
