"""Share of an image in the crops and drops of a CAL teacher, and the teacher's accuracy on them.

    python tests/benchmarks/view_shares.py --data DIR --teacher runs/teacher-cal/best.safetensors [--split test]

A crop that is nearly the whole image, or a drop that removes little, adds little to the image for a student. Thresholds
and maps are sampled as in training, from the number of the image as its seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import animesion
from animesion_training.data import Augment, views
from animesion_training.eval.reading import as_rgb
from animesion_training.models.cal import CALClassifier
from animesion_training.weights import load_model

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    model, card = load_model(options.teacher)
    assert isinstance(model, CALClassifier), f"{options.teacher} is not a CAL teacher"
    assert isinstance(card.img_size, int)
    side = card.img_size
    normalise = Augment.plain(as_rgb(card.mean), as_rgb(card.std))
    pixels, labels = [], []
    for sample in animesion.open_dataset(options.data).samples(options.split):
        image = sample.decode().convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(image))
        labels.append(sample.label)
    images, wanted = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)
    crops, drops = [], []
    right = {"image": 0, "crop": 0, "drop": 0}
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        with torch.inference_mode():
            x = normalise(batch, torch.zeros(len(batch), dtype=torch.int64))
            attention = model.forward_parts(x).attention.float()
            draws = views.draw(torch.arange(start, start + len(batch)), attention)
            maps, _ = views.select_maps(attention, draws.maps)
            boxes = views.crop_boxes(maps, (side, side), draws.crop_threshold)
            crops.append((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / side**2)
            crop, drop = views.views(x, attention, draws).chunk(2)
            drops.append((drop.abs().sum(1) == 0).float().mean((1, 2)))
            for name, shown in zip(right, (x, crop, drop), strict=True):
                right[name] += int((model(shown).argmax(1) == wanted[start : start + BATCH]).sum())
    area, gone = torch.cat(crops), torch.cat(drops)
    print(f"{len(images)} images of split {options.split}, at {side} px")
    print(f"crop: mean {area.mean():.0%} of the image, median {area.median():.0%}; {(area > 0.9).float().mean():.0%}")
    print(f"      of the crops are more than 90 % of it; drop: mean {gone.mean():.0%} removed")
    print("teacher top-1: " + ", ".join(f"{name} {count / len(images):.1%}" for name, count in right.items()))


if __name__ == "__main__":
    main()
