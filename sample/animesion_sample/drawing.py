"""One picture of the sample world, from its plan to an image, and where the heads are in it.

A ``Picture`` holds everything that decides the pixels, so any process can draw any picture in any order and get the
same bytes. Encoding, and breaking what was encoded, is left to ``files``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from PIL import Image, ImageChops, ImageFilter

from animesion_sample import face, hair, headgear, outfits, scenes
from animesion_sample.characters import BY_NAME, CAST, Design
from animesion_sample.shapes import Colour, Pen, Point, affine, darker, lighter, oval

OVERSAMPLING = 2

GRID = 8
"""Pixels between possible edges of head boxes, and the step of picture sizes: a picture reduced by some eighths has its
box on whole pixels again, so a crop of it shows the same."""

LIGHTS: dict[str, tuple[Colour, Colour]] = {
    # The two ends of a diagonal of light that multiplies the picture.
    "day": ((255, 255, 255), (232, 228, 240)),
    "soft": ((255, 250, 240), (214, 206, 226)),
    "warm": ((255, 236, 206), (232, 190, 164)),
    "cool": ((216, 232, 255), (198, 206, 242)),
    "rose": ((255, 222, 232), (226, 186, 214)),
    "leafy": ((246, 255, 230), (206, 222, 202)),
    "lamp": ((255, 240, 204), (176, 146, 156)),
    "dim": ((206, 206, 226), (166, 162, 192)),
    "backlit": ((180, 172, 202), (255, 246, 226)),
    "evening": ((255, 214, 176), (190, 146, 176)),
    "night": ((118, 132, 206), (84, 92, 164)),
    "ember": ((255, 150, 104), (206, 92, 84)),
    "sepia": ((250, 220, 170), (214, 176, 128)),
}
_PLAIN_LIGHTS = ("day", "day", "soft", "soft", "warm", "cool", "rose", "leafy", "lamp", "dim", "backlit", "evening")
VARIANTS = ("night", "ember", "sepia", "other_expression", "other_clothes")


@dataclass(frozen=True)
class Drawing:
    """What decides the pixels of a picture.

    Attributes:
        seed: Decides everything that is drawn by lot.
        cast: Names of the characters drawn, left to right; empty for a still life.
        width: In pixels.
        height: In pixels.
        view: ``front``, or for a head that is hard to see ``back``, ``blurred`` or ``hidden``.
        variant: One of ``VARIANTS`` for another version of the picture with the same seed.
    """

    seed: str
    cast: tuple[str, ...]
    width: int
    height: int
    view: str = "front"
    variant: str = ""


@dataclass(frozen=True)
class Head:
    """How one head sits in a picture: its place and scale in pixels, its tilt, and where the box around it is."""

    design: Design
    x: float
    y: float
    scale: float
    tilt: float
    flip: bool
    box: tuple[float, float, float, float]


def stranger(seed: str) -> Design:
    """A face in the crowd: nobody with a tag, put together from parts of the cast."""
    lot = Random(f"{seed}/stranger")
    pick = [lot.choice(CAST) for _ in range(4)]
    return Design("", "original", scenes.hue(lot.random(), 0.5, 0.8), pick[0].eyes, pick[1].back, pick[2].fringe,
                  pick[3].outfit, scenes.hue(lot.random(), 0.5, 0.8), pick[0].trim)  # fmt: skip


def _design(picture: Drawing, name: str) -> Design:
    return BY_NAME[name] if name else stranger(picture.seed)


@lru_cache(maxsize=256)
def _extent(design: Design) -> tuple[Point, ...]:
    points = [*hair.extent(design.back), *oval(0.0, 0.0, 0.9, face.CHIN, 16)]
    for piece in design.gear:
        points += headgear.GEAR[piece][2]
    return tuple(points)


def heads(picture: Drawing) -> tuple[Head, ...]:
    """Where the heads of a picture are; the boxes are left, top, right, bottom relative to the picture, 0 to 1."""
    lot = Random(f"{picture.seed}/pose")
    if picture.variant.startswith("other"):
        lot.random()
    width, height, count = picture.width, picture.height, len(picture.cast)
    found = []
    for i, name in enumerate(picture.cast):
        design = _design(picture, name)
        tilt, flip = lot.uniform(-23.0, 23.0), lot.random() < 0.5
        unit = affine(1.0, tilt, flip)
        placed = [(unit[0] * x + unit[1] * y, unit[2] * x + unit[3] * y) for x, y in _extent(design)]
        left, right = min(x for x, _ in placed), max(x for x, _ in placed)
        top, bottom = min(y for _, y in placed), max(y for _, y in placed)
        # The head takes a share of the room it has: all of the picture, or its part of a row of heads.
        room = width / count
        share = lot.uniform(0.42, 0.8) if count == 1 else lot.uniform(0.6, 0.8)
        scale = min(share * height / (bottom - top), 0.9 * room / (right - left))
        spare_x, spare_y = room - scale * (right - left), height - scale * (bottom - top)
        x = i * room + lot.triangular(0.06, 0.94, 0.5) * spare_x - scale * left
        y = lot.triangular(0.05, 0.62, 0.22) * spare_y - scale * top
        # A detector's box is never exact: its edges err by a few hundredths of the head, and lie on a grid.
        err = [lot.uniform(-0.035, 0.035) for _ in range(4)]
        wide, high = scale * (right - left), scale * (bottom - top)
        step = GRID if min(width, height) > 80 else 1
        box = (
            max(0, step * round((x + scale * left + err[0] * wide) / step)) / width,
            max(0, step * round((y + scale * top + err[1] * high) / step)) / height,
            min(width, step * round((x + scale * right + err[2] * wide) / step)) / width,
            min(height, step * round((y + scale * bottom + err[3] * high) / step)) / height,
        )
        found.append(Head(design, x, y, scale, tilt, flip, box))
    return tuple(found)


def scene(picture: Drawing) -> str:
    """The tag of the background of a picture."""
    return Random(f"{picture.seed}{picture.variant}/scene").choice(list(scenes.SCENES))


def render(picture: Drawing) -> Image.Image:
    """Draw a picture, mode RGB."""
    size = (picture.width * OVERSAMPLING, picture.height * OVERSAMPLING)
    background = scenes.SCENES[scene(picture)]
    lot = Random(f"{picture.seed}{picture.variant}/background")
    image = background(size, lot)
    if not picture.cast:
        scenes.still_life(image, lot)
    for number, head in enumerate(heads(picture)):
        _draw_character(image, picture, head, number)
    scenes.foreground(image, lot)
    image = image.reduce(OVERSAMPLING)
    return _lit(image, picture)


def _draw_character(image: Image.Image, picture: Drawing, head: Head, number: int) -> None:
    lot = Random(f"{picture.seed}/{number}/look")
    look, turn, nod = lot.choice(face.EXPRESSIONS), lot.uniform(-1, 1), lot.uniform(-1, 1)
    design = head.design
    if picture.variant == "other_expression":
        look = face.EXPRESSIONS[(face.EXPRESSIONS.index(look) + 5) % len(face.EXPRESSIONS)]
        turn, nod = -turn, -nod
    elif picture.variant == "other_clothes":
        design = _dressed(design, lot)
    tone = lot.uniform(-0.17, 0.2)
    dyed = lighter(design.hair, tone) if tone > 0 else darker(design.hair, -tone)
    design = replace(design, hair=dyed)
    place = (head.x * OVERSAMPLING, head.y * OVERSAMPLING)
    scale = head.scale * OVERSAMPLING
    upright = Pen(image, place, scale, head.tilt * 0.3, head.flip)
    tilted = Pen(image, place, scale, head.tilt, head.flip)
    swing = Random(f"{picture.seed}/{number}/hair")
    hair.draw_back(upright, tilted, design, swing)
    outfits.draw_body(upright, design)
    headgear.draw_behind(tilted, design)
    if picture.view == "back":
        hair.draw_crown(tilted, design)
        for x in (-0.6, -0.2, 0.25, 0.62):
            tilted.line([(x * 0.3, -1.0), (x, -0.2), (x * 1.1, 0.7)], darker(design.hair, 0.3), 0.03)
        headgear.draw_before(tilted, design)
        return
    edge, tips = hair.fringe(design, swing)
    face.draw_skin(tilted, design, lot.uniform(-1, 1))
    hair.draw_shadow(tilted, design, edge)
    face.draw_features(tilted, design, look, turn, nod)
    hair.draw_front(tilted, design, edge, tips, swing)
    hair.draw_shade(tilted, design, swing)
    headgear.draw_before(tilted, design)
    if picture.view == "hidden":
        _hide(image, head, design, lot)


def _dressed(design: Design, lot: Random) -> Design:
    other = lot.choice([d for d in CAST if d.outfit != design.outfit])
    return replace(design, outfit=other.outfit, cloth=other.cloth)


def _hide(image: Image.Image, head: Head, design: Design, lot: Random) -> None:
    """A fan or a book held before most of the face."""
    pen = Pen(image, (head.x * OVERSAMPLING, head.y * OVERSAMPLING), head.scale * OVERSAMPLING, lot.uniform(-20, 20))
    colour = scenes.hue(lot.random(), 0.5, 0.85)
    pen.fill([(-1.2, -0.25), (1.2, -0.25), (1.2, 1.3), (-1.2, 1.3)], colour, darker(colour, 0.6), 0.05)
    pen.line([(0.0, -0.2), (0.0, 1.26)], darker(colour, 0.4), 0.05)
    for y in (0.1, 0.4, 0.7, 1.0):
        pen.line([(-1.0, y), (-0.2, y)], darker(colour, 0.2), 0.04)
        pen.line([(0.2, y), (1.0, y)], darker(colour, 0.2), 0.04)


def _lit(image: Image.Image, picture: Drawing) -> Image.Image:
    lot = Random(f"{picture.seed}{picture.variant}/light")
    name = picture.variant if picture.variant in LIGHTS else lot.choice(_PLAIN_LIGHTS)
    ends = LIGHTS[name]
    dim = lot.uniform(0.84, 1.0)
    start, end = (tuple(round(c * dim) for c in colour) for colour in ends)
    middle = tuple((a + b) // 2 for a, b in zip(start, end, strict=True))
    corners = Image.new("RGB", (2, 2))
    corners.putdata(lot.choice(([start, middle, middle, end], [middle, start, end, middle], [start, start, end, end])))
    if picture.variant == "sepia":
        image = image.convert("L").convert("RGB")
    image = ImageChops.multiply(image, corners.resize(image.size, Image.Resampling.BILINEAR))
    haze = scenes.hue(lot.random(), 0.35, lot.uniform(0.5, 1.0))
    image = Image.blend(image, Image.new("RGB", image.size, haze), lot.uniform(0.0, 0.16))
    if picture.view == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(max(3.0, min(image.size) / 40)))
    return image
