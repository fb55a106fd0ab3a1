"""Write each face of a dataset into a scene of its own: a drawn ground, drawn things that are no face, one real face.

A subject within a scene, whose class and place are known, is what attention-guided crops are for. A scene depends on
its image alone; splits and classes are those of the dataset. Usage:

    python studies/pasted_scenes.py DATASET OUT [--side 128] [--least 0.25] [--most 0.6]

The side of the face is a share of the scene's from LEAST to MOST. OUT has `<split>/<class>/<key>.jpg`, which
`animesion train --data` reads, and `boxes.csv` with the box of each face in pixels.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

import animesion
from animesion_training.detection import scenes


def main(dataset: Path, out: Path, side: int, least: float, most: float) -> None:
    """Write the scenes."""
    opened = animesion.open_dataset(dataset)
    counts: Counter[str] = Counter()
    rows = []
    for split in ("train", "val", "test"):
        for sample in opened.samples(split):
            rng = Random(f"scene {sample.key}")
            face = np.ascontiguousarray(np.asarray(sample.decode().convert("RGB")))
            scene = scenes.single(face, side, rng.uniform(least, most), rng)
            path = Path(split, sample.name, f"{sample.key}.jpg")
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.pixels).save(out / path, quality=95)
            rows += [[path.as_posix(), *(round(edge, 1) for edge in box)] for box in scene.faces]
            counts[split] += 1
    with (out / "boxes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "left", "top", "right", "bottom"], *rows])
    print(", ".join(f"{count:,} scenes in {split}" for split, count in counts.items()), f"of {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--least", type=float, default=0.25)
    parser.add_argument("--most", type=float, default=0.6)
    given = parser.parse_args()
    main(given.dataset, given.out, given.side, given.least, given.most)
