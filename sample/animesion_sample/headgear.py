"""Pieces on the head: ears, horns, hats, ribbons, glasses and clips.

Each piece has a part behind the hair (animal ears, brims), a part in front, and an extent that counts for the head box.
"""

from __future__ import annotations

from collections.abc import Callable

from animesion_sample.characters import Design
from animesion_sample.shapes import (
    INK,
    WHITE,
    Colour,
    Pen,
    Point,
    arc,
    darker,
    lighter,
    mirrored,
    mix,
    oval,
    smooth,
    star,
)

_STEEL: Colour = (176, 184, 200)
_GOLD: Colour = (248, 208, 92)


def _ears(pen: Pen, design: Design, shape: list[Point], inner: list[Point]) -> None:
    line = darker(design.hair, 0.62)
    soft = (255, 190, 196)
    for flipped in (False, True):
        pen.fill(mirrored(shape) if flipped else shape, design.hair, line)
        pen.fill(mirrored(inner) if flipped else inner, soft)


def _cat_ears(pen: Pen, design: Design) -> None:
    _ears(pen, design, [(0.28, -1.05), (0.86, -1.62), (1.02, -0.6)], [(0.46, -1.02), (0.82, -1.42), (0.9, -0.76)])


def _fox_ears(pen: Pen, design: Design) -> None:
    _ears(pen, design, [(0.2, -1.02), (0.42, -1.5), (0.88, -1.9), (1.04, -1.3), (1.02, -0.6)],
          [(0.4, -1.0), (0.54, -1.42), (0.82, -1.68), (0.9, -1.2), (0.88, -0.8)])  # fmt: skip


def _rabbit_ears(pen: Pen, design: Design) -> None:
    ear = smooth([(0.2, -1.0), (0.16, -1.6), (0.4, -2.25), (0.68, -1.7), (0.6, -0.95)], steps=4)
    inner = smooth([(0.3, -1.1), (0.28, -1.6), (0.42, -2.05), (0.57, -1.65), (0.5, -1.05)], steps=4)
    _ears(pen, design, ear, inner)


def _horns(pen: Pen, design: Design) -> None:
    horn = smooth([(0.5, -0.9), (0.94, -1.15), (1.16, -1.7), (1.34, -1.1), (1.12, -0.62), (0.8, -0.56)], steps=4)
    for shape in (horn, mirrored(horn)):
        pen.fill(shape, (96, 70, 84), INK)
    for side in (-1.0, 1.0):
        pen.line([(side * 0.98, -1.0), (side * 1.24, -1.02)], (140, 106, 118), 0.04)


def _small_horns(pen: Pen, design: Design) -> None:
    horn = smooth([(0.34, -1.0), (0.46, -1.46), (0.7, -0.92)], steps=4)
    for shape in (horn, mirrored(horn)):
        pen.fill(shape, (226, 208, 180), INK, 0.028)


def _halo(pen: Pen, design: Design) -> None:
    pen.line(oval(0.0, -1.5, 0.66, 0.17), darker(_GOLD, 0.25), 0.12)
    pen.line([*oval(0.0, -1.5, 0.66, 0.17), (0.66, -1.5)], (255, 236, 150), 0.07)


def _bow_shape(pen: Pen, x: float, y: float, size: float, colour: Colour, lean: float = 0.0) -> None:
    line = darker(colour, 0.6)
    for side in (-1.0, 1.0):
        wing = [(x, y), (x + side * size, y - size * 0.6 + lean * side), (x + side * size * 0.95, y + size * 0.45)]
        pen.fill(smooth([wing[0], wing[1], (x + side * size * 1.12, y - 0.05), wing[2]], steps=3), colour, line, 0.03)
        pen.line([(x + side * size * 0.2, y), (x + side * size * 0.7, y - size * 0.1)], darker(colour, 0.3), 0.03)
    pen.fill(oval(x, y, size * 0.24, size * 0.28, 12), lighter(colour, 0.25), line, 0.03)


def _bow(pen: Pen, design: Design) -> None:
    _bow_shape(pen, 0.0, -1.18, 0.62, design.trim)


def _bows(pen: Pen, design: Design) -> None:
    for side in (-1.0, 1.0):
        _bow_shape(pen, side * 0.98, -0.56, 0.34, design.trim)


