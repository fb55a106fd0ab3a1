"""Write the training split of a dataset as class folders, with further classes made by exchanging colour channels.

Each order of red, green and blue turns a character into another one, whose images all have the same order: label
augmentation by colour permutation, Lee et al., ICML 2020 (arXiv 1910.05872). A network that learns to tell them apart
learns colours as a feature. Usage:

    python studies/colour_classes.py DATASET OUT [ORDERS]

ORDERS, 1 to 6, is how many of the six orders each image is written in; they take turns.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import animesion


def main(dataset: Path, out: Path, each: int) -> None:
    """Write `out/train/<class>` and `out/train/<class> <order>`."""
    orders = list(itertools.permutations(range(3)))
    seen: dict[str, int] = {}
    for sample in animesion.open_dataset(dataset).samples("train"):
        pixels = np.asarray(sample.decode().convert("RGB"))
        turn = seen[sample.name] = seen.get(sample.name, -1) + 1
        for i in range(each):
            order = orders[(turn * each + i) % len(orders)]
            name = sample.name if order == orders[0] else f"{sample.name} {''.join('rgb'[k] for k in order)}"
            folder = out / "train" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(pixels[..., list(order)])).save(
                folder / f"{sample.key}.jpg", quality=95
            )
    print(f"{each * sum(seen.values()) + each * len(seen):,} images of {6 * len(seen)} classes in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 6)
