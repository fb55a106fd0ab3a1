"""Draw `docs/images/sample.jpg`, a contact sheet of the sample world: `python docs/make_images.py`.

`animesion_sample` draws all images; none of them is real data.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

from animesion_sample.world import SamplePost, World
from tests.sample_truth import truth

COLUMNS, ROWS = 8, 3
CELL = (150, 180)
GAP = 6

OUT = Path(__file__).parent / "images" / "sample.jpg"


def chosen(world: World) -> list[SamplePost]:
    """One ordinary kept post of each character, the most frequent characters first."""
    verdicts = truth(world)
    kept: dict[str, list[SamplePost]] = {}
    for post in world.posts:
        verdict = verdicts[post.id]
        if verdict.outcome == "kept" and not verdict.trouble:
            kept.setdefault(verdict.label, []).append(post)
    names = sorted(kept, key=lambda name: (-len(kept[name]), name))[: COLUMNS * ROWS]
    # not the first of each: neighbouring characters would then have posts of about the same date
    return [kept[name][(7 * place) % len(kept[name])] for place, name in enumerate(names)]


def cell(world: World, post: SamplePost) -> Image.Image:
    """The post's image, cropped to the cell's aspect ratio around the head."""
    with Image.open(io.BytesIO(world.file(post))) as file:
        drawing = ImageOps.exif_transpose(file).convert("RGB")
    left, top, right, bottom = world.faces(post)[0].box
    return ImageOps.fit(drawing, CELL, Image.Resampling.LANCZOS, centering=((left + right) / 2, (top + bottom) / 2))


def main() -> None:
    """Write the sheet."""
    world = World(3000)
    width, height = CELL
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, ROWS * (height + GAP) + GAP), "white")
    for place, post in enumerate(chosen(world)):
        row, column = divmod(place, COLUMNS)
        sheet.paste(cell(world, post), (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    OUT.parent.mkdir(exist_ok=True)
    sheet.save(OUT, quality=90, optimize=True)
    print(f"{OUT.name}: {sheet.width}x{sheet.height}, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
