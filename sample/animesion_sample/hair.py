"""Hair: the mass behind the head, the fringe over the forehead, side locks and the shine.

The outline of the hair around the skull (``crown``) also determines the head box, so it does not vary between images;
tips and tails sway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random

from animesion_sample.characters import Design
from animesion_sample.shapes import Pen, Point, arc, darker, lighter, mirrored, oval, smooth, wedge

FRINGES: dict[str, tuple[Sequence[Point], float]] = {
    # Tips from right to left, and how far up the gaps between them reach.
    "blunt": (((0.80, 0.20), (0.56, 0.06), (0.32, 0.04), (0.08, 0.06), (-0.16, 0.04), (-0.4, 0.06), (-0.8, 0.2)), -0.1),
    "swept": (((0.86, 0.42), (0.60, 0.20), (0.30, 0.12), (0.0, 0.02), (-0.34, -0.14), (-0.88, 0.30)), -0.3),
    "parted": (((0.88, 0.42), (0.66, 0.14), (0.44, -0.12), (-0.5, -0.06), (-0.7, 0.16), (-0.88, 0.40)), -0.58),
    "centre": (((0.90, 0.50), (0.62, 0.16), (0.34, -0.14), (-0.34, -0.14), (-0.62, 0.16), (-0.9, 0.5)), -0.66),
    "messy": (((0.86, 0.40), (0.62, 0.06), (0.36, 0.22), (0.06, 0.02), (-0.22, 0.18), (-0.56, 0.04), (-0.86, 0.36)),
              -0.28),
    "spiky": (((0.92, 0.50), (0.50, 0.22), (0.10, 0.30), (-0.32, 0.10), (-0.90, 0.44)), -0.42),
    "between": (((0.86, 0.36), (0.58, 0.06), (0.32, 0.0), (0.04, 0.38), (-0.28, 0.0), (-0.56, 0.06), (-0.86, 0.36)),
                -0.3),
    "cover": (((0.88, 0.46), (0.62, 0.66), (0.40, 0.56), (0.12, 0.14), (-0.28, -0.12), (-0.88, 0.30)), -0.36),
}  # fmt: skip

CROWNS: dict[str, Sequence[Point]] = {
    # Right half of the outline behind the head, from the top down.
    "round": ((0.0, -1.20), (0.58, -1.06), (1.0, -0.62), (1.12, 0.0), (0.98, 0.5), (0.6, 0.8)),
    "bob": ((0.0, -1.20), (0.58, -1.06), (1.02, -0.62), (1.16, 0.0), (1.2, 0.5), (1.1, 0.98), (0.7, 1.04)),
    "straight": ((0.0, -1.20), (0.58, -1.06), (1.0, -0.62), (1.1, 0.0), (1.12, 0.6), (1.1, 1.1)),
    "wide": ((0.0, -1.22), (0.6, -1.08), (1.06, -0.64), (1.2, -0.1), (1.16, 0.3), (1.3, 0.66), (1.2, 1.1)),
}

_SPIKES: tuple[Point, ...] = (
    (0.06, -1.48), (0.24, -1.16), (0.66, -1.46), (0.68, -1.04), (1.16, -1.12), (1.02, -0.66), (1.42, -0.48),
    (1.14, -0.16), (1.40, 0.24), (1.08, 0.30), (1.18, 0.74), (0.8, 0.66), (-0.8, 0.66), (-1.04, 0.84), (-0.98, 0.5),
    (-1.32, 0.5), (-1.12, 0.1), (-1.46, -0.12), (-1.12, -0.42), (-1.32, -0.84), (-0.84, -0.92), (-0.86, -1.36),
    (-0.38, -1.14), (-0.32, -1.5), (-0.06, -1.2),
)  # fmt: skip

_CROWN_OF = {
    "bob": "bob", "short": "round", "long": "straight", "hime": "straight", "wavy": "wide", "twin_tails": "round",
    "low_tails": "round", "ponytail": "round", "side_tail": "round", "drills": "round", "bun": "round",
    "double_bun": "round", "braid": "round",
}  # fmt: skip


@lru_cache(maxsize=64)
def crown(style: str) -> tuple[Point, ...]:
    """The outline of the hair around the skull, in head units, from which the head box is measured."""
    if style == "spiky":
        return _SPIKES
    right = CROWNS[_CROWN_OF[style]]
    return tuple(smooth([*right, *reversed(mirrored(right[1:]))], steps=4))


def extent(style: str) -> list[Point]:
    """Extreme points of the hair that counts for the head box: crown and buns, without tails below the chin."""
    points = list(crown(style))
    if style == "bun":
        points += oval(0.0, -1.32, 0.46, 0.4, 12)
    elif style == "double_bun":
        points += [*oval(0.78, -1.06, 0.4, 0.4, 12), *oval(-0.78, -1.06, 0.4, 0.4, 12)]
    return [(x, min(y, 1.06)) for x, y in points]


def draw_back(upright: Pen, tilted: Pen, design: Design, rng: Random) -> None:
    """The hair behind the body, which hangs down, and around the skull, which follows the head."""
    tips = design.tips or darker(design.hair, 0.36)
    sway = rng.uniform(-0.22, 0.22)
    tail = _TAILS.get(design.back)
    if tail is not None:
        tail(upright if tail is _falls else tilted, design, sway, rng)
    draw_crown(tilted, design)
    tilted.glaze(oval(0.0, 0.2, 0.92, 0.46), tips, 0.7)


def draw_crown(pen: Pen, design: Design) -> None:
    """The hair around the skull."""
    pen.fill(crown(design.back), design.hair, darker(design.hair, 0.62))


def _falls(pen: Pen, design: Design, sway: float, rng: Random) -> None:
    """Long hair down the back, straight or in waves."""
    wave = 0.14 if design.back == "wavy" else 0.02
    width = {"hime": 1.16, "long": 1.2, "wavy": 1.4}[design.back]
    length = rng.uniform(2.5, 3.0)
    rows = 7
    right = [(width + wave * math.cos(2.2 * i) + sway * i / rows + 0.03 * i, i * length / rows) for i in range(1, rows)]
    left = [(-width - wave * math.cos(2.2 * i) + sway * i / rows - 0.03 * i, i * length / rows) for i in range(1, rows)]
    right.insert(0, (0.8, -0.4))
    left.insert(0, (-0.8, -0.4))
    # the lower edge: alternating longer and shorter strands
    hem = [(right[-1][0] - 2 * width * k / 6, length + (0.14 if k % 2 else -0.05)) for k in range(1, 6)]
    colour, line = darker(design.hair, 0.12), darker(design.hair, 0.62)
    pen.fill(smooth([*right, *hem, *reversed(left)], steps=4), colour, line)
    if design.tips:  # coloured from half of the length on
        pen.glaze(smooth([right[4], right[5], right[6], *hem, left[6], left[5], left[4]], steps=3), design.tips, 0.6)
    for k in (-0.75, -0.3, 0.3, 0.75):
        strand = [(k * width + sway * t, t * length * 0.9) for t in (0.35, 0.6, 1.0)]
        pen.line(smooth(strand, steps=4, closed=False), darker(design.hair, 0.34), 0.03)


def _streamer(pen: Pen, design: Design, root: Point, end: Point, width: float, bend: float) -> None:
    """Draw one tail of hair with a shaded side, strands and optional coloured ends."""
    line = darker(design.hair, 0.62)
    (rx, ry), (ex, ey) = root, end
    mid = ((rx + ex) / 2, (ry + ey) / 2)
    pen.fill(wedge(root, end, width * 1.5, bend, steps=8), design.hair, line)
    pen.fill(wedge((rx + 0.03, ry + 0.15), (ex, ey - 0.2), width * 0.5, bend * 0.9), darker(design.hair, 0.2))
    if design.tips:
        pen.glaze(wedge((mid[0] + bend * 0.2, mid[1]), end, width * 0.8, bend * 0.4), design.tips, 0.75)
    pen.fill(wedge((rx - width * 0.3, ry + 0.2), mid, width * 0.22, bend * 0.6), lighter(design.hair, 0.34))


def _twin_tails(pen: Pen, design: Design, sway: float, rng: Random) -> None:
    low = design.back == "low_tails"
    length = rng.uniform(1.7, 2.3)
    for side in (-1.0, 1.0):
        root = (side * (0.86 if low else 1.0), 0.72 if low else -0.5)
        end = (side * rng.uniform(1.35, 1.9) + sway, root[1] + length)
        _streamer(pen, design, root, end, 0.46 if low else 0.6, side * -rng.uniform(0.2, 0.42))


def _tail(pen: Pen, design: Design, sway: float, rng: Random) -> None:
    side = design.back == "side_tail"
    root = (1.0, -0.42) if side else (0.42, -0.96)
    end = (rng.uniform(1.5, 2.0) + sway, rng.uniform(1.3, 1.8) if side else rng.uniform(0.7, 1.3))
    _streamer(pen, design, root, end, 0.72, -rng.uniform(0.42, 0.62))


def _drills(pen: Pen, design: Design, sway: float, rng: Random) -> None:
    line = darker(design.hair, 0.62)
    turns = rng.choice((4, 5, 6))
    for side in (-1.0, 1.0):
        for i in reversed(range(turns)):  # from the end, so that upper turns overlap lower ones
            y = 0.25 + 0.36 * i
            x = side * (1.16 + 0.05 * i) + sway * i / 5
            radius = 0.40 - 0.045 * i
            pen.fill(oval(x, y, radius, 0.27, 18), design.hair, line)
            pen.fill(oval(x - 0.04, y - 0.04, radius * 0.55, 0.1, 12), lighter(design.hair, 0.35))


def _braid(pen: Pen, design: Design, sway: float, rng: Random) -> None:
    line = darker(design.hair, 0.62)
    side = rng.choice((-1.0, 1.0))
    x, y = side * 0.95, 0.55
    for i in range(6):
        pen.fill(oval(x, y, 0.27 - 0.016 * i, 0.24, 16), design.hair, line)
        pen.line([(x - 0.14, y - 0.1), (x, y + 0.12), (x + 0.14, y - 0.1)], darker(design.hair, 0.3), 0.03)
        x, y = x + side * 0.03 + sway * 0.2, y + 0.3
    pen.fill(oval(x, y - 0.1, 0.16, 0.1, 12), design.trim, line)
    pen.fill(wedge((x, y - 0.05), (x + sway * 0.4, y + 0.4), 0.3), design.hair, line)


def _bun(pen: Pen, design: Design, sway: float, rng: Random) -> None:
    line = darker(design.hair, 0.62)
    spots = [(0.0, -1.26)] if design.back == "bun" else [(-0.78, -1.0), (0.78, -1.0)]
    for x, y in spots:
        pen.fill(oval(x, y, 0.44, 0.4), design.hair, line)
        pen.line(arc(x, y + 0.04, 0.26, 0.22, 150, 380, 9), darker(design.hair, 0.34), 0.035)
        pen.line(arc(x, y, 0.34, 0.3, 200, 280, 6), lighter(design.hair, 0.5), 0.05)


_TAILS: dict[str, Callable[[Pen, Design, float, Random], None]] = {
    "long": _falls, "hime": _falls, "wavy": _falls, "twin_tails": _twin_tails, "low_tails": _twin_tails,
    "ponytail": _tail, "side_tail": _tail, "drills": _drills, "braid": _braid, "bun": _bun, "double_bun": _bun,
}  # fmt: skip

BACKS = (*_CROWN_OF, "spiky")


def fringe(design: Design, rng: Random) -> tuple[list[Point], list[Point]]:
    """The lower edge of the fringe, right to left, and the tips on it; the tips sway."""
    tips, gap = FRINGES[design.fringe]
    lean = rng.uniform(-0.12, 0.12)
    swayed = [(x + lean + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.09, 0.09)) for x, y in tips]
    # Centre and parted fringes leave the forehead free: only their widest gap reaches up to it.
    open_forehead = design.fringe in ("parted", "centre")
    edge: list[Point] = []
    for i, (x, y) in enumerate(swayed):
        if i:
            px, py = swayed[i - 1]
            reach = gap if abs(px - x) > 0.5 or not open_forehead else gap * 0.5
            my = min(reach, min(py, y) - 0.06)  # the gap must end above both tips
            edge += [(px - 0.02, (py + my) / 2 + 0.04), ((px + x) / 2, my), (x + 0.06, (y + my) / 2)]
        edge.append((x, y))
    return edge, swayed


def draw_shade(pen: Pen, design: Design, rng: Random) -> None:
    """The side of the hair that is turned away from the light."""
    height, depth = rng.uniform(-1.1, -0.5), rng.uniform(0.1, 0.46)
    side = rng.choice((-1.0, 1.0))
    edge = [(1.0, 0.2), (1.04, -0.3), (0.8, -0.84), (0.3, -1.08), (0.5, -0.4), (0.7, 0.14)]
    if rng.random() < 0.3:  # light from above or below instead of from the side
        edge = [(1.0, 0.1), (1.02, -0.3), *arc(0.0, height + 0.6, 0.9, 0.5, 0, -180, 8), (-1.02, -0.3), (-1.0, 0.1),
                (-0.5, -0.16), (0.5, -0.16)]  # fmt: skip
    pen.glaze([(side * x, y) for x, y in edge], darker(design.hair, 0.7), depth)


def draw_shadow(pen: Pen, design: Design, edge: Sequence[Point]) -> None:
    """The shadow of the fringe on the forehead."""
    fallen = [(max(-0.84, min(0.84, x)), min(y, 0.5) + 0.12) for x, y in edge]
    pen.glaze([(0.8, -0.6), *fallen, (-0.8, -0.6)], darker(design.skin, 0.55), 0.3)


def draw_front(pen: Pen, design: Design, edge: Sequence[Point], tips: Sequence[Point], rng: Random) -> None:
    """Draw side locks, the fringe with its shine, and sometimes a stray lock."""
    line = darker(design.hair, 0.62)
    _side_locks(pen, design, rng)
    dome = smooth(
        [(-1.0, 0.16), (-1.03, -0.3), (-0.8, -0.82), (-0.36, -1.08), (0.0, -1.14), (0.36, -1.08), (0.8, -0.82),
         (1.03, -0.3), (1.0, 0.16)], steps=4, closed=False)  # fmt: skip
    pen.fill([*dome, *edge], design.hair)
    pen.line(edge, line, 0.034)
    # strands from each tip towards the parting
    for x, y in tips[1:-1]:
        strand = [(x, y - 0.08), (x * 0.92, (y - 0.5) / 2 - 0.2), (x * 0.62, -0.86)]
        pen.line(smooth(strand, steps=3, closed=False), darker(design.hair, 0.26), 0.022)
    _shine(pen, design, rng)
    if design.back in ("short", "bob", "ponytail", "twin_tails") or design.fringe == "messy":
        lean = rng.uniform(-0.2, 0.5)
        pen.fill(wedge((0.0, -1.08), (lean, -1.34), 0.14, 0.12), design.hair, line, 0.025)


def _side_locks(pen: Pen, design: Design, rng: Random) -> None:
    line = darker(design.hair, 0.62)
    length = {"hime": 1.0, "bob": 0.86, "spiky": 0.55, "short": 0.62}.get(design.back, 1.02)
    for side in (-1.0, 1.0):
        reach = length + rng.uniform(-0.08, 0.08)
        if design.back == "hime":
            lock = [(side * 1.08, -0.1), (side * 0.72, -0.1), (side * 0.7, reach), (side * 1.06, reach)]
            pen.fill(lock, design.hair, line, 0.028)
        else:
            tip = (side * (0.8 + rng.uniform(-0.08, 0.1)), reach)
            pen.fill(wedge((side * 0.94, -0.25), tip, 0.34, side * -0.08), design.hair, line, 0.028)


def _shine(pen: Pen, design: Design, rng: Random) -> None:
    """The angel ring: a band of light with a ragged lower edge."""
    height = rng.uniform(-0.70, -0.52)
    upper = arc(0.0, height + 0.5, 0.84, 0.62, 212, 328, 10)
    lower: list[Point] = []
    for i, (x, y) in enumerate(reversed(upper)):
        lower.append((x * 1.01, y + (0.2 if i % 2 else 0.07)))
    pen.glaze([*upper, *lower], lighter(design.hair, 0.62), 0.62)
