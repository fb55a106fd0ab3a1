"""Neck, shoulders and clothes of characters."""

from __future__ import annotations

from collections.abc import Callable

from animesion_sample.characters import Design
from animesion_sample.shapes import INK, WHITE, Colour, Pen, Point, darker, lighter, mirrored, oval, smooth, star


def _torso(pen: Pen, colour: Colour, wide: float = 1.3, slope: float = 1.62) -> None:
    corners: list[Point] = [(0.28, 1.32), (0.6, 1.46), (wide - 0.16, slope), (wide + 0.14, slope + 0.36),
                            (wide + 0.26, slope + 1.2), (wide + 0.3, 4.6)]  # fmt: skip
    half = smooth(corners, steps=4, closed=False)
    pen.fill([*half, *reversed(mirrored(half))], colour, darker(colour, 0.6), 0.04)
    for side in (-1.0, 1.0):
        pen.line([(side * (wide - 0.3), 2.3), (side * (wide - 0.2), 3.0), (side * (wide - 0.26), 4.4)],
                 darker(colour, 0.3), 0.04)  # fmt: skip
    pen.glaze(smooth([(-0.5, 1.4), (0.5, 1.4), (0.44, 1.62), (0.0, 1.76), (-0.44, 1.62)], steps=4),
              darker(colour, 0.5), 0.3)  # fmt: skip


def _sailor(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth)
    line = darker(design.trim, 0.6)
    flap = [(0.26, 1.3), (0.72, 1.4), (1.14, 1.6), (0.96, 2.1), (0.06, 2.5)]
    for shape in (flap, mirrored(flap)):
        pen.fill(shape, design.trim, line, 0.035)
    pen.line([(-0.9, 1.98), (-0.08, 2.34)], lighter(design.trim, 0.7), 0.035)
    pen.line([(0.9, 1.98), (0.08, 2.34)], lighter(design.trim, 0.7), 0.035)
    red: Colour = (222, 70, 84)
    for side in (-1.0, 1.0):
        pen.fill([(0.0, 2.4), (side * 0.5, 2.25), (side * 0.42, 2.7)], red, darker(red, 0.5), 0.03)
        pen.fill([(0.0, 2.45), (side * 0.26, 3.1), (side * 0.06, 3.0)], red, darker(red, 0.5), 0.03)


def _blazer(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth)
    pen.fill([(-0.36, 1.3), (0.36, 1.3), (0.0, 3.1)], WHITE, darker(design.cloth, 0.4), 0.03)
    pen.fill([(-0.12, 1.58), (0.12, 1.58), (0.17, 2.7), (0.0, 2.95), (-0.17, 2.7)], design.trim, INK, 0.03)
    for side in (-1.0, 1.0):
        pen.fill([(side * 0.3, 1.34), (side * 0.68, 1.44), (side * 0.74, 2.0), (side * 0.02, 3.2)],
                 lighter(design.cloth, 0.14), darker(design.cloth, 0.6), 0.035)  # fmt: skip


def _kimono(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth, 1.4, 1.74)
    line = darker(design.cloth, 0.6)
    for side in (1.0, -1.0):
        pen.fill([(side * 0.34, 1.26), (side * 0.62, 1.4), (side * -0.42, 3.3), (side * -0.6, 3.0)],
                 lighter(design.trim, 0.2), line, 0.035)  # fmt: skip
    pen.fill([(-1.5, 3.3), (1.5, 3.3), (1.56, 4.2), (-1.56, 4.2)], design.trim, line, 0.035)
    for x, y in ((-1.0, 2.3), (1.06, 2.5), (0.8, 3.0), (-1.1, 2.9)):
        pen.fill(star(x, y, 0.17, 0.09, 5), lighter(design.trim, 0.45))


