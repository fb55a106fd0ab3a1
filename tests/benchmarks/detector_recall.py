"""Recall, precision and speed of a detector on composed illustrations: faces pasted on drawn scenes.

    python tests/benchmarks/detector_recall.py --faces ../shared/data/holo-faces/faces-train-128.tar
        [--detector lbp] [--set score=0.4] [--images 300] [--scores 0 0.6 0.75 0.85]

Each scene has 900 x 700 px and zero to three faces of 60 to 260 px that do not touch. `tight` pastes the crops
unchanged, `blended` blends their edges into the scene, and `drawn` uses the heads of the sample world instead (without
--faces); their boxes include the hair. A face is found if a box overlaps it with an IoU of at least 0.5; each box
counts for one face. Intervals are 95% Wilson intervals. `animesion detectors eval` measures on labelled images.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from animesion import detectors
from animesion.config.settings import apply
from animesion.detectors.matching import average_precision, matches, percent
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
    hits = [
        (box.score, at >= 0) for boxes, truth in seen for box, at in zip(boxes, matches(boxes, truth, 0.5), strict=True)
    ]
    average = average_precision(hits, faces)
    print(
        f"{name}: {len(seen)} images, {faces} faces, AP {100 * (average or 0):.1f}, "
        f"{1000 * seconds / len(seen):.0f} ms per image"
    )
    for least in scores:
        good = [hit for score, hit in hits if score >= least]
        print(
            f"  score >= {least:.2f}  recall {percent(sum(good), faces):<22}  precision {percent(sum(good), len(good))}"
        )


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
