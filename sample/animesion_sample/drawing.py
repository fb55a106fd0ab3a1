"""Images of the sample world and the boxes of their heads.

A ``Drawing`` determines all pixels, so any process can draw any image in any order and get the same bytes. Images are
encoded, and damaged, in ``files``.
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
"""Pixels between possible edges of head boxes, and the step of image sizes: an image reduced by some eighths has its
box on whole pixels again, so a crop of it shows the same."""

LIGHTS: dict[str, tuple[Colour, Colour]] = {
    # The two ends of a diagonal of light that multiplies the image.
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
    """The specification of an image, which determines its pixels.

    Attributes:
        seed: Seed of all random choices.
        cast: Names of the characters drawn, left to right; empty for a still life.
        width: In pixels.
        height: In pixels.
        view: ``front``, or ``back``, ``blurred`` or ``hidden`` for a head that is hard to see.
        variant: One of ``VARIANTS`` for another version of the image with the same seed.
    """

    seed: str
    cast: tuple[str, ...]
    width: int
    height: int
    view: str = "front"
    variant: str = ""


@dataclass(frozen=True)
class Head:
    """Pose of one head: position and scale in pixels, tilt in degrees, and the box relative to the image."""

    design: Design
    x: float
    y: float
    scale: float
    tilt: float
    flip: bool
    box: tuple[float, float, float, float]


def untagged_design(seed: str) -> Design:
    """A character without a tag, composed of parts of the cast."""
    rng = Random(f"{seed}/stranger")
    pick = [rng.choice(CAST) for _ in range(4)]
    return Design("", "original", scenes.hue(rng.random(), 0.5, 0.8), pick[0].eyes, pick[1].back, pick[2].fringe,
                  pick[3].outfit, scenes.hue(rng.random(), 0.5, 0.8), pick[0].trim)  # fmt: skip


def _design(drawing: Drawing, name: str) -> Design:
    return BY_NAME[name] if name else untagged_design(drawing.seed)


@lru_cache(maxsize=256)
def _extent(design: Design) -> tuple[Point, ...]:
    points = [*hair.extent(design.back), *oval(0.0, 0.0, 0.9, face.CHIN, 16)]
    for piece in design.gear:
        points += headgear.GEAR[piece][2]
    return tuple(points)


def heads(drawing: Drawing) -> tuple[Head, ...]:
    """The heads of an image; boxes are left, top, right, bottom relative to the image, in [0, 1]."""
    rng = Random(f"{drawing.seed}/pose")
    if drawing.variant.startswith("other"):
        rng.random()
    width, height, count = drawing.width, drawing.height, len(drawing.cast)
    found = []
    for i, name in enumerate(drawing.cast):
        design = _design(drawing, name)
        tilt, flip = rng.uniform(-23.0, 23.0), rng.random() < 0.5
        unit = affine(1.0, tilt, flip)
        placed = [(unit[0] * x + unit[1] * y, unit[2] * x + unit[3] * y) for x, y in _extent(design)]
        left, right = min(x for x, _ in placed), max(x for x, _ in placed)
        top, bottom = min(y for _, y in placed), max(y for _, y in placed)
        # The head fills a share of its room: the whole image, or one column per head.
        room = width / count
        share = rng.uniform(0.42, 0.8) if count == 1 else rng.uniform(0.6, 0.8)
        scale = min(share * height / (bottom - top), 0.9 * room / (right - left))
        spare_x, spare_y = room - scale * (right - left), height - scale * (bottom - top)
        x = i * room + rng.triangular(0.06, 0.94, 0.5) * spare_x - scale * left
        y = rng.triangular(0.05, 0.62, 0.22) * spare_y - scale * top
        # Boxes of detectors are inexact: edges are off by a few hundredths of the head, and are on a grid.
        err = [rng.uniform(-0.035, 0.035) for _ in range(4)]
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


def scene(drawing: Drawing) -> str:
    """The tag of an image's background."""
    return Random(f"{drawing.seed}{drawing.variant}/scene").choice(list(scenes.SCENES))


def render(drawing: Drawing) -> Image.Image:
    """Draw an image, mode RGB, size (width, height) of the drawing."""
    size = (drawing.width * OVERSAMPLING, drawing.height * OVERSAMPLING)
    background = scenes.SCENES[scene(drawing)]
    rng = Random(f"{drawing.seed}{drawing.variant}/background")
    image = background(size, rng)
    if not drawing.cast:
        scenes.still_life(image, rng)
    for number, head in enumerate(heads(drawing)):
        _draw_character(image, drawing, head, number)
    scenes.foreground(image, rng)
    image = image.reduce(OVERSAMPLING)
    return _apply_light(image, drawing)


