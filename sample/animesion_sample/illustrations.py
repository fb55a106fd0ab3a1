"""Labelled drawings and grounds, for the training of a face detector.

    python -m animesion_sample.illustrations --out DIR [--images 200] [--grounds 400] [--faces 500]
        [--leave-out sky lantern]

The folder gets `images/`, `grounds/`, `faces/` and `labels.csv`, which `animesion train-detector` reads.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from pathlib import Path
from random import Random

from PIL import Image

from animesion_sample.characters import CAST
from animesion_sample.drawing import Drawing, heads, render, scene
from animesion_sample.scenes import SCENES, foreground, still_life

HEAD_SHARE = 0.87
"""Side of a labelled face as a share of the head's box, which includes the hair."""

_SIZES = ((360, 280), (320, 320), (280, 380), (480, 360))


def drawings(count: int, left_out: frozenset[str] = frozenset()) -> list[Drawing]:
    """The first drawings without the grounds that are left out; most show characters that are not in the cast."""
    found: list[Drawing] = []
    number = 0
    while len(found) < count:
        rng = Random(f"illustrations/{number}")
        number += 1
        cast = tuple(rng.choice(CAST).name if rng.random() < 0.4 else "" for _ in range(rng.choice((1, 1, 2))))
        drawing = Drawing(f"illustrations/{number}", cast, *rng.choice(_SIZES))
        if scene(drawing) not in left_out:
            found.append(drawing)
    return found


def ground(number: int, left_out: frozenset[str] = frozenset()) -> Image.Image:
    """A scene without a face, now and then with an object."""
    rng = Random(f"grounds/{number}")
    image = SCENES[rng.choice([name for name in sorted(SCENES) if name not in left_out])](rng.choice(_SIZES), rng)
    image = image.convert("RGB")
    if rng.random() < 0.25:
        still_life(image, rng)
    if rng.random() < 0.5:
        foreground(image, rng)
    return image


def face(number: int, left_out: frozenset[str] = frozenset()) -> Image.Image:
    """A square of 128 pixels around the head of a character, who is mostly not in the cast."""
    rng = Random(f"faces/{number}")
    name = rng.choice(CAST).name if rng.random() < 0.3 else ""
    drawing = Drawing(f"faces/{number}", (name,), 200, 200)
    while scene(drawing) in left_out:
        drawing = Drawing(f"{drawing.seed}+", (name,), 200, 200)
    [head] = heads(drawing)
    left, top, right, bottom = (200 * share for share in head.box)
    half = 0.53 * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    return render(drawing).resize((128, 128), Image.Resampling.BICUBIC, _inside(x - half, y - half, x + half, y + half))


def _inside(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    return max(0.0, left), max(0.0, top), min(200.0, right), min(200.0, bottom)


def write(out: Path, images: int, grounds: int, faces: int = 0, left_out: frozenset[str] = frozenset()) -> None:
    """Write the folder.

    Args:
        out: the folder.
        images: number of drawings.
        grounds: number of grounds.
        faces: number of crops of heads.
        left_out: names of scenes that are not drawn, to be tested on.
    """
    for name in ("images", "grounds", "faces"):
        (out / name).mkdir(parents=True, exist_ok=True)
    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("sha256", "width", "height", "left", "top", "right", "bottom", "kind", "flags"))
        for number, drawing in enumerate(drawings(images, left_out)):
            content = _jpeg(render(drawing))
            (out / "images" / f"{number}.jpg").write_bytes(content)
            for head in heads(drawing):
                left, top, right, bottom = head.box
                x, y = (left + right) / 2, (top + bottom) / 2
                wide, high = (right - left) * HEAD_SHARE / 2, (bottom - top) * HEAD_SHARE / 2
                corners = (
                    round((x - wide) * drawing.width, 1), round((y - high) * drawing.height, 1),
                    round((x + wide) * drawing.width, 1), round((y + high) * drawing.height, 1),
                )  # fmt: skip
                digest = hashlib.sha256(content).hexdigest()
                rows.writerow((digest, drawing.width, drawing.height, *corners, "face", ""))
    for number in range(grounds):
        (out / "grounds" / f"{number}.jpg").write_bytes(_jpeg(ground(number, left_out)))
    for number in range(faces):
        (out / "faces" / f"{number}.jpg").write_bytes(_jpeg(face(number, left_out)))


def _jpeg(image: Image.Image) -> bytes:
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=90)
    return packed.getvalue()


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--grounds", type=int, default=400)
    parser.add_argument("--faces", type=int, default=500)
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="SCENE", choices=sorted(SCENES))
    given = parser.parse_args()
    write(given.out, given.images, given.grounds, given.faces, frozenset(given.leave_out))


if __name__ == "__main__":
    main()
