"""Altered copies of images, for `near_duplicates.py`: what happens to images between two uploads."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

Alteration = Callable[[Image.Image, random.Random], Image.Image]


def encoded(image: Image.Image, extension: str, quality: int) -> Image.Image:
    """The image, encoded and decoded again."""
    out = io.BytesIO()
    image.save(out, extension, quality=quality)
    return Image.open(out).convert("RGB")


def recoded(kind: str, quality: int) -> Alteration:
    return lambda image, _: encoded(image, kind, quality)


def resized(scale: float) -> Alteration:
    """Scale both sides, with a filter that no hash uses."""

    def scaled(image: Image.Image, _: random.Random) -> Image.Image:
        size = (max(8, round(scale * image.width)), max(8, round(scale * image.height)))
        return image.resize(size, Image.Resampling.BICUBIC)

    return scaled


def cropped(share: float) -> Alteration:
    """Cut away a share of each side, divided randomly between both ends."""

    def cut(image: Image.Image, rng: random.Random) -> Image.Image:
        width, height = image.size
        off = [round(share * side) for side in (width, height)]
        left, top = rng.randint(0, off[0]), rng.randint(0, off[1])
        return image.crop((left, top, left + width - off[0], top + height - off[1]))

    return cut


def one_side(share: float) -> Alteration:
    """Cut a share from one of the four sides."""

    def cut(image: Image.Image, rng: random.Random) -> Image.Image:
        box = [0, 0, *image.size]
        side = rng.randrange(4)
        off = round(share * image.size[side % 2])
        box[side] += off if side < 2 else -off
        return image.crop((box[0], box[1], box[2], box[3]))

    return cut


def bordered(share: float, colour: tuple[int, int, int]) -> Alteration:
    return lambda image, _: ImageOps.expand(image, max(1, round(share * image.width)), colour)


def captioned(image: Image.Image, rng: random.Random) -> Image.Image:
    """A bar of 18 % below the image, with a line of text."""
    bar, ink = rng.choice((("white", "black"), ("black", "white")))
    height = round(0.18 * image.height)
    taller = ImageOps.expand(image, (0, 0, 0, height), bar)
    ImageDraw.Draw(taller).text((4, image.height + 3), "when you see it", fill=ink, font_size=max(8, height // 2))
    return taller


def turned(degrees: float) -> Alteration:
    return lambda image, _: image.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255))


def with_sticker(share: float) -> Alteration:
    """A disc with a word that covers a share of the area."""

    def covered(image: Image.Image, rng: random.Random) -> Image.Image:
        image = image.copy()
        side = round((share * image.width * image.height * 4 / np.pi) ** 0.5)
        x, y = rng.randrange(max(1, image.width - side)), rng.randrange(max(1, image.height - side))
        pen = ImageDraw.Draw(image)
        colour = tuple(rng.randrange(256) for _ in range(3))
        pen.ellipse((x, y, x + side, y + side), fill=colour, outline=(0, 0, 0), width=2)
        pen.text((x + 0.2 * side, y + 0.3 * side), "wow", fill=(255, 255, 255), font_size=max(8, side // 3))
        return image

    return covered


def marked(image: Image.Image, _: random.Random) -> Image.Image:
    """The image with semi-transparent text in a corner."""
    layer = Image.new("RGBA", image.size)
    at = (0.45 * image.width, 0.85 * image.height)
    ImageDraw.Draw(layer).text(at, "example.art", fill=(255, 255, 255, 150), font_size=max(9, image.height // 12))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def tiled(image: Image.Image, _: random.Random) -> Image.Image:
    """A translucent word, tiled over the image."""
    layer = Image.new("RGBA", image.size)
    pen, step = ImageDraw.Draw(layer), max(8, image.height // 5)
    for row, y in enumerate(range(0, image.height, step)):
        for x in range(-20 * (row % 2), image.width, max(20, image.width // 3)):
            pen.text((x, y), "SAMPLE", fill=(255, 255, 255, 110), font_size=max(8, image.height // 12))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def brightened(factor: float) -> Alteration:
    return lambda image, _: ImageEnhance.Brightness(image).enhance(factor)


def contrasted(factor: float) -> Alteration:
    return lambda image, _: ImageEnhance.Contrast(image).enhance(factor)


def both(first: Alteration, second: Alteration) -> Alteration:
    """One alteration after another."""
    return lambda image, rng: second(first(image, rng), rng)


ALTERATIONS: dict[str, Alteration] = {
    **{f"crop {share}%": cropped(share / 100) for share in (2, 5, 10, 20, 30)},
    "side 10%": one_side(0.1),
    "border 2%": bordered(0.02, (0, 0, 0)),
    "border 5%": bordered(0.05, (255, 255, 255)),
    "border 10%": bordered(0.1, (0, 0, 0)),
    "caption bar 18%": captioned,
    "flip": lambda image, _: ImageOps.mirror(image),
    "flip, crop 10%": both(cropped(0.1), lambda image, _: ImageOps.mirror(image)),
    **{f"turn {degrees}": turned(degrees) for degrees in (90, 180, 270, 30, -30)},
    "sticker 12%": with_sticker(0.12),
    "tiled watermark": tiled,
    "brightness +25%": brightened(1.25),
    "brightness -25%": brightened(0.75),
    "contrast +25%": contrasted(1.25),
    "contrast -25%": contrasted(0.75),
    "crop 10%, half, JPEG 50": both(both(cropped(0.1), resized(0.5)), recoded("JPEG", 50)),
    "half, JPEG 50": both(resized(0.5), recoded("JPEG", 50)),
    "JPEG 30": recoded("JPEG", 30),
    "resize 0.5": resized(0.5),
    "resize 2": resized(2.0),
    "watermark": marked,
    "turn 15": turned(15),
    "sticker 6%": with_sticker(0.06),
}