def _hoodie(pen: Pen, design: Design) -> None:
    pen.fill(smooth([(-0.9, 1.2), (-1.2, 1.7), (0.0, 2.2), (1.2, 1.7), (0.9, 1.2), (0.0, 1.5)], steps=4),
             darker(design.cloth, 0.2), darker(design.cloth, 0.6))  # fmt: skip
    _torso(pen, design.cloth)
    pen.fill(smooth([(-0.66, 1.34), (-0.84, 1.7), (0.0, 2.2), (0.84, 1.7), (0.66, 1.34), (0.0, 1.66)], steps=4),
             lighter(design.cloth, 0.16), darker(design.cloth, 0.6), 0.035)  # fmt: skip
    for side in (-1.0, 1.0):
        pen.line([(side * 0.26, 2.02), (side * 0.3, 2.8)], design.trim, 0.06)
    pen.line([(0.0, 2.16), (0.0, 4.6)], darker(design.cloth, 0.35), 0.03)


def _tee(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth, 1.24, 1.6)
    pen.line(smooth([(-0.44, 1.42), (0.0, 1.78), (0.44, 1.42)], steps=5, closed=False), design.trim, 0.13)
    pen.fill(star(0.0, 2.7, 0.46, 0.2), design.trim)


def _frill(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth, 1.2, 1.66)
    for i in range(-4, 5):
        pen.fill(
            oval(0.25 * i, 1.72 - 0.018 * i * i + 0.12, 0.2, 0.2, 12), design.trim, darker(design.trim, 0.4), 0.025
        )
    for side in (-1.0, 1.0):
        pen.fill([(0.0, 1.98), (side * 0.52, 1.76), (side * 0.48, 2.3)], design.cloth, darker(design.cloth, 0.6), 0.035)
    pen.fill(oval(0.0, 2.0, 0.13, 0.15, 12), lighter(design.cloth, 0.4), darker(design.cloth, 0.6), 0.03)


def _maid(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth, 1.2, 1.64)
    pen.fill([(-0.66, 1.9), (0.66, 1.9), (0.8, 4.6), (-0.8, 4.6)], WHITE, (170, 164, 184), 0.03)
    for side in (-1.0, 1.0):
        pen.fill([(side * 0.1, 1.46), (side * 0.6, 1.4), (side * 0.5, 1.84)], WHITE, (170, 164, 184), 0.03)
        for i in range(4):
            pen.fill(oval(side * (0.78 + 0.04 * i), 1.9 + 0.3 * i, 0.18, 0.2, 12), WHITE, (170, 164, 184), 0.02)
    pen.fill(oval(0.0, 1.7, 0.13, 0.13, 12), design.trim, INK, 0.03)


def _cape(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth, 1.56, 1.9)
    pen.fill(smooth([(-0.72, 1.3), (-0.9, 1.72), (0.0, 2.06), (0.9, 1.72), (0.72, 1.3), (0.0, 1.5)], steps=4),
             design.trim, darker(design.trim, 0.6), 0.035)  # fmt: skip
    pen.fill(oval(0.0, 2.02, 0.2, 0.2, 16), (120, 220, 230), INK, 0.035)
    pen.line([(-0.1, 2.2), (-0.2, 4.6)], design.trim, 0.06)
    pen.line([(0.1, 2.2), (0.2, 4.6)], design.trim, 0.06)


def _dress(pen: Pen, design: Design) -> None:
    _torso(pen, design.skin, 1.16, 1.66)
    half = [(0.0, 2.5), (0.42, 2.2), (0.9, 2.0), (1.2, 2.4), (1.5, 4.6)]
    pen.fill([*half, *reversed(mirrored(half))], design.cloth, darker(design.cloth, 0.6), 0.035)
    for side in (-1.0, 1.0):
        pen.line([(side * 0.62, 1.46), (side * 0.78, 2.1)], design.cloth, 0.1)
    pen.line([(-0.4, 1.36), (0.4, 1.36)], design.trim, 0.1)
    pen.fill(oval(0.0, 1.46, 0.09, 0.1, 10), design.trim, INK, 0.025)


