"""Share of an image in the crops and drops of a CAL teacher, and the teacher's accuracy on them.

    python tests/benchmarks/view_shares.py --data DIR --teacher runs/teacher-cal [--split test] [--boxes DIR/boxes.csv]
        [--set views.sample=false ...]

A crop that is nearly the whole image, or a drop that removes little, adds little to the image for a student. Thresholds
and maps are sampled as in training, from the number of the image as its seed. DIR is anything that `animesion train`
reads; `--boxes` has the box of the subject of each image (file, left, top, right, bottom, in pixels of the image), as
`studies/pasted_scenes.py` writes it, and adds how much of the subject the views contain. A transplant shows
the region of another image of the split, drawn at random.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from animesion_training.data import Augment, open_data, views
from animesion_training.eval.reading import as_rgb
from animesion_training.models.cal import CALClassifier
from animesion_training.recipe import load
from animesion_training.weights import load_model

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--boxes", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe's views")
    options = parser.parse_args()
    if others := [each for each in options.set if not each.startswith("views.")]:
        parser.error(f"--set {others[0]}: only views.* has an effect here")
    settings = load("tgda", options.set).views
    drawn: dict[str, Any] = {"sample_maps": settings.sample, "num_maps": settings.maps or None}
    model, card = load_model(options.teacher)
    assert isinstance(model, CALClassifier), f"{options.teacher} is not a CAL teacher"
    assert isinstance(card.img_size, int)
    side = card.img_size
    normalise = Augment.plain(as_rgb(card.mean), as_rgb(card.std))
    samples = open_data(options.data, classes=card.classes).select(options.split)
    known = {}
    if options.boxes:
        with options.boxes.open(newline="", encoding="utf-8") as file:
            known = {
                row["file"]: [float(row[key]) for key in ("top", "bottom", "left", "right")]
                for row in csv.DictReader(file)
            }
    pixels, subjects = [], []
    order = np.random.default_rng(0).permutation(len(samples)).tolist()  # partners are neighbours
    for i in order:
        with Image.open(io.BytesIO(samples.read(i))) as image:
            pixels.append(np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)))
            down, across = side / image.height, side / image.width
        if options.boxes:
            name = Path(samples.source.name(int(samples.files[i]))).relative_to(options.data).as_posix()
            subjects.append(np.array(known[name]) * (down, down, across, across))
    images, wanted = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.from_numpy(samples.labels)[order]
    crops, drops, within, hidden = [], [], [], []
    right = {"image": 0, "crop": 0, "drop": 0, "transplant": 0}
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        with torch.inference_mode():
            numbers = torch.arange(start, start + len(batch))
            x = normalise(batch, torch.zeros(len(batch), dtype=torch.int64))
            attention = model.forward_parts(x).attention.float()
            attention = views.displace(attention, numbers) if settings.displace else attention
            labels = wanted[start : start + BATCH]
            draws = views.draw(numbers, attention, crop=settings.crop, drop=settings.drop, **drawn)
            chosen = views.select_maps(attention, draws.maps)
            crop_maps, drop_maps = (views.pool_map(each) for each in chosen) if settings.pool else chosen
            boxes = views.crop_boxes(
                crop_maps, (side, side), draws.crop_threshold, settings.padding, settings.upsampling
            )
            crops.append((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / side**2)
            kept = views.drop_mask(drop_maps, (side, side), draws.drop_threshold, settings.upsampling)[:, 0]
            drops.append(1 - kept.float().mean((1, 2)))
            partners = torch.arange(len(batch)).roll(1)
            mixture = views.draw_mixture(
                numbers, crop_maps, partners, sample_maps=False, threshold=settings.mix_threshold
            )
            regions = views.crop_boxes(crop_maps, (side, side), mixture.threshold, 0.0, settings.upsampling)
            shown = {
                "image": (x, labels),
                "crop": (views.crop(x, boxes), labels),
                "drop": (views.drop(x, drop_maps, draws.drop_threshold, settings.upsampling), labels),
                "transplant": (views.exchange(x, regions, partners), labels[partners]),
            }
            for name, (view, classes) in shown.items():
                right[name] += int((model(view).argmax(1) == classes).sum())
        for subject, box, mask in zip(subjects[start:], boxes.tolist(), kept, strict=False):
            top, bottom, left, end = subject
            high = max(0.0, min(bottom, box[1]) - max(top, box[0]))
            wide = max(0.0, min(end, box[3]) - max(left, box[2]))
            within.append(high * wide / ((bottom - top) * (end - left)))
            inside = mask[
                round(top) : max(round(bottom), round(top) + 1), round(left) : max(round(end), round(left) + 1)
            ]
            hidden.append(1 - float(inside.float().mean()))
    area, gone = torch.cat(crops), torch.cat(drops)
    print(f"{len(images)} images of split {options.split}, at {side} px")
    print(f"crop: mean {area.mean():.0%} of the image, median {area.median():.0%}; {(area > 0.9).float().mean():.0%}")
    print(f"      of the crops are more than 90 % of it; drop: mean {gone.mean():.0%} removed")
    if within:
        part = np.array(within)
        size = np.mean([(b - t) * (r - s) for t, b, s, r in subjects]) / side**2
        print(
            f"subject: mean {size:.0%} of the image; {part.mean():.0%} of it is in the crop on average, and all but a"
        )
        print(f"      tenth in {np.mean(part > 0.9):.0%} of the crops; the drop removes {np.mean(hidden):.0%} of it")
    print("teacher top-1: " + ", ".join(f"{name} {count / len(images):.1%}" for name, count in right.items()))


if __name__ == "__main__":
    main()
