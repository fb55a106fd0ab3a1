"""Backgrounds (skies, rooms, seasons and patterns) with random details, and still lifes without a face."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from random import Random

from PIL import Image, ImageDraw

from animesion_sample.shapes import WHITE, Colour, darker, lighter, mix, oval, smooth, star


def hue(h: float, s: float, v: float) -> Colour:
    """A colour from hue, saturation and value, each 0 to 1."""
    r, g, b = colorsys.hsv_to_rgb(h % 1.0, s, v)
    return (round(255 * r), round(255 * g), round(255 * b))


def gradient(size: tuple[int, int], stops: Sequence[Colour]) -> Image.Image:
    """A vertical gradient through the colours."""
    strip = Image.new("RGB", (1, len(stops)))
    strip.putdata(list(stops))
    tall = strip.resize((1, size[1]), Image.Resampling.BILINEAR)
    return tall.resize(size, Image.Resampling.NEAREST)


class _Scene:
    """A canvas: the image, its two pens, and its size in pixels."""

    def __init__(self, size: tuple[int, int], stops: Sequence[Colour]) -> None:
        self.image = gradient(size, stops)
        self.draw = ImageDraw.Draw(self.image)
        self.sheer = ImageDraw.Draw(self.image, "RGBA")
        self.w, self.h = size
        self.u = min(size) / 100

    def dot(self, x: float, y: float, r: float, colour: Colour, alpha: float = 1.0) -> None:
        box = (x - r, y - r, x + r, y + r)
        if alpha >= 1:
            self.draw.ellipse(box, fill=colour)
        else:
            self.sheer.ellipse(box, fill=(*colour, round(255 * alpha)))

    def cloud(self, x: float, y: float, r: float, colour: Colour) -> None:
        for dx, dy, k in ((-1.3, 0.2, 0.6), (-0.6, -0.1, 0.85), (0.2, -0.3, 1.0), (0.9, 0.0, 0.75), (1.5, 0.25, 0.5)):
            self.dot(x + dx * r, y + dy * r, k * r, colour)


def _sky(size: tuple[int, int], rng: Random) -> Image.Image:
    tone = rng.uniform(0.53, 0.62)
    s = _Scene(size, (hue(tone, 0.72, 0.86), hue(tone, 0.4, 0.98), hue(tone, 0.12, 1.0)))
    for _ in range(rng.randint(3, 6)):
        x, y, r = rng.uniform(0, s.w), rng.uniform(0.1, 0.8) * s.h, rng.uniform(6, 13) * s.u
        s.cloud(x, y + 0.16 * r, r, (214, 230, 246))
        s.cloud(x, y, r, (252, 253, 255))
    if rng.random() < 0.5:
        for k in range(5):
            x = s.w * rng.uniform(0, 1)
            s.draw.line([(x, (8 + 3 * k) * s.u), (x + 3 * s.u, (9.5 + 3 * k) * s.u), (x + 6 * s.u, (8 + 3 * k) * s.u)],
                        fill=(70, 84, 110), width=max(1, round(0.7 * s.u)))  # fmt: skip
    return s.image


def _sunset(size: tuple[int, int], rng: Random) -> Image.Image:
    s = _Scene(size, (hue(0.74 + rng.uniform(-0.06, 0.05), 0.52, 0.62), hue(0.97, 0.5, 0.93), hue(0.08, 0.6, 1.0)))
    x, y = rng.uniform(0.15, 0.85) * s.w, rng.uniform(0.5, 0.78) * s.h
    for k, alpha in ((26, 0.16), (19, 0.22), (12, 1.0)):
        s.dot(x, y, k * s.u, (255, 240, 190), alpha)
    base = 0.82 * s.h
    left = 0.0
    while left < s.w:
        wide, high = rng.uniform(8, 18) * s.u, rng.uniform(4, 26) * s.u
        s.draw.rectangle((left, base - high, left + wide, s.h), fill=(88, 52, 96))
        for wx in range(2):
            for wy in range(2):
                if rng.random() < 0.5:
                    px, py = left + (0.25 + 0.4 * wx) * wide, base - high + (3 + 6 * wy) * s.u
                    s.draw.rectangle((px, py, px + 1.8 * s.u, py + 2.6 * s.u), fill=(255, 206, 120))
        left += wide
    return s.image


def _night(size: tuple[int, int], rng: Random) -> Image.Image:
    tone = rng.uniform(0.6, 0.76)
    s = _Scene(size, (hue(tone, 0.75, 0.2), hue(tone, 0.66, 0.4), hue(tone + 0.06, 0.5, 0.62)))
    for _ in range(46):
        s.dot(rng.uniform(0, s.w), rng.uniform(0, s.h), rng.uniform(0.25, 0.8) * s.u, (250, 246, 214))
    x, y, r = rng.uniform(0.1, 0.9) * s.w, rng.uniform(0.1, 0.3) * s.h, rng.uniform(7, 13) * s.u
    s.dot(x, y, r * 1.7, (255, 250, 214), 0.16)
    s.dot(x, y, r, (255, 248, 212))
    if rng.random() < 0.5:
        s.dot(x + 0.4 * r, y - 0.2 * r, r * 0.86, hue(tone, 0.7, 0.32))
    return s.image


def _sakura(size: tuple[int, int], rng: Random) -> Image.Image:
    s = _Scene(size, (hue(0.56, 0.3, 0.97), hue(0.94, 0.14, 1.0), hue(0.94, 0.26, 1.0)))
    bark: Colour = (120, 84, 84)
    side = rng.choice((-1, 1))
    y = rng.uniform(0.05, 0.3) * s.h
    start = 0 if side > 0 else s.w
    s.draw.line([(start, y), (start + side * 0.4 * s.w, y + 6 * s.u), (start + side * 0.8 * s.w, y - 4 * s.u)],
                fill=bark, width=round(3.4 * s.u))  # fmt: skip
    for _ in range(26):
        t = rng.uniform(0, 0.9)
        x, py = start + side * t * s.w, y + rng.gauss(0, 6) * s.u
        s.dot(x, py, rng.uniform(3, 6) * s.u, hue(0.94, rng.uniform(0.12, 0.4), 1.0))
    for _ in range(26):
        x, py, r = rng.uniform(0, s.w), rng.uniform(0, s.h), rng.uniform(0.9, 2.0) * s.u
        lean = rng.uniform(-1, 1)
        s.draw.polygon(
            [(x - r, py), (x, py - r * 0.7), (x + r, py + lean * r), (x, py + r * 0.7)], fill=(255, 174, 200)
        )
    return s.image


def _room(size: tuple[int, int], rng: Random) -> Image.Image:
    wall = hue(rng.random(), rng.uniform(0.12, 0.34), rng.uniform(0.72, 0.95))
    s = _Scene(size, (lighter(wall, 0.15), wall, darker(wall, 0.12)))
    for k in range(12):
        x = k * s.w / 11
        s.draw.line([(x, 0), (x, s.h)], fill=mix(wall, darker(wall, 0.2), 0.4), width=max(1, round(0.6 * s.u)))
    x, y, w, h = rng.uniform(-0.1, 0.6) * s.w, rng.uniform(0.05, 0.2) * s.h, 38 * s.u, 46 * s.u
    view = hue(rng.choice((0.55, 0.58, 0.08, 0.68)), 0.4, rng.uniform(0.5, 1.0))
    s.draw.rectangle((x - 2 * s.u, y - 2 * s.u, x + w + 2 * s.u, y + h + 2 * s.u), fill=(250, 244, 234))
    s.draw.rectangle((x, y, x + w, y + h), fill=view)
    s.draw.polygon([(x, y + h), (x + 0.5 * w, y), (x + 0.8 * w, y), (x + 0.2 * w, y + h)], fill=lighter(view, 0.35))
    s.draw.line([(x + w / 2, y), (x + w / 2, y + h)], fill=(250, 244, 234), width=round(1.6 * s.u))
    s.draw.line([(x, y + h / 2), (x + w, y + h / 2)], fill=(250, 244, 234), width=round(1.6 * s.u))
    curtain = hue(rng.random(), 0.42, 0.86)
    for k in range(4):
        px = x + w + (2 + 5 * k) * s.u
        s.draw.rectangle((px, 0, px + 5 * s.u, y + h + 16 * s.u), fill=darker(curtain, 0.12 * (k % 2)))
    s.draw.rectangle((0, s.h * 0.84, s.w, s.h), fill=darker(mix(wall, (170, 110, 70), 0.7), 0.1))
    return s.image


def _classroom(size: tuple[int, int], rng: Random) -> Image.Image:
    s = _Scene(size, ((246, 236, 214), (236, 220, 190)))
    y = rng.uniform(0.05, 0.2) * s.h
    board = hue(0.42, rng.uniform(0.35, 0.5), rng.uniform(0.34, 0.46))
    s.draw.rectangle((4 * s.u, y - 2 * s.u, s.w - 4 * s.u, y + 54 * s.u), fill=(170, 122, 84))
    s.draw.rectangle((6 * s.u, y, s.w - 6 * s.u, y + 52 * s.u), fill=board)
    chalk = lighter(board, 0.7)
    for _ in range(rng.randint(4, 8)):
        x, py = rng.uniform(0.08, 0.8) * s.w, y + rng.uniform(5, 46) * s.u
        kind = rng.randrange(3)
        width = max(1, round(0.8 * s.u))
        if kind == 0:
            s.draw.line([(x, py), (x + rng.uniform(8, 22) * s.u, py)], fill=chalk, width=width)
        elif kind == 1:
            s.draw.ellipse((x, py, x + 9 * s.u, py + 9 * s.u), outline=chalk, width=width)
        else:
            s.draw.polygon(star(x, py, 5 * s.u, 2 * s.u), outline=chalk)
    s.draw.rectangle((0, s.h * 0.8, s.w, s.h), fill=(196, 148, 104))
    return s.image


def _beach(size: tuple[int, int], rng: Random) -> Image.Image:
    s = _Scene(size, (hue(0.56, 0.55, 0.95), hue(0.53, 0.28, 1.0), hue(0.5, 0.2, 1.0)))
    horizon = rng.uniform(0.42, 0.6) * s.h
    s.draw.rectangle((0, horizon, s.w, s.h), fill=hue(0.52, 0.68, rng.uniform(0.68, 0.86)))
    for _ in range(12):
        x, y = rng.uniform(0, s.w), horizon + rng.uniform(2, 22) * s.u
        s.draw.line([(x, y), (x + rng.uniform(5, 14) * s.u, y)], fill=(206, 244, 246), width=max(1, round(0.8 * s.u)))
    shore = horizon + 24 * s.u
    edge = [(s.w * k / 8, shore + rng.uniform(-2.5, 2.5) * s.u) for k in range(9)]
    s.draw.polygon([*((x, y - 2.4 * s.u) for x, y in edge), (s.w, s.h), (0, s.h)], fill=WHITE)
    s.draw.polygon([*edge, (s.w, s.h), (0, s.h)], fill=(248, 226, 178))
    s.cloud(rng.uniform(0, s.w), horizon - 14 * s.u, rng.uniform(6, 11) * s.u, WHITE)
    return s.image


def _forest(size: tuple[int, int], rng: Random) -> Image.Image:
    tone = rng.uniform(0.24, 0.4)
    s = _Scene(size, (hue(tone - 0.08, 0.3, 0.96), hue(tone, 0.45, 0.76), hue(tone, 0.6, 0.5)))
    for layer in range(2):
        for _ in range(5):
            x, w = rng.uniform(0, s.w), rng.uniform(3, 7) * s.u
            s.draw.rectangle((x, 0, x + w, s.h), fill=mix((96, 72, 60), hue(tone, 0.4, 0.7), 0.55 - 0.4 * layer))
        for _ in range(14):
            x, y = rng.uniform(0, s.w), rng.uniform(-0.05, 0.3) * s.h
            s.dot(x, y, rng.uniform(6, 12) * s.u, hue(tone + rng.uniform(-0.05, 0.05), 0.6, rng.uniform(0.45, 0.8)))
    for _ in range(5):
        x = rng.uniform(0, s.w)
        s.sheer.polygon([(x, 0), (x + 8 * s.u, 0), (x - 20 * s.u, s.h), (x - 40 * s.u, s.h)], fill=(255, 255, 210, 44))
    return s.image


def _snow(size: tuple[int, int], rng: Random) -> Image.Image:
    tone = rng.uniform(0.56, 0.66)
    s = _Scene(size, (hue(tone, 0.34, 0.66), hue(tone, 0.2, 0.86), hue(tone, 0.06, 0.98)))
    for _ in range(4):
        x, base, r = rng.uniform(0, s.w), s.h * rng.uniform(0.7, 0.95), rng.uniform(10, 20) * s.u
        for k in range(3):
            top = base - (k + 1.7) * r * 0.62
            s.draw.polygon([(x, top), (x - r * (1 - 0.2 * k), top + r), (x + r * (1 - 0.2 * k), top + r)],
                           fill=mix((84, 128, 130), WHITE, 0.2 + 0.16 * k))  # fmt: skip
    for _ in range(50):
        s.dot(rng.uniform(0, s.w), rng.uniform(0, s.h), rng.uniform(0.5, 1.6) * s.u, WHITE)
    return s.image


def _bokeh(size: tuple[int, int], rng: Random) -> Image.Image:
    tone = rng.random()
    s = _Scene(size, (hue(tone, 0.5, rng.uniform(0.3, 0.6)), hue(tone + 0.1, 0.5, rng.uniform(0.5, 0.9))))
    for _ in range(18):
        colour = hue(tone + rng.uniform(-0.15, 0.25), 0.4, 1.0)
        s.dot(rng.uniform(0, s.w), rng.uniform(0, s.h), rng.uniform(3, 11) * s.u, colour, rng.uniform(0.15, 0.45))
    return s.image


def _pattern(size: tuple[int, int], rng: Random) -> Image.Image:
    tone, value = rng.random(), rng.uniform(0.6, 1.0)
    base = hue(tone, rng.uniform(0.2, 0.6), value)
    other = lighter(base, 0.3) if rng.random() < 0.6 else hue(tone + rng.choice((0.33, 0.5, 0.1)), 0.4, value)
    s = _Scene(size, (base, mix(base, other, 0.25)))
    kind, step = rng.randrange(6), rng.uniform(10, 20) * s.u
    if kind == 0:
        for k in range(int((s.w + s.h) / step) + 1):
            x = k * step - s.h
            s.draw.polygon([(x, s.h), (x + step / 2, s.h), (x + step / 2 + s.h, 0), (x + s.h, 0)], fill=other)
    elif kind == 1:
        for k in range(16):
            a, b = 2 * math.pi * k / 16, 2 * math.pi * (k + 0.5) / 16
            reach, cx, cy = 2 * max(s.w, s.h), s.w / 2, s.h / 2
            s.draw.polygon([(cx, cy), (cx + reach * math.cos(a), cy + reach * math.sin(a)),
                            (cx + reach * math.cos(b), cy + reach * math.sin(b))], fill=other)  # fmt: skip
    else:
        rise = step / 2 if kind == 4 else step * 0.8
        for row in range(int((s.h + step) / rise) + 1):
            for column in range(int((s.w + step) / step) + 1):
                x, y = step * (column + row % 2 / 2), rise * row
                if kind == 2:
                    s.dot(x, y, step * 0.24, other)
                elif kind == 3:
                    s.draw.polygon(star(x, y, step * 0.36, step * 0.15), fill=other)
                elif kind == 4 and row % 2 == 0:
                    s.draw.rectangle((x, y, x + step / 2, y + step / 2), fill=other)
                else:
                    r = step * 0.2
                    s.dot(x - r / 2, y, r / 1.6, other)
                    s.dot(x + r / 2, y, r / 1.6, other)
                    s.draw.polygon([(x - r, y + r / 4), (x + r, y + r / 4), (x, y + 1.4 * r)], fill=other)
    return s.image


def _plain(size: tuple[int, int], rng: Random) -> Image.Image:
    tone = rng.random()
    top, low = hue(tone, rng.uniform(0, 0.35), rng.uniform(0.55, 1.0)), hue(tone + rng.uniform(0.05, 0.3), 0.3, 0.95)
    s = _Scene(size, (top, low))
    if rng.random() < 0.5:
        x = rng.uniform(0.2, 0.8) * s.w
        s.dot(x, rng.uniform(0.3, 0.6) * s.h, rng.uniform(28, 44) * s.u, lighter(low, 0.35))
    return s.image


def _rain(size: tuple[int, int], rng: Random) -> Image.Image:
    tone = rng.uniform(0.55, 0.64)
    s = _Scene(size, (hue(tone, 0.22, 0.46), hue(tone, 0.2, 0.66), hue(tone, 0.16, 0.74)))
    for _ in range(50):
        x, y, k = rng.uniform(0, s.w * 1.1), rng.uniform(-0.1, 1) * s.h, rng.uniform(4, 10) * s.u
        s.draw.line([(x, y), (x - 0.3 * k, y + k)], fill=(206, 222, 236), width=max(1, round(0.5 * s.u)))
    return s.image


def _festival(size: tuple[int, int], rng: Random) -> Image.Image:
    s = _Scene(size, (hue(0.66, 0.6, 0.22), hue(0.75, 0.5, 0.36), hue(0.95, 0.5, 0.5)))
    for _ in range(2):
        x, y = rng.uniform(0, s.w), rng.uniform(0.05, 0.4) * s.h
        spark = hue(rng.random(), 0.5, 1.0)
        for k in range(16):
            a, r = 2 * math.pi * k / 16, rng.uniform(9, 18) * s.u
            dx, dy = r * math.cos(a), r * math.sin(a)
            s.draw.line([(x + 0.3 * dx, y + 0.3 * dy), (x + dx, y + dy)], fill=spark, width=max(1, round(0.8 * s.u)))
    for k in range(6):
        x, y = (k + rng.uniform(0.2, 0.8)) * s.w / 6, rng.uniform(0.3, 0.75) * s.h
        s.dot(x, y, 10 * s.u, (255, 190, 110), 0.2)
        s.draw.ellipse((x - 5 * s.u, y - 6 * s.u, x + 5 * s.u, y + 6 * s.u), fill=(240, 92, 62))
        s.draw.rectangle((x - 2.5 * s.u, y - 7 * s.u, x + 2.5 * s.u, y - 5.5 * s.u), fill=(70, 40, 40))
    return s.image


SCENES: dict[str, Callable[[tuple[int, int], Random], Image.Image]] = {
    "sky": _sky, "sunset": _sunset, "night_sky": _night, "cherry_blossoms": _sakura, "indoors": _room,
    "classroom": _classroom, "beach": _beach, "forest": _forest, "snow": _snow, "bokeh": _bokeh,
    "patterned_background": _pattern, "gradient_background": _plain, "rain": _rain, "lantern": _festival,
}  # fmt: skip


def foreground(image: Image.Image, rng: Random) -> None:
    """Draw the foreground: petals, snow, sparkles, bubbles, a light leak, or often nothing."""
    draw, (w, h) = ImageDraw.Draw(image, "RGBA"), image.size
    u, kind = min(w, h) / 100, rng.randrange(8)
    count = {0: 14, 1: 22, 2: 9, 3: 8}.get(kind, 0)
    colour = hue(rng.random(), 0.25, 1.0)
    for _ in range(count):
        x, y, r = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(1.2, 3.0) * u
        if kind == 0:
            lean = rng.uniform(-1, 1)
            draw.polygon([(x - r, y), (x, y - 0.7 * r), (x + r, y + lean * r), (x, y + 0.7 * r)], fill=(*colour, 235))
        elif kind == 1:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255, 200))
        elif kind == 2:
            draw.polygon(star(x, y, 2.2 * r, 0.5 * r, 4), fill=(255, 252, 226, 225))
        else:
            draw.ellipse((x - 3 * r, y - 3 * r, x + 3 * r, y + 3 * r), fill=(*colour, 60), outline=(255, 255, 255, 170))
    if kind in (4, 5):
        x, y = rng.choice((0.0, w / 2, float(w))), rng.uniform(0, 0.4) * h
        for r in (30, 46, 62):
            r *= u
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(*colour, 34))


def still_life(image: Image.Image, rng: Random) -> str:
    """Draw an object without a face (an apple, an umbrella, a kite or a cup) and return its tag."""
    draw = ImageDraw.Draw(image)
    w, h = image.size
    u = min(w, h) / 100
    x, y, r = rng.uniform(0.35, 0.65) * w, rng.uniform(0.45, 0.65) * h, rng.uniform(14, 24) * u
    colour = hue(rng.random(), 0.65, 0.9)
    thing = rng.choice(("apple", "umbrella", "kite", "cup"))
    line = darker(colour, 0.6)
    if thing == "apple":
        outline = smooth([(x, y - 0.7 * r), (x + r, y - r), (x + 1.1 * r, y), (x + 0.4 * r, y + r),
                          (x - 0.4 * r, y + r), (x - 1.1 * r, y), (x - r, y - r)], steps=5)  # fmt: skip
        draw.polygon(outline, fill=colour, outline=line)
        draw.line([(x, y - 0.7 * r), (x + 0.2 * r, y - 1.4 * r)], fill=(96, 66, 52), width=round(2 * u))
        draw.polygon(oval(x + 0.55 * r, y - 1.3 * r, 0.4 * r, 0.18 * r), fill=(110, 180, 90))
    elif thing == "umbrella":
        draw.line([(x, y - r), (x, y + 1.4 * r)], fill=(96, 66, 52), width=round(2 * u))
        for k in range(5):
            draw.pieslice((x - 1.6 * r, y - 1.6 * r, x + 1.6 * r, y + 1.6 * r), 180 + 36 * k, 216 + 36 * k,
                          fill=lighter(colour, 0.4 * (k % 2)))  # fmt: skip
    elif thing == "kite":
        corners = [(x, y - 1.5 * r), (x + r, y), (x, y + 1.7 * r), (x - r, y)]
        for k in range(4):
            draw.polygon([(x, y), corners[k], corners[(k + 1) % 4]], fill=lighter(colour, 0.45 * (k % 2)))
        draw.line([(x, y + 1.7 * r), (x - r, y + 2.6 * r), (x + 0.4 * r, y + 3.4 * r)], fill=line, width=round(u))
    else:
        draw.rounded_rectangle((x - r, y - 0.8 * r, x + r, y + r), radius=0.4 * r, fill=colour)
        draw.ellipse((x + 0.7 * r, y - 0.5 * r, x + 1.6 * r, y + 0.5 * r), outline=colour, width=round(4 * u))
        draw.ellipse((x - r, y - r, x + r, y - 0.6 * r), fill=(92, 60, 44))
    return thing