def _witch_hat(pen: Pen, design: Design) -> None:
    line = darker(design.cloth, 0.6)
    pen.fill(smooth([(-0.86, -0.84), (-0.5, -1.5), (0.1, -2.0), (0.62, -1.98), (0.5, -1.5), (0.86, -0.84)], steps=4),
             design.cloth, line)  # fmt: skip
    pen.fill(
        [*arc(0.0, -0.98, 0.86, 0.2, 180, 0, 10), *arc(0.0, -1.16, 0.76, 0.16, 0, 180, 10)], design.trim, line, 0.025
    )
    pen.fill(smooth([(-1.6, -0.62), (-0.8, -0.96), (0.0, -1.0), (0.8, -0.96), (1.6, -0.62), (0.8, -0.66), (0.0, -0.66),
                     (-0.8, -0.66)], steps=4), lighter(design.cloth, 0.08), line)  # fmt: skip
    pen.fill(star(0.4, -1.08, 0.2, 0.09), _GOLD, darker(_GOLD, 0.5), 0.025)


def _straw_hat(pen: Pen, design: Design) -> None:
    straw: Colour = (240, 210, 140)
    line = darker(straw, 0.55)
    pen.fill(smooth([(-0.84, -0.8), (-0.72, -1.36), (0.0, -1.56), (0.72, -1.36), (0.84, -0.8)], steps=4), straw, line)
    pen.fill([(-0.86, -0.82), (-0.8, -1.04), (0.8, -1.04), (0.86, -0.82)], design.cloth, line, 0.025)
    pen.fill(oval(0.0, -0.74, 1.62, 0.26), lighter(straw, 0.25), line)
    pen.line(arc(0.0, -0.76, 1.2, 0.14, 10, 170, 12), darker(straw, 0.18), 0.025)


def _cap(pen: Pen, design: Design) -> None:
    line = darker(design.cloth, 0.6)
    pen.fill(smooth([(-1.0, -0.52), (-0.92, -1.02), (-0.4, -1.34), (0.4, -1.34), (0.92, -1.02), (1.0, -0.52)], steps=4),
             design.cloth, line)  # fmt: skip
    pen.fill(smooth([(-1.1, -0.5), (-0.5, -0.74), (0.5, -0.74), (1.1, -0.5), (0.6, -0.34), (-0.6, -0.34)], steps=4),
             design.trim, line)  # fmt: skip
    pen.fill(oval(0.0, -1.0, 0.2, 0.16, 14), design.trim)


def _beret(pen: Pen, design: Design) -> None:
    line = darker(design.cloth, 0.6)
    pen.fill(smooth([(-0.96, -0.7), (-1.1, -1.1), (-0.4, -1.44), (0.6, -1.46), (1.24, -1.1), (0.98, -0.72),
                     (0.0, -0.9)], steps=4), design.cloth, line)  # fmt: skip
    pen.line(arc(0.0, -0.66, 0.98, 0.24, 190, 350, 10), lighter(design.cloth, 0.3), 0.07)
    pen.fill(oval(0.1, -1.5, 0.1, 0.09, 10), design.trim, line, 0.025)


def _band(pen: Pen, colour: Colour, low: float, high: float) -> None:
    upper = arc(0.0, high + 0.5, 1.04, 0.6, 200, 340, 12)
    lower = arc(0.0, low + 0.5, 1.06, 0.6, 340, 200, 12)
    pen.fill([*upper, *lower], colour, darker(colour, 0.55), 0.028)


def _hairband(pen: Pen, design: Design) -> None:
    _band(pen, design.trim, -0.72, -0.88)


def _headband(pen: Pen, design: Design) -> None:
    _band(pen, design.trim, -0.44, -0.64)
    for end in ((1.5, -0.2), (1.44, 0.06)):
        pen.fill(
            [(0.98, -0.3), (end[0], end[1] - 0.1), end, (0.98, -0.2)], design.trim, darker(design.trim, 0.5), 0.025
        )


def _headdress(pen: Pen, design: Design) -> None:
    for i in range(9):
        angle = -0.84 + 0.21 * i
        pen.fill(oval(angle, -1.06 + 0.42 * angle * angle, 0.17, 0.2, 12), WHITE, (190, 180, 200), 0.02)
    _band(pen, design.cloth, -0.68, -0.82)


