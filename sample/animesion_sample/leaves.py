"""Drawn leaves: the constant traits of a cultivar, and the variation between its leaves.

A `DrawnLeaf` determines all pixels, as `drawing.Drawing` does for characters. Collections of leaves are written in
`collections`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFilter

from animesion_sample.shapes import Colour, Point, darker, lighter, mix

OVERSAMPLING = 2
STAGES = ("R1", "R3", "R4", "R5", "R6")

_YELLOW: Colour = (214, 196, 84)
_BROWN: Colour = (142, 104, 62)
_STEPS = 90
_BASE = 0.36


@dataclass(frozen=True)
class LeafDesign:
    """The common traits of the leaves of a cultivar.

    Attributes:
        palmate: lobed like cotton's; else one blade like a soybean's leaflet.
        lobes: of a palmate leaf.
        cut: how deep the lobes are cut, 0 to 1.
        width: of a blade, relative to its length.
        widest: where along the blade it is widest, 0 base to 1 tip.
        teeth: along the margin, 0 for an entire one.
        depth: of the teeth, relative to the width.
        pairs: of secondary veins.
        angle: of secondary veins to the midrib, in degrees.
        colour: of the blade.
        vein: how much lighter the veins are, 0 to 1.
        mottle: spots on the blade.
    """

    palmate: bool
    lobes: int
    cut: float
    width: float
    widest: float
    teeth: int
    depth: float
    pairs: int
    angle: float
    colour: Colour
    vein: float
    mottle: int


@dataclass(frozen=True)
class DrawnLeaf:
    """The specification of an image of a leaf, which determines its pixels.

    Attributes:
        species: `cotton` or `soybean`.
        cultivar: number of the cultivar.
        seed: decides everything in which this leaf differs from others of the cultivar.
        side: of the square image in pixels.
        stage: one of `STAGES`; later leaves are larger and yellower.
        outdoors: on soil and litter, in changing light, instead of on a scanner's ground.
    """

    species: str
    cultivar: int
    seed: str
    side: int
    stage: str = "R3"
    outdoors: bool = False


def cultivar(species: str, number: int) -> LeafDesign:
    """The traits of a cultivar: random, but the same on every call."""
    rng = Random(f"{species}/{number}")
    base = mix((34, 92, 40), (126, 168, 58), rng.random())
    return LeafDesign(
        palmate=species == "cotton",
        lobes=rng.choice((3, 5, 5, 7)),
        cut=rng.uniform(0.2, 0.75),
        width=rng.uniform(0.34, 0.78),
        widest=rng.uniform(0.28, 0.52),
        teeth=rng.choice((0, 0, 9, 14, 22)),
        depth=rng.uniform(0.03, 0.09),
        pairs=rng.randint(4, 9),
        angle=rng.uniform(34.0, 66.0),
        colour=mix(base, (40, 96, 84), rng.uniform(0.0, 0.35)),
        vein=rng.uniform(0.2, 0.6),
        mottle=rng.choice((0, 0, 12, 40)),
    )


def render(leaf: DrawnLeaf) -> Image.Image:
    """Draw a leaf, mode RGB."""
    rng = Random(f"{leaf.species}/{leaf.cultivar}/{leaf.seed}/{leaf.stage}")
    kind = cultivar(leaf.species, leaf.cultivar)
    side = leaf.side * OVERSAMPLING
    image = _soil(side, rng) if leaf.outdoors else Image.new("RGB", (side, side), _scanner(rng))
    age = STAGES.index(leaf.stage) / (len(STAGES) - 1)  # 0 to 1
    length = side * rng.uniform(0.66, 0.84) * (0.86 + 0.14 * age)
    tilt = math.radians(rng.uniform(-40.0, 40.0))
    bend = rng.uniform(-0.12, 0.12)
    middle = (side * rng.uniform(0.46, 0.54), side * rng.uniform(0.46, 0.54))

    def placed(points: list[Point]) -> list[Point]:
        """Convert leaf units (x across, y from 0 at the base to 1 at the tip) to pixels."""
        out = []
        for x, y in points:
            x, y = length * (x + bend * math.sin(math.pi * y)), length * (0.5 - y)
            out.append(
                (
                    middle[0] + x * math.cos(tilt) - y * math.sin(tilt),
                    middle[1] + x * math.sin(tilt) + y * math.cos(tilt),
                )
            )
        return out

    colour = mix(mix(kind.colour, _YELLOW, 0.6 * age * age), lighter(kind.colour), rng.uniform(0.0, 0.2))
    outline, veins = _palmate(kind, rng) if kind.palmate else _blade(kind, rng)
    pen = ImageDraw.Draw(image)
    edge = placed(outline)
    if leaf.outdoors:  # the shadow on the soil
        shift = side // 60
        pen.polygon([(x + shift, y + shift) for x, y in edge], fill=(46, 40, 36))
    stalk = max(2, side // 90)
    base = _BASE if kind.palmate else 0.0
    pen.line(placed([(0.0, base + 0.04), (0.0, base - 0.14)]), fill=darker(colour, 0.2), width=2 * stalk)
    pen.polygon(edge, fill=colour)
    inner = Image.new("L", image.size, 0)
    ImageDraw.Draw(inner).polygon(edge, fill=255)
    _surface(image, inner, kind, colour, age, rng)
    pale = lighter(colour, kind.vein)
    for line, width in veins:
        pen.line(placed(line), fill=pale, width=max(1, round(stalk * width)), joint="curve")
    pen.line([*edge, edge[0]], fill=darker(colour, 0.35), width=max(1, stalk // 2))
    image = image.reduce(OVERSAMPLING)
    # the scanner's light is constant, daylight is not
    if leaf.outdoors:
        light = mix((255, 255, 255), rng.choice(((255, 226, 180), (200, 214, 255), (226, 255, 214))), rng.random())
        image = Image.blend(image, Image.new("RGB", image.size, light), rng.uniform(0.0, 0.18))
    return image


def _blade(kind: LeafDesign, rng: Random) -> tuple[list[Point], list[tuple[list[Point], float]]]:
    """Outline and veins of one blade."""
    width = kind.width / 2 * rng.uniform(0.9, 1.1)
    # half-width at y is proportional to y**rise * (1 - y), which is largest at y = widest
    rise = kind.widest / (1 - kind.widest)
    peak = kind.widest**rise * (1 - kind.widest)
    right, left = [], []
    for step in range(_STEPS + 1):
        y = step / _STEPS
        half = width * (max(0.0, y**rise * (1 - y)) / peak) ** 0.8
        if kind.teeth:  # a sawtooth of `teeth` periods
            half *= 1 + kind.depth * (((y * kind.teeth) % 1.0) - 0.5) * 2
        right.append((half * rng.uniform(0.985, 1.015), y))
        left.append((-half * rng.uniform(0.985, 1.015), y))
    veins: list[tuple[list[Point], float]] = [([(0.0, y / 10) for y in range(11)], 1.6)]
    lean = 1 / math.tan(math.radians(kind.angle))
    for pair in range(kind.pairs):
        y = 0.08 + 0.78 * pair / kind.pairs + rng.uniform(-0.012, 0.012)
        for sign in (-1, 1):
            end = _reach(width, rise, peak, y, lean)
            line = [(sign * end * t / 4, y + end * lean * t / 4 + 0.02 * (t / 4) ** 2) for t in range(5)]
            veins.append((line, 0.9))
    return [*right, *reversed(left)], veins


def _reach(width: float, rise: float, peak: float, start: float, lean: float) -> float:
    """Length of a secondary vein up to the margin."""
    x = 0.0
    while x < 0.6:
        y = start + x * lean
        if y >= 1 or x > 0.94 * width * (y**rise * (1 - y) / peak) ** 0.8:
            break
        x += 0.01
    return x


def _palmate(kind: LeafDesign, rng: Random) -> tuple[list[Point], list[tuple[list[Point], float]]]:
    """Outline and veins of a lobed leaf; its base is at y = `_BASE`."""
    spread = {3: 1.3, 5: 1.95, 7: 2.3}[kind.lobes]
    # angles of the lobes' tips to the midrib, in radians; outer lobes are shorter
    tips = [spread * (2 * i / (kind.lobes - 1) - 1) for i in range(kind.lobes)]
    reach = [0.62 - 0.1 * abs(tip) / spread * (1 + kind.cut) + rng.uniform(-0.03, 0.03) for tip in tips]
    gap = tips[1] - tips[0]
    outline: list[Point] = [(0.0, _BASE)]
    for step in range(2 * _STEPS + 1):
        angle = (spread + gap / 2) * (step / _STEPS - 1)
        nearest = min(range(kind.lobes), key=lambda i: abs(angle - tips[i]))
        off = abs(angle - tips[nearest]) / (gap / 2)  # 0 at a tip, 1 between two lobes
        radius = reach[nearest] * (1 - kind.cut * min(1.0, off) ** (1.1 + kind.width))
        if kind.teeth:
            radius *= 1 + kind.depth * (((step * kind.teeth / 40) % 1.0) - 0.5)
        outline.append((radius * math.sin(angle), _BASE + radius * math.cos(angle)))
    veins: list[tuple[list[Point], float]] = []
    for tip, far in zip(tips, reach, strict=True):
        direction = (math.sin(tip), math.cos(tip))
        veins.append(([(0.0, _BASE), (0.95 * far * direction[0], _BASE + 0.95 * far * direction[1])], 1.4))
        for branch in range(1, kind.pairs // 2 + 1):
            at = far * branch / (kind.pairs // 2 + 1.5)
            out = 0.22 * far * (1 - kind.cut * 0.6) * (1 - branch / (kind.pairs + 1))
            for sign in (-1, 1):
                turned = tip + sign * math.radians(kind.angle)
                start = (at * direction[0], _BASE + at * direction[1])
                veins.append(([start, (start[0] + out * math.sin(turned), start[1] + out * math.cos(turned))], 0.7))
    return outline, veins


def _surface(image: Image.Image, inner: Image.Image, kind: LeafDesign, colour: Colour, age: float, rng: Random) -> None:
    """Uneven colour, spots and, in old leaves, browned patches, all inside the outline."""
    side = image.width
    # a coarse grid of tones, interpolated to smooth patches
    tones = Image.new("RGB", (6, 6))
    tones.putdata([mix(darker(colour, 0.18), lighter(colour, 0.16), rng.random()) for _ in range(36)])
    cover = tones.resize(image.size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(cover)
    spots = [(lighter(colour, 0.35), 0.004)] * kind.mottle + [(_BROWN, 0.018)] * round(14 * age * rng.random())
    for spot, size in spots:
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), side * size * rng.uniform(0.6, 1.4)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=spot)
    image.paste(cover, mask=inner)


def _scanner(rng: Random) -> Colour:
    tone = rng.randint(222, 250)
    return (tone, tone - rng.randint(0, 4), tone - rng.randint(0, 8))


def _soil(side: int, rng: Random) -> Image.Image:
    """Earth, straw and stones, out of focus."""
    small = Image.new("RGB", (9, 9))
    earth = rng.choice(((120, 92, 66), (92, 84, 76), (146, 122, 92), (78, 88, 62)))
    small.putdata([mix(darker(earth, 0.5), lighter(earth, 0.4), rng.random()) for _ in range(81)])
    image = small.resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(26):
        x, y, turn = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, math.pi)
        far = side * rng.uniform(0.03, 0.16)
        shade = mix(darker(earth, 0.4), (214, 196, 150), rng.random())
        pen.line(
            [(x, y), (x + far * math.cos(turn), y + far * math.sin(turn))],
            fill=shade,
            width=max(2, int(side * rng.uniform(0.004, 0.02))),
        )
    return image.filter(ImageFilter.BoxBlur(side / 200))
