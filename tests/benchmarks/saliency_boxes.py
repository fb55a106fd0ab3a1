"""Where maps of `animesion explain` point, on real faces pasted at known places into illustrations.

    python tests/benchmarks/saliency_boxes.py make FACES SCENES OUT [--classes ame,gura,...] [--copies 2]
    animesion train --data OUT --model resnet18 --img-size 64 ... --out RUN
    python tests/benchmarks/saliency_boxes.py measure RUN/best.safetensors OUT [--most 500] [--layers] [--no-curves]

FACES has a folder of face crops per character, SCENES folders of illustrations of other characters. A face covers 10 to
25 % of a scene, at a uniformly random place. Faces of one post are in one split.

Of the test images that the network names correctly, `measure` prints for each method, with 95 % intervals of the mean:

- pointing: share of maps whose maximum is in the box (Zhang et al., IJCV 2018)
- energy: share of the map's sum inside the box (Wang et al., CVPRW 2020)
- deletion, insertion: area under the probability of the class while pixels are blurred, or restored, from the largest
  value of the map down (Petsiuk et al., BMVC 2018); small and large is good

beside three maps that do not look at the image: a Gaussian at the centre, random noise, and a uniform one.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 128
CLASSES = "ame,calli,gura,kiara"
STEPS = 8


def number(text: str) -> int:
    """A number that a text always has."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def make(faces: Path, scenes: Path, out: Path, classes: list[str], copies: int) -> None:
    """Write `OUT/<split>/<class>/*.jpg` and `OUT/boxes.csv`: path, left, top, right, bottom as shares of the side."""
    backgrounds = sorted(scenes.rglob("*.jpg"))
    rows = []
    for name in classes:
        for path in sorted((faces / name).glob("*.jpg")):
            post = path.stem.rpartition("-")[0]
            place = number(post) % 10
            split = "test" if place == 0 else "val" if place == 1 else "train"
            for copy in range(copies if split == "train" else 1):
                rng = np.random.default_rng(number(f"{name} {path.name} {copy}"))
                # backgrounds of the test scenes are in no other split
                mine = [each for each in backgrounds if (number(each.name) % 5 == 0) == (split == "test")]
                with Image.open(mine[rng.integers(len(mine))]) as file:
                    scene = file.convert("RGB")
                side = int(rng.integers(SIDE, min(scene.size) + 1))
                left, top = (int(rng.integers(0, length - side + 1)) for length in scene.size)
                canvas = scene.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                width = round(SIDE * float(rng.uniform(0.1, 0.25)) ** 0.5)
                with Image.open(path) as file:
                    face = file.convert("RGB").resize((width, width), Image.Resampling.BICUBIC)
                x, y = (int(each) for each in rng.integers(0, SIDE - width + 1, 2))
                canvas.paste(face, (x, y))
                target = Path(split) / name / f"{path.stem}-{copy}.jpg"
                (out / target).parent.mkdir(parents=True, exist_ok=True)
                canvas.save(out / target, quality=92)
                rows.append([str(target), *(each / SIDE for each in (x, y, x + width, y + width))])
    with (out / "boxes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    print(f"{len(rows):,} scenes of {len(classes)} characters in {out}")


def boxes_of(out: Path) -> dict[str, tuple[float, ...]]:
    """Box of each scene by path."""
    with (out / "boxes.csv").open(newline="", encoding="utf-8") as file:
        return {row[0]: tuple(float(each) for each in row[1:]) for row in csv.reader(file)}


def curves(model: Any, x: Any, order: Any, target: int) -> tuple[float, float]:
    """Deletion and insertion AUC of an image (1, C, H, W) for pixels in an order (H W)."""
    import torch
    from torchvision.transforms.functional import gaussian_blur

    blurred = gaussian_blur(x, [11, 11], [5.0, 5.0])
    count = order.numel()
    ranks = torch.empty(count, dtype=torch.int64)
    ranks[order] = torch.arange(count)
    cuts = torch.linspace(0, count, STEPS + 1).long()
    first = (ranks[None] < cuts[:, None]).view(-1, 1, *x.shape[2:])  # (S, 1, H, W): what has been reached
    both = torch.cat([torch.where(first, blurred, x), torch.where(first, x, blurred)])
    with torch.inference_mode():
        values = model(both).softmax(1)[:, target]
    deletion, insertion = values.chunk(2)
    return float(torch.trapezoid(deletion, dx=1 / STEPS)), float(torch.trapezoid(insertion, dx=1 / STEPS))


@functools.lru_cache(maxsize=1)
def recorded(model: Any, x: Any, target: int) -> Any:
    """Feature maps of an image, and gradients of the score of a class; once for all maps of an image."""
    import torch

    from animesion_training.analysis.saliency import Recorded

    return Recorded(model, x, torch.tensor([target]))


def measure(weights: Path, out: Path, most: int, *, by_layer: bool, with_curves: bool) -> None:
    """Print the table."""
    import torch
    from torch.nn import functional

    from animesion_training.analysis import explain
    from animesion_training.analysis.saliency import Recorded
    from animesion_training.data import Augment, Resize
    from animesion_training.eval.pieces import decode_file
    from animesion_training.weights import load_model

    torch.manual_seed(0)
    model, card = load_model(weights)
    assert isinstance(card.img_size, int)
    size = card.img_size
    normalise = Augment.plain(card.mean, card.std)  # type: ignore[arg-type]
    axis = (torch.arange(size) + 0.5) / size - 0.5
    center = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 0.25**2))
    methods: dict[str, Callable[[Any, int], Any]] = {
        name: lambda x, target, name=name: explain.saliency_map(model, x, target, name)  # type: ignore[misc]
        for name in explain.available(model)
    }
    layers = Recorded(model, torch.randn(1, 3, size, size), None).maps if by_layer else {}
    for layer in layers:
        methods[f"gradcam {layer}"] = lambda x, target, layer=layer: recorded(model, x, target).grad_cam(layer)[0]  # type: ignore[misc]
        methods[f"layercam {layer}"] = lambda x, target, layer=layer: recorded(model, x, target).layer_cam(layer)[0]  # type: ignore[misc]
    methods |= {
        "centre": lambda x, target: center,
        "random": lambda x, target: torch.rand(8, 8),
        "uniform": lambda x, target: torch.ones(size, size),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in methods}
    boxes = boxes_of(out)
    names = sorted(name for name in boxes if name.startswith("test/"))
    names.sort(key=number)
    right = areas = 0.0
    for name in names[:most]:
        pixels = np.zeros((size, size, 3), dtype=np.uint8)
        assert not decode_file(out / name, pixels, Resize(size, card.crop_pct))
        x = normalise(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), torch.zeros(1, dtype=torch.int64))
        with torch.inference_mode():
            target = int(model(x).argmax())
        if card.classes[target] != name.split("/")[1]:
            continue
        right += 1
        left, top, far, bottom = (each * size for each in boxes[name])
        rows, columns = torch.arange(size)[:, None] + 0.5, torch.arange(size) + 0.5
        inside = (rows > top) & (rows < bottom) & (columns > left) & (columns < far)
        areas += float(inside.float().mean())
        for method, function in methods.items():
            values = function(x, target).clamp(min=0).float()
            large = functional.interpolate(values[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]
            # among equals, as in a uniform map, a random pixel
            tie = torch.rand(size * size)
            order = torch.from_numpy(np.lexsort((tie.numpy(), -large.flatten().numpy())))
            deletion, insertion = curves(model, x, order, target) if with_curves else (float("nan"), float("nan"))
            pointing = float(inside.flatten()[order[0]])
            energy = float((large * inside).sum() / large.sum().clamp(min=1e-12))
            found[method].append([pointing, energy, deletion, insertion])
    print(f"{int(right):,} of {len(names[:most]):,} test scenes are named correctly")
    print(f"a box covers {areas / right:.1%} of a scene")
    print(f"{'method':<22}{'pointing':>16}{'energy':>16}{'deletion':>16}{'insertion':>16}")
    for method, values in found.items():
        table = np.array(values)
        spread = 1.96 * table.std(0, ddof=1) / len(table) ** 0.5
        cells = "".join(f"{a:>9.3f} ±{b:.3f}" for a, b in zip(table.mean(0), spread, strict=True))
        print(f"{method:<22}{cells}")


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    making = parts.add_parser("make")
    for name in ("faces", "scenes", "out"):
        making.add_argument(name, type=Path)
    making.add_argument("--classes", default=CLASSES)
    making.add_argument("--copies", type=int, default=2)
    measuring = parts.add_parser("measure")
    for name in ("weights", "out"):
        measuring.add_argument(name, type=Path)
    measuring.add_argument("--most", type=int, default=500)
    measuring.add_argument("--no-curves", action="store_true", help="neither deletion nor insertion")
    measuring.add_argument("--layers", action="store_true", help="also the maps of each layer")
    arguments = parser.parse_args()
    if arguments.part == "make":
        make(arguments.faces, arguments.scenes, arguments.out, arguments.classes.split(","), arguments.copies)
    else:
        measure(
            arguments.weights,
            arguments.out,
            arguments.most,
            by_layer=arguments.layers,
            with_curves=not arguments.no_curves,
        )


if __name__ == "__main__":
    main()