def _headphones(pen: Pen, design: Design) -> None:
    pen.line(arc(0.0, -0.1, 1.12, 1.2, 190, 350, 16), INK, 0.13)
    pen.line(arc(0.0, -0.1, 1.12, 1.2, 190, 350, 16), design.trim, 0.08)
    for side in (-1.0, 1.0):
        pen.fill(oval(side * 1.1, 0.1, 0.2, 0.32, 18), _STEEL, INK)
        pen.fill(oval(side * 1.14, 0.1, 0.11, 0.2, 14), design.trim)


def _earmuffs(pen: Pen, design: Design) -> None:
    pen.line(arc(0.0, -0.1, 1.1, 1.14, 190, 350, 16), design.trim, 0.07)
    for side in (-1.0, 1.0):
        fluff = star(side * 1.06, 0.12, 0.36, 0.29, 10)
        pen.fill(fluff, lighter(design.trim, 0.55), darker(design.trim, 0.4), 0.025)


def _goggles(pen: Pen, design: Design) -> None:
    _band(pen, (92, 72, 66), -0.56, -0.7)
    for side in (-1.0, 1.0):
        pen.fill(oval(side * 0.36, -0.72, 0.32, 0.24, 20), _STEEL, INK, 0.03)
        pen.fill(oval(side * 0.36, -0.72, 0.23, 0.16, 16), mix(design.trim, WHITE, 0.35))
        pen.line([(side * 0.36 - 0.1, -0.68), (side * 0.36 + 0.02, -0.8)], WHITE, 0.04)


def _glasses(pen: Pen, design: Design) -> None:
    frame = darker(design.trim, 0.55)
    for side in (-1.0, 1.0):
        lens = oval(side * 0.43, 0.29, 0.33, 0.29, 22)
        pen.glaze(lens, (226, 240, 255), 0.2)
        pen.line([*lens, lens[0]], frame, 0.045)
        pen.line([(side * 0.76, 0.24), (side * 0.96, 0.18)], frame, 0.04)
    pen.line([(-0.1, 0.26), (0.1, 0.26)], frame, 0.04)


def _eyepatch(pen: Pen, design: Design) -> None:
    pen.line([(-0.94, -0.22), (0.94, 0.42)], INK, 0.05)
    pen.fill(smooth([(0.16, 0.06), (0.44, -0.1), (0.74, 0.08), (0.7, 0.42), (0.44, 0.6), (0.2, 0.44)], steps=4), INK)
    pen.line([(0.3, 0.14), (0.58, 0.14)], (110, 96, 120), 0.03)


def _flower(pen: Pen, design: Design) -> None:
    x, y = 0.74, -0.62
    for px, py in star(x, y, 0.24, 0.24, 3):
        pen.fill(oval(px, py, 0.17, 0.17, 12), lighter(design.trim, 0.3), darker(design.trim, 0.5), 0.025)
    pen.fill(oval(x, y, 0.12, 0.12, 10), _GOLD)


def _leaf(pen: Pen, design: Design) -> None:
    green: Colour = (104, 190, 84)
    for turn in (-1.0, 1.0):
        pen.fill(smooth([(0.0, -1.1), (turn * 0.3, -1.52), (turn * 0.74, -1.56), (turn * 0.48, -1.18)], steps=4), green,
                 darker(green, 0.6), 0.028)  # fmt: skip


def _hairpin(pen: Pen, design: Design) -> None:
    pen.line([(-0.42, -0.92), (-1.3, -1.24)], darker(_GOLD, 0.3), 0.07)
    pen.line([(-0.42, -0.92), (-1.3, -1.24)], _GOLD, 0.04)
    pen.fill(oval(-1.26, -1.22, 0.15, 0.15, 12), design.trim, INK, 0.025)
    for i in range(3):
        pen.fill(oval(-1.24 + 0.02 * i, -0.98 + 0.17 * i, 0.07, 0.07, 8), lighter(design.trim, 0.3))


def _star_clip(pen: Pen, design: Design) -> None:
    pen.fill(star(0.6, -0.5, 0.24, 0.11), _GOLD, darker(_GOLD, 0.55), 0.028)
    pen.fill(star(0.86, -0.24, 0.14, 0.06), design.trim, darker(design.trim, 0.55), 0.025)