def _draw_character(image: Image.Image, drawing: Drawing, head: Head, number: int) -> None:
    rng = Random(f"{drawing.seed}/{number}/look")
    look, turn, nod = rng.choice(face.EXPRESSIONS), rng.uniform(-1, 1), rng.uniform(-1, 1)
    design = head.design
    if drawing.variant == "other_expression":
        look = face.EXPRESSIONS[(face.EXPRESSIONS.index(look) + 5) % len(face.EXPRESSIONS)]
        turn, nod = -turn, -nod
    elif drawing.variant == "other_clothes":
        design = _change_clothes(design, rng)
    tone = rng.uniform(-0.17, 0.2)
    dyed = lighter(design.hair, tone) if tone > 0 else darker(design.hair, -tone)
    design = replace(design, hair=dyed)
    place = (head.x * OVERSAMPLING, head.y * OVERSAMPLING)
    scale = head.scale * OVERSAMPLING
    upright = Pen(image, place, scale, head.tilt * 0.3, head.flip)
    tilted = Pen(image, place, scale, head.tilt, head.flip)
    swing = Random(f"{drawing.seed}/{number}/hair")
    hair.draw_back(upright, tilted, design, swing)
    outfits.draw_body(upright, design)
    headgear.draw_behind(tilted, design)
    if drawing.view == "back":
        hair.draw_crown(tilted, design)
        for x in (-0.6, -0.2, 0.25, 0.62):
            tilted.line([(x * 0.3, -1.0), (x, -0.2), (x * 1.1, 0.7)], darker(design.hair, 0.3), 0.03)
        headgear.draw_before(tilted, design)
        return
    edge, tips = hair.fringe(design, swing)
    face.draw_skin(tilted, design, rng.uniform(-1, 1))
    hair.draw_shadow(tilted, design, edge)
    face.draw_features(tilted, design, look, turn, nod)
    hair.draw_front(tilted, design, edge, tips, swing)
    hair.draw_shade(tilted, design, swing)
    headgear.draw_before(tilted, design)
    if drawing.view == "hidden":
        _hide(image, head, design, rng)


def _change_clothes(design: Design, rng: Random) -> Design:
    other = rng.choice([d for d in CAST if d.outfit != design.outfit])
    return replace(design, outfit=other.outfit, cloth=other.cloth)


def _hide(image: Image.Image, head: Head, design: Design, rng: Random) -> None:
    """Draw a fan or a book in front of most of the face."""
    pen = Pen(image, (head.x * OVERSAMPLING, head.y * OVERSAMPLING), head.scale * OVERSAMPLING, rng.uniform(-20, 20))
    colour = scenes.hue(rng.random(), 0.5, 0.85)
    pen.fill([(-1.2, -0.25), (1.2, -0.25), (1.2, 1.3), (-1.2, 1.3)], colour, darker(colour, 0.6), 0.05)
    pen.line([(0.0, -0.2), (0.0, 1.26)], darker(colour, 0.4), 0.05)
    for y in (0.1, 0.4, 0.7, 1.0):
        pen.line([(-1.0, y), (-0.2, y)], darker(colour, 0.2), 0.04)
        pen.line([(0.2, y), (1.0, y)], darker(colour, 0.2), 0.04)


def _apply_light(image: Image.Image, drawing: Drawing) -> Image.Image:
    rng = Random(f"{drawing.seed}{drawing.variant}/light")
    name = drawing.variant if drawing.variant in LIGHTS else rng.choice(_PLAIN_LIGHTS)
    ends = LIGHTS[name]
    dim = rng.uniform(0.84, 1.0)
    start, end = (tuple(round(c * dim) for c in colour) for colour in ends)
    middle = tuple((a + b) // 2 for a, b in zip(start, end, strict=True))
    corners = Image.new("RGB", (2, 2))
    corners.putdata(rng.choice(([start, middle, middle, end], [middle, start, end, middle], [start, start, end, end])))
    if drawing.variant == "sepia":
        image = image.convert("L").convert("RGB")
    image = ImageChops.multiply(image, corners.resize(image.size, Image.Resampling.BILINEAR))
    haze = scenes.hue(rng.random(), 0.35, rng.uniform(0.5, 1.0))
    image = Image.blend(image, Image.new("RGB", image.size, haze), rng.uniform(0.0, 0.16))
    if drawing.view == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(max(3.0, min(image.size) / 40)))
    return image
