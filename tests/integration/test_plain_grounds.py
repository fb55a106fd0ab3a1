"""Images on plain grounds look alike to a hash: icons, letters, pages of text and small drawings. None may be lost."""

from __future__ import annotations

import math
import random
import string
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

import animesion

WORDS = [
    "of",
    "the",
    "leaf",
    "a",
    "cultivar",
    "grows",
    "in",
    "rows",
    "and",
    "was",
    "drawn",
    "by",
    "hand",
    "once",
    "more",
    "for",
    "every",
    "label",
    "that",
    "people",
    "gave",
    "it",
]


def page(seed: int) -> Image.Image:
    """Black text on white: words in random order, in a column with margins."""
    rng = random.Random(f"page/{seed}")
    image = Image.new("RGB", (248, 350), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(rng.choice((9, 10, 11)))
    for y in range(18, 325 - 40 * rng.randrange(3), 14):
        line = " ".join(rng.choice(WORDS) for _ in range(rng.choice((3, 7, 7, 7, 7))))
        pen.text((18, y), line[:38], fill="black", font=font)
    return image


def icon(seed: int) -> Image.Image:
    """A flat sign of two colours in a rounded square or a circle, as on a telephone."""
    rng = random.Random(f"icon/{seed}")
    image = Image.new("RGB", (96, 96), "white")
    pen = ImageDraw.Draw(image)
    ground = rng.choice(("#2d7dd2", "#d7263d", "#222222", "#3a9d5d", "#f4a300"))
    frame = (12, 12, 84, 84)
    if seed % 2:
        pen.ellipse(frame, fill=ground)
    else:
        pen.rounded_rectangle(frame, radius=16, fill=ground)
    centre, points = 48, rng.randrange(3, 8)
    for _ in range(rng.choice((1, 1, 2))):
        r, inner, turn = rng.randrange(14, 27), rng.uniform(0.35, 1.0), rng.uniform(0, math.tau)
        x, y = centre + rng.randrange(-8, 9), centre + rng.randrange(-8, 9)
        star = [
            (
                x + (r if i % 2 else inner * r) * math.cos(turn + i * math.pi / points),
                y + (r if i % 2 else inner * r) * math.sin(turn + i * math.pi / points),
            )
            for i in range(2 * points)
        ]
        pen.polygon(star, fill="white")
    if rng.random() < 0.5:
        pen.line((24, rng.randrange(24, 72), 72, rng.randrange(24, 72)), fill="white", width=rng.randrange(3, 7))
    return image


def letter(seed: int) -> Image.Image:
    """A character of a font in the middle of a white square."""
    image = Image.new("RGB", (128, 128), "white")
    text = (string.ascii_letters + string.digits + "#$%&?!@+=")[seed]
    ImageDraw.Draw(image).text((64, 64), text, fill=(30, 30, 30), font=ImageFont.load_default(64), anchor="mm")
    return image


def drawing(seed: int) -> Image.Image:
    """A small figure of outlines: a head, a body and four limbs, on much white."""
    rng = random.Random(f"drawing/{seed}")
    image = Image.new("RGB", (160, 160), "white")
    pen = ImageDraw.Draw(image)
    x, y, head = 80 + rng.randrange(-12, 13), 56 + rng.randrange(-8, 9), rng.randrange(9, 16)
    colour = rng.choice(((20, 20, 20), (150, 40, 40), (40, 60, 150), (40, 120, 60)))
    pen.ellipse((x - head, y - head, x + head, y + head), outline=colour, width=3)
    body = y + head + rng.randrange(24, 38)
    pen.line((x, y + head, x, body), fill=colour, width=3)
    for at in (y + head + 8, body):
        for side in (-1, 1):
            pen.line((x, at, x + side * rng.randrange(6, 26), at + rng.randrange(-16, 26)), fill=colour, width=3)
    for side in (-1, 1):
        pen.point((x + side * 4, y - 2), fill=colour)
    return image


def lost(root: Path, out: Path) -> list[tuple[str, str, str]]:
    """The name, reason and keeper of each image that a build of the folder does not keep."""
    recipe = animesion.load_recipe("folder", [f'source.path="{root}"', "duplicates.copies=local"])
    animesion.build(recipe, out, workers=1)
    rows = {row["key"]: row for row in pq.read_table(out / "curated.parquet").to_pylist()}
    dropped = [row for row in rows.values() if not row["kept"]]
    return [(row["source_id"], row["reason"], rows.get(row["keeper"], {}).get("source_id", "")) for row in dropped]


def drawn(root: Path, counts: dict[str, int]) -> None:
    """Images of each kind, in three classes in turn, so that a wrong duplicate would be a label conflict as well."""
    kinds = {"page": page, "icon": icon, "letter": letter, "drawing": drawing}
    for kind, count in counts.items():
        for seed in range(count):
            folder = root / "abc"[seed % 3]
            folder.mkdir(parents=True, exist_ok=True)
            kinds[kind](seed).save(folder / f"{kind}{seed}.png")


def test_no_image_on_a_plain_ground_is_lost_and_copies_are_found(tmp_path: Path) -> None:
    drawn(tmp_path / "in", {"page": 6, "icon": 16, "letter": 16, "drawing": 10})
    copies = {"a/page0", "c/letter2"}
    for name in copies:
        with Image.open(tmp_path / "in" / f"{name}.png") as image:
            image.save(tmp_path / "in" / f"{name}.jpg", quality=80)
    found = {frozenset((name, keeper)) for name, _, keeper in lost(tmp_path / "in", tmp_path / "out")}
    assert found == {frozenset((f"{name}.png", f"{name}.jpg")) for name in copies}


@pytest.mark.slow
def test_no_image_of_many_on_plain_grounds_is_lost(tmp_path: Path) -> None:
    drawn(tmp_path / "in", {"page": 40, "icon": 100, "letter": 71, "drawing": 60})
    assert not lost(tmp_path / "in", tmp_path / "out")