def _coat(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth, 1.4, 1.68)
    fur = lighter(design.trim, 0.5)
    for i in range(-5, 6):
        pen.fill(oval(0.2 * i, 1.78 - 0.014 * i * i, 0.22, 0.26, 12), fur, darker(design.trim, 0.25), 0.02)
    for y in (2.4, 2.9, 3.4):
        pen.fill(oval(0.2, y, 0.1, 0.1, 10), design.trim, INK, 0.025)
    pen.line([(0.0, 2.05), (0.0, 4.6)], darker(design.cloth, 0.5), 0.035)


def _turtleneck(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth, 1.24, 1.64)
    pen.fill(smooth([(-0.42, 1.1), (-0.5, 1.5), (0.0, 1.64), (0.5, 1.5), (0.42, 1.1), (0.0, 1.2)], steps=4),
             lighter(design.cloth, 0.18), darker(design.cloth, 0.6), 0.035)  # fmt: skip
    for x in (-0.6, -0.2, 0.2, 0.6):
        pen.line([(x, 2.1), (x, 4.6)], darker(design.cloth, 0.22), 0.035)


def _overalls(pen: Pen, design: Design) -> None:
    _torso(pen, WHITE, 1.22, 1.62)
    for y in (2.0, 2.5, 3.0, 3.5):
        pen.line([(-1.5, y), (1.5, y)], design.trim, 0.1)
    pen.fill([(-0.66, 2.4), (0.66, 2.4), (0.94, 4.6), (-0.94, 4.6)], design.cloth, darker(design.cloth, 0.6), 0.04)
    for side in (-1.0, 1.0):
        pen.line([(side * 0.72, 1.5), (side * 0.56, 2.5)], design.cloth, 0.22)
        pen.fill(oval(side * 0.52, 2.54, 0.1, 0.1, 10), (250, 220, 120), INK, 0.025)


def _armour(pen: Pen, design: Design) -> None:
    _torso(pen, design.cloth, 1.2, 1.7)
    steel: Colour = (190, 198, 214)
    for side in (-1.0, 1.0):
        pen.fill(oval(side * 1.26, 2.0, 0.5, 0.44, 20), steel, INK, 0.04)
        pen.line([(side * 0.98, 1.9), (side * 1.5, 2.06)], design.trim, 0.07)
    pen.fill(
        smooth([(-0.8, 1.9), (0.0, 1.66), (0.8, 1.9), (0.7, 3.2), (0.0, 3.7), (-0.7, 3.2)], steps=4), steel, INK, 0.04
    )
    pen.fill(star(0.0, 2.4, 0.3, 0.12, 4), design.trim)


OUTFITS: dict[str, Callable[[Pen, Design], None]] = {
    "sailor": _sailor, "blazer": _blazer, "kimono": _kimono, "hoodie": _hoodie, "tee": _tee, "frill": _frill,
    "maid": _maid, "cape": _cape, "dress": _dress, "coat": _coat, "turtleneck": _turtleneck, "overalls": _overalls,
    "armour": _armour,
}  # fmt: skip


def draw_body(pen: Pen, design: Design) -> None:
    """Draw neck, shoulders and clothes."""
    line = darker(design.skin, 0.6)
    pen.fill([(-0.28, 0.7), (0.28, 0.7), (0.34, 1.5), (-0.34, 1.5)], design.skin, line, 0.03)
    pen.glaze([(-0.28, 0.8), (0.28, 0.8), (0.3, 1.2), (-0.3, 1.16)], darker(design.skin, 0.6), 0.36)
    OUTFITS[design.outfit](pen, design)
    if design.outfit not in ("turtleneck", "coat", "hoodie", "cape"):
        pen.fill([(-0.27, 1.0), (0.27, 1.0), (0.32, 1.44), (0.0, 1.66), (-0.32, 1.44)], design.skin)
        pen.glaze([(-0.27, 1.0), (0.27, 1.0), (0.29, 1.24), (-0.29, 1.2)], darker(design.skin, 0.6), 0.36)
