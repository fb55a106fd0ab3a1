"""The face: skin, eyes, brows, mouth and blush in a dozen expressions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from animesion_sample.characters import Design
from animesion_sample.shapes import INK, WHITE, Colour, Pen, Point, arc, darker, lighter, mix, oval, smooth

CHIN = 1.02


@dataclass(frozen=True)
class Expression:
    """A combination of eyes, brows and mouth.

    Attributes:
        eyes: ``open``, ``wide``, ``half``, ``shut`` (smiling), ``asleep`` or ``wink``.
        mouth: A key of the mouths in ``_mouth``.
        brow: How far the inner ends of the brows are lowered (anger), or raised (sorrow, negative), in head units.
        blush: Strength of the blush from 0 to 1.
    """

    eyes: str
    mouth: str
    brow: float
    blush: float


EXPRESSIONS: tuple[Expression, ...] = (
    Expression("open", "smile", 0.0, 0.45),
    Expression("open", "laugh", -0.02, 0.6),
    Expression("open", "flat", 0.0, 0.2),
    Expression("open", "cat", 0.0, 0.5),
    Expression("open", "frown", 0.1, 0.2),
    Expression("wide", "round", -0.07, 0.35),
    Expression("half", "flat", 0.03, 0.3),
    Expression("half", "smirk", 0.06, 0.25),
    Expression("shut", "laugh", -0.03, 0.8),
    Expression("shut", "smile", 0.0, 0.6),
    Expression("asleep", "round", -0.02, 0.4),
    Expression("wink", "grin", -0.01, 0.5),
    Expression("wide", "wave", -0.1, 0.9),
    Expression("open", "fang", 0.08, 0.4),
)


@lru_cache(maxsize=1)
def outline() -> tuple[Point, ...]:
    """The outline of the face, in head units."""
    half = [(0.86, -0.3), (0.87, 0.1), (0.8, 0.45), (0.58, 0.76), (0.28, 0.96), (0.0, CHIN)]
    left = [(-x, y) for x, y in reversed(half[:-1])]
    return tuple(smooth([(0.0, -0.95), (0.55, -0.8), *half, *left, (-0.55, -0.8)], steps=4))


def draw_skin(pen: Pen, design: Design, shade: float) -> None:
    """Draw the ears and the bare face, with a soft shadow on one side.

    Args:
        pen: The pen to draw with.
        design: The character.
        shade: Side and depth of the shadow, -1 to 1.
    """
    skin, line = design.skin, darker(design.skin, 0.6)
    for side in (-1.0, 1.0):
        pen.fill(oval(side * 0.9, 0.18, 0.13, 0.2, 14), skin, line, 0.028)
    pen.fill(outline(), skin, line, 0.03)
    side = 1.0 if shade > 0 else -1.0
    shadow = [(0.86, -0.2), (0.86, 0.1), (0.79, 0.45), (0.57, 0.75), (0.2, 0.96), (0.46, 0.7), (0.56, 0.3), (0.6, -0.2)]
    pen.glaze([(side * x, y) for x, y in shadow], darker(skin, 0.5), 0.5 * abs(shade))


def draw_features(pen: Pen, design: Design, look: Expression, turn: float, nod: float) -> None:
    """Draw the eyes, brows, nose, mouth and blush.

    Args:
        pen: The pen to draw with.
        design: The character.
        look: The expression.
        turn: How far the face looks to the side, -1 to 1.
        nod: How far it looks down (positive) or up, -1 to 1.
    """
    skin = design.skin
    dx, dy = 0.2 * turn, 0.11 * nod
    for side in (-1.0, 1.0):
        near = 1.0 + 0.14 * turn * -side  # perspective: the eye on the far side is narrower
        x, y = side * 0.43 + dx, 0.27 + dy
        if look.blush > 0.3:
            pen.glaze(oval(x + side * 0.08, 0.58 + dy, 0.2 * near, 0.1, 16), (255, 110, 120), 0.42 * look.blush)
            if look.blush > 0.7:
                for k in (-0.07, 0.02, 0.11):
                    pen.line([(x + k + 0.02, 0.54 + dy), (x + k - 0.03, 0.63 + dy)], (236, 110, 120), 0.02)
        kind = look.eyes
        if kind == "wink":  # one eye of each kind
            kind = "shut" if side > 0 else "open"
        _eye(pen, x, y, near, side, design.eyes[0 if side < 0 else 1], kind)
        _brow(pen, x, y - 0.46, near, side, look.brow, darker(design.hair, 0.5))
    pen.line([(dx * 1.3 - 0.01, 0.56 + dy), (dx * 1.3 + 0.03, 0.6 + dy)], darker(skin, 0.45), 0.028)
    _mouth(pen, dx, 0.75 + dy * 0.8, look.mouth, skin)


def _eye(pen: Pen, x: float, y: float, near: float, side: float, colour: Colour, kind: str) -> None:
    rx = 0.235 * near
    if kind in ("shut", "asleep"):
        lid = arc(x, y + 0.14, rx, 0.2, 200, 340, 8) if kind == "shut" else arc(x, y - 0.06, rx, 0.2, 20, 160, 8)
        pen.line(lid, INK, 0.062)
        end = lid[0] if (side < 0) == (kind == "shut") else lid[-1]
        pen.line([end, (end[0] + side * 0.07, end[1] + 0.01)], INK, 0.04)
        return
    ry = {"wide": 0.34, "half": 0.23}.get(kind, 0.31)
    top = y - (0.06 if kind == "half" else ry)
    iris = (0.135 if kind == "wide" else 0.175) * near
    white = smooth(
        [(x - rx, y - 0.02), (x - rx * 0.7, top + 0.08), (x, top), (x + rx * 0.75, top + 0.07), (x + rx, y),
         (x + rx * 0.6, y + 0.24), (x, y + 0.28), (x - rx * 0.6, y + 0.24)], steps=3)  # fmt: skip
    pen.fill(white, (250, 248, 252))
    _iris(pen, x - side * 0.02, y + 0.01, iris, 0.26 if kind != "wide" else 0.21, colour, top)
    lash = [(x - side * rx * 0.95, y - 0.04), (x - side * rx * 0.6, top + 0.06), (x, top - 0.02),
            (x + side * rx * 0.72, top + 0.03), (x + side * rx * 1.12, y - 0.04),
            (x + side * rx * 1.3, y - 0.1)]  # fmt: skip
    pen.line(smooth(lash, steps=3, closed=False), INK, 0.07)
    pen.line([(x - rx * 0.5, y + 0.275), (x + rx * 0.5, y + 0.275)], mix(INK, colour, 0.35), 0.026)
    pen.line(arc(x, top + 0.06, rx * 0.95, 0.15, 215, 325, 5), darker(colour, 0.5), 0.018)


def _iris(pen: Pen, x: float, y: float, rx: float, ry: float, colour: Colour, top: float) -> None:
    """Draw a vertical gradient from a dark upper rim to a glowing lower edge, a pupil and two highlights."""
    rim = darker(colour, 0.72)

    def clip(points: list[Point]) -> list[Point]:
        return [(px, max(py, top + 0.02)) for px, py in points]

    pen.fill(clip(oval(x, y, rx, ry, 22)), rim)
    # the gradient: bands over each other, each cut lower and lighter than the one before
    bands = 6
    for i in range(bands):
        t = i / (bands - 1)
        inner = oval(x, y + ry * 0.10 * t + ry * 0.04, rx * (0.88 - 0.06 * t), ry * (0.9 - 0.04 * t), 22)
        cut = y - ry * 0.75 + 1.35 * ry * t
        shade = mix(darker(colour, 0.55), lighter(colour, 0.42), t)
        pen.fill(clip([(px, max(py, cut)) for px, py in inner]), shade)
    pen.fill(clip(oval(x, y - 0.01, rx * 0.42, ry * 0.45, 14)), darker(colour, 0.86))
    pen.glaze(clip(oval(x, y + ry * 0.62, rx * 0.5, ry * 0.2, 12)), lighter(colour, 0.8), 0.75)
    pen.fill(clip(oval(x - rx * 0.38, y - ry * 0.42, rx * 0.36, ry * 0.27, 12)), WHITE)
    pen.fill(oval(x + rx * 0.42, y + ry * 0.38, rx * 0.17, ry * 0.13, 8), WHITE)


def _brow(pen: Pen, x: float, y: float, near: float, side: float, slant: float, colour: Colour) -> None:
    inner, outer = x - side * 0.2 * near, x + side * 0.2 * near
    pen.line([(inner, y + slant), (x, y - 0.04 + slant * 0.2), (outer, y + 0.02 - slant * 0.4)], colour, 0.04)


def _mouth(pen: Pen, x: float, y: float, kind: str, skin: Colour) -> None:
    line = darker(skin, 0.75)
    inside: Colour = (168, 52, 66)
    tongue: Colour = (240, 128, 128)
    if kind in ("laugh", "grin", "fang"):
        width, depth = (0.24, 0.2) if kind == "laugh" else (0.2, 0.13)
        shape = [(x - width, y - 0.04), *arc(x, y - 0.05, width, depth, 170, 10, 10), (x + width, y - 0.04)]
        pen.fill(shape, inside, line, 0.028)
        if kind == "grin":
            pen.fill([(x - width * 0.85, y - 0.03), (x + width * 0.85, y - 0.03), (x + 0.12, y + 0.03),
                      (x - 0.12, y + 0.03)], WHITE)  # fmt: skip
        else:
            pen.fill(oval(x, y + depth * 0.42, width * 0.55, depth * 0.28, 12), tongue)
        if kind == "fang":
            pen.fill([(x - width * 0.8, y - 0.035), (x - width * 0.35, y - 0.035), (x - width * 0.58, y + 0.06)], WHITE)
    elif kind == "round":
        pen.fill(oval(x, y + 0.02, 0.075, 0.095, 14), inside, line, 0.026)
    else:
        curves: dict[str, list[Point]] = {
            "smile": [(-0.17, -0.03), (-0.08, 0.04), (0.08, 0.04), (0.17, -0.03)],
            "flat": [(-0.11, 0.0), (0.11, 0.0)],
            "frown": [(-0.13, 0.04), (0.0, -0.02), (0.13, 0.04)],
            "smirk": [(-0.12, 0.02), (0.04, 0.03), (0.17, -0.05)],
            "cat": [(-0.16, -0.02), (-0.09, 0.045), (0.0, -0.015), (0.09, 0.045), (0.16, -0.02)],
            "wave": [(-0.18, 0.02), (-0.09, -0.03), (0.0, 0.03), (0.09, -0.03), (0.18, 0.02)],
        }
        pen.line(smooth([(x + px, y + py) for px, py in curves[kind]], steps=3, closed=False), line, 0.038)