def _scarf_clip(pen: Pen, design: Design) -> None:
    for y in (-0.34, -0.2):
        pen.line([(-0.84, y), (-0.5, y - 0.1)], design.trim, 0.06)


def _tiara(pen: Pen, design: Design) -> None:
    _band(pen, _GOLD, -0.74, -0.82)
    for x, high in ((-0.44, 0.18), (0.0, 0.32), (0.44, 0.18)):
        base = -0.92 + 0.2 * x * x
        pen.fill([(x - 0.16, base), (x, base - high), (x + 0.16, base)], _GOLD, darker(_GOLD, 0.5), 0.025)
        pen.fill(oval(x, base - 0.06, 0.06, 0.06, 8), design.trim)


def _crown(pen: Pen, design: Design) -> None:
    points = [(-0.56, -0.9), (-0.66, -1.5), (-0.3, -1.2), (0.0, -1.6), (0.3, -1.2), (0.66, -1.5), (0.56, -0.9)]
    pen.fill(points, _GOLD, darker(_GOLD, 0.55))
    for x in (-0.3, 0.0, 0.3):
        pen.fill(oval(x, -1.02, 0.08, 0.08, 8), (216, 62, 70))


_Draw = Callable[[Pen, Design], None]

GEAR: dict[str, tuple[_Draw | None, _Draw | None, tuple[Point, ...]]] = {
    # Behind the hair, in front of it, what it adds to the head box.
    "cat_ears": (_cat_ears, None, ((-0.86, -1.62), (0.86, -1.62))),
    "fox_ears": (_fox_ears, None, ((-0.88, -1.9), (0.88, -1.9))),
    "rabbit_ears": (_rabbit_ears, None, ((-0.4, -2.2), (0.4, -2.2))),
    "horns": (_horns, None, ((-1.16, -1.7), (1.16, -1.7), (-1.3, -1.1), (1.3, -1.1))),
    "small_horns": (None, _small_horns, ((-0.46, -1.4), (0.46, -1.4))),
    "halo": (_halo, None, ((-0.66, -1.5), (0.66, -1.5), (0.0, -1.67))),
    "bow": (None, _bow, ((-0.62, -1.54), (0.62, -1.54))),
    "bows": (None, _bows, ((-1.34, -0.6), (1.34, -0.6))),
    "witch_hat": (None, _witch_hat, ((-1.56, -0.64), (1.56, -0.64), (0.1, -2.0), (0.6, -2.0))),
    "straw_hat": (None, _straw_hat, ((-1.6, -0.74), (1.6, -0.74), (0.0, -1.56), (-0.7, -1.4), (0.7, -1.4))),
    "cap": (None, _cap, ((-0.4, -1.36), (0.4, -1.36))),
    "beret": (None, _beret, ((0.6, -1.48), (-0.4, -1.46), (1.22, -1.1))),
    "hairband": (None, _hairband, ()),
    "headband": (None, _headband, ()),
    "headdress": (None, _headdress, ((-0.2, -1.28), (0.2, -1.28))),
    "headphones": (None, _headphones, ((-1.28, 0.1), (1.28, 0.1), (0.0, -1.34))),
    "earmuffs": (None, _earmuffs, ((-1.38, 0.12), (1.38, 0.12))),
    "goggles": (None, _goggles, ()),
    "glasses": (None, _glasses, ()),
    "eyepatch": (None, _eyepatch, ()),
    "flower": (None, _flower, ()),
    "leaf": (None, _leaf, ((-0.7, -1.56), (0.7, -1.56))),
    "hairpin": (None, _hairpin, ((-1.36, -1.28),)),
    "star_clip": (None, _star_clip, ()),
    "scarf_clip": (None, _scarf_clip, ()),
    "tiara": (None, _tiara, ((0.0, -1.24),)),
    "crown": (None, _crown, ((-0.66, -1.5), (0.66, -1.5), (0.0, -1.6))),
}


def draw_behind(pen: Pen, design: Design) -> None:
    """Draw the parts of the pieces that are behind the hair."""
    for piece in design.gear:
        draw = GEAR[piece][0]
        if draw is not None:
            draw(pen, design)


def draw_before(pen: Pen, design: Design) -> None:
    """Draw the parts of the pieces that are in front of the hair."""
    for piece in design.gear:
        draw = GEAR[piece][1]
        if draw is not None:
            draw(pen, design)
