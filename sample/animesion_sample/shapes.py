"""Drawing primitives of the sample world: points, colours and the pen.

Shapes are given in *head units* (the skull is a circle of radius 1, y points down). The pen's affine transform places
them on the canvas, so that heads can be tilted, flipped and scaled as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
INK: Colour = (52, 40, 58)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """Blend from colour ``a`` (t=0) to colour ``b`` (t=1)."""
    return (
        round(a[0] + (b[0] - a[0]) * t),
        round(a[1] + (b[1] - a[1]) * t),
        round(a[2] + (b[2] - a[2]) * t),
    )


def darker(colour: Colour, t: float = 0.3) -> Colour:
    """A shade of the colour, blended towards a cool ink colour rather than black."""
    return mix(colour, (44, 26, 62), t)


def lighter(colour: Colour, t: float = 0.4) -> Colour:
    """A highlight of the colour."""
    return mix(colour, (255, 253, 248), t)


@lru_cache(maxsize=64)
def _spline_weights(steps: int) -> tuple[tuple[float, float, float, float], ...]:
    weights = []
    for step in range(steps):
        t = step / steps
        # the uniform Catmull-Rom basis: weights of the points before, at, after and two after the segment's start
        weights.append(
            (
                0.5 * (-t + 2 * t**2 - t**3),
                0.5 * (2 - 5 * t**2 + 3 * t**3),
                0.5 * (t + 4 * t**2 - 3 * t**3),
                0.5 * (t**3 - t**2),
            )
        )
    return tuple(weights)


def smooth(points: Sequence[Point], steps: int = 5, closed: bool = True) -> list[Point]:
    """A Catmull-Rom curve through the points; an open one keeps its two ends."""
    weights = _spline_weights(steps)
    count = len(points)
    out: list[Point] = []
    for i in range(count if closed else count - 1):
        if closed:
            (ax, ay), (bx, by) = points[i - 1], points[i]
            (cx, cy), (dx, dy) = points[(i + 1) % count], points[(i + 2) % count]
        else:
            (ax, ay), (bx, by) = points[max(0, i - 1)], points[i]
            (cx, cy), (dx, dy) = points[i + 1], points[min(count - 1, i + 2)]
        out.extend((p * ax + q * bx + r * cx + s * dx, p * ay + q * by + r * cy + s * dy) for p, q, r, s in weights)
    if not closed:
        out.append(points[-1])
    return out


@lru_cache(maxsize=16)
def _unit_circle(count: int) -> tuple[Point, ...]:
    return tuple((math.cos(2 * math.pi * i / count), math.sin(2 * math.pi * i / count)) for i in range(count))


def oval(cx: float, cy: float, rx: float, ry: float, count: int = 28) -> list[Point]:
    """The outline of an axis-parallel ellipse."""
    return [(cx + rx * x, cy + ry * y) for x, y in _unit_circle(count)]


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, count: int = 12) -> list[Point]:
    """Part of an ellipse's outline, angles in degrees, clockwise on screen from the right."""
    out = []
    for i in range(count + 1):
        angle = math.radians(start + (end - start) * i / count)
        out.append((cx + rx * math.cos(angle), cy + ry * math.sin(angle)))
    return out


def star(cx: float, cy: float, outer: float, inner: float, tips: int = 5, turn: float = -90.0) -> list[Point]:
    """A star with ``tips`` points."""
    out = []
    for i in range(2 * tips):
        radius = outer if i % 2 == 0 else inner
        angle = math.radians(turn + 180.0 * i / tips)
        out.append((cx + radius * math.cos(angle), cy + radius * math.sin(angle)))
    return out


def mirrored(points: Sequence[Point]) -> list[Point]:
    """The points reflected in the vertical axis."""
    return [(-x, y) for x, y in points]


def wedge(base: Point, tip: Point, width: float, bend: float = 0.0, steps: int = 6) -> list[Point]:
    """A tapering lock: ``width`` wide at its base, a point at its tip, bowed sideways by ``bend``."""
    (bx, by), (tx, ty) = base, tip
    length = math.hypot(tx - bx, ty - by) or 1.0
    nx, ny = -(ty - by) / length, (tx - bx) / length
    left: list[Point] = []
    right: list[Point] = []
    for i in range(steps):
        t = i / steps
        half = width / 2 * (1 - t**1.7)
        bow = bend * 4 * t * (1 - t)  # a parabola with its peak `bend` in the middle
        x, y = bx + (tx - bx) * t + nx * bow, by + (ty - by) * t + ny * bow
        left.append((x + nx * half, y + ny * half))
        right.append((x - nx * half, y - ny * half))
    return [*left, tip, *reversed(right)]


class Pen:
    """Draws shapes given in head units onto a canvas.

    Args:
        image: The canvas, mode RGB.
        centre: Position of (0, 0), in canvas pixels.
        scale: Canvas pixels per unit.
        tilt: Rotation in degrees, clockwise.
        flip: Whether to mirror left and right.
    """

    def __init__(self, image: Image.Image, centre: Point, scale: float, tilt: float = 0.0, flip: bool = False) -> None:
        self.image = image
        self.solid = ImageDraw.Draw(image)
        self.sheer = ImageDraw.Draw(image, "RGBA")
        self.centre, self.scale, self.tilt, self.flip = centre, scale, tilt, flip
        self._matrix = affine(scale, tilt, flip)

    def place(self, points: Sequence[Point]) -> list[Point]:
        """Head units to canvas pixels."""
        a, b, c, d = self._matrix
        ox, oy = self.centre
        return [(ox + a * x + b * y, oy + c * x + d * y) for x, y in points]

    def fill(self, points: Sequence[Point], colour: Colour, line: Colour | None = None, width: float = 0.035) -> None:
        """A filled shape, with an outline when a line colour is given."""
        placed = self.place(points)
        self.solid.polygon(placed, fill=colour)
        if line is not None:
            placed.append(placed[0])
            self.solid.line(placed, fill=line, width=max(1, round(width * self.scale)))

    def glaze(self, points: Sequence[Point], colour: Colour, alpha: float) -> None:
        """A translucent shape."""
        self.sheer.polygon(self.place(points), fill=(*colour, round(255 * alpha)))

    def line(self, points: Sequence[Point], colour: Colour, width: float = 0.035) -> None:
        """An open line with round ends."""
        placed = self.place(points)
        pixels = max(1, round(width * self.scale))
        self.solid.line(placed, fill=colour, width=pixels)
        if pixels > 3:  # thinner lines need no round ends
            half = pixels / 2 - 0.5
            for x, y in (placed[0], placed[-1]):
                self.solid.ellipse((x - half, y - half, x + half, y + half), fill=colour)


def affine(scale: float, tilt: float, flip: bool) -> tuple[float, float, float, float]:
    """The 2x2 matrix, row by row, of an optional mirroring, a scaling and a rotation."""
    cos, sin = math.cos(math.radians(tilt)) * scale, math.sin(math.radians(tilt)) * scale
    return (-cos, -sin, -sin, cos) if flip else (cos, -sin, sin, cos)
