"""Recall, precision and speed of a detector on composed illustrations: faces pasted on drawn scenes.

    python tests/benchmarks/detector_recall.py --faces ../shared/data/holo-faces/faces-train-128.tar
        [--detector lbp] [--set score=0.4] [--images 300] [--scores 0 0.6 0.75 0.85]
        [--characters ceci gura] [--grounds sky lantern]

Each scene has 900 x 700 px and zero to three faces of 60 to 260 px that do not touch. `tight` pastes the crops
unchanged, `blended` blends their edges into the scene, and `drawn` uses the heads of the sample world instead (without
--faces); their boxes include the hair. A face is found if a box overlaps it with an IoU of at least 0.5; each box
counts for one face. Intervals are 95% Wilson intervals, and times are of the CPU. `animesion detectors eval` measures
on labelled images. The network of the detector `anime` has seen neither the faces of the characters ceci, gura, mococo
and shiori nor the grounds classroom, lantern and sky.
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
from animesion.dataset.box_tables import KindBox
from animesion.detectors import evaluation
from animesion.detectors.matching import percent
from animesion.schemas import Box
from animesion_sample.characters import CAST
from animesion_sample.drawing import Drawing, heads, render, scene
from animesion_sample.scenes import SCENES

WIDTH, HEIGHT = 900, 700

Composed = tuple[Image.Image, list[Box]]


def pasted(faces: list[bytes], count: int, grounds: list[str], *, blended: bool) -> Iterator[Composed]:
    """Scenes with real faces."""
    for number in range(count):
        rng = Random(f"recall/{number}")
        ground = SCENES[rng.choice(grounds)]((WIDTH, HEIGHT), rng).convert("RGB")
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


def drawn(count: int, grounds: list[str]) -> Iterator[Composed]:
    """Images of the sample world, with the boxes of their heads."""
    number = made = 0
    while made < count:
        rng = Random(f"recall/{number}")
        cast = tuple(design.name for design in rng.sample(CAST, rng.choice((0, 1, 1, 2))))
        image = Drawing(f"recall/{number}", cast, WIDTH, HEIGHT)
        number += 1
        if scene(image) in grounds:
            made += 1
            yield render(image), [Box(*head.box, 1.0) for head in heads(image)]


def measure(name: str, composed: Iterator[Composed], detector: detectors.Detector, scores: list[float]) -> None:
    """Print one line per minimum score, and by size the best recall at a precision of 98 %."""
    seen: list[evaluation.Judged] = []
    seconds = 0.0
    for image, truth in composed:
        start = time.process_time()
        [boxes] = detector([image], [None])
        seconds += time.process_time() - start
        seen.append(evaluation.judge(boxes, [KindBox(box) for box in truth], (), 0.5, *image.size))
    [every, *_] = evaluation.rows(seen, 0.0)
    print(
        f"{name}: {len(seen)} images, {every.truth} faces, AP {100 * (every.average or 0):.1f}, "
        f"{1000 * seconds / len(seen):.0f} ms per image"
    )

    def line(start: str, row: evaluation.Row) -> None:
        recall, precision = percent(row.found, row.truth), percent(row.right, row.boxes)
        print(f"  {start:<16}  recall {recall:<22}  precision {precision}")

    for least in scores:
        line(f"score >= {least:.2f}", evaluation.rows(seen, least)[0])
    if point := evaluation.operating_points(seen).get(0.98):
        for row in evaluation.rows(seen, point[0]):
            line(f"  {point[0]:.2f}  {row.name}", row)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, help="tar of face crops")
    parser.add_argument("--detector", default="lbp")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the detector")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--characters", nargs="+", metavar="NAME", help="folders of the tar; by default all")
    parser.add_argument("--grounds", nargs="+", choices=sorted(SCENES), default=sorted(SCENES))
    parser.add_argument("--scores", type=float, nargs="+", default=[0.0, 0.6, 0.75, 0.85])
    given = parser.parse_args()
    options: dict[str, Any] = {}
    for setting in given.set:
        apply(options, setting)
    detector = detectors.load(given.detector, options)
    if given.faces:
        with tarfile.open(given.faces) as tar:
            members = sorted((each for each in tar.getmembers() if each.isfile()), key=lambda each: each.name)
            members = [each for each in members if not given.characters or each.name.split("/")[0] in given.characters]
            chosen = Random("recall/faces").sample(members, min(len(members), 3 * given.images))
            faces = [file.read() for each in chosen if (file := tar.extractfile(each))]
        measure("tight", pasted(faces, given.images, given.grounds, blended=False), detector, given.scores)
        measure("blended", pasted(faces, given.images, given.grounds, blended=True), detector, given.scores)
    measure("drawn", drawn(given.images, given.grounds), detector, given.scores)


if __name__ == "__main__":
    main()
