"""Scenes without end to learn from: faces on grounds, windows of labelled illustrations, and pages of both.

A scene depends on nothing but the material and its random generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from animesion_training.detection.labels import Labelled, Material

Pixels = NDArray[Any]
"""RGB of 8 bits, shape (height, width, 3)."""

CROP_SHARE = 0.87
"""Side of a box as a share of the face crop's, which shows some hair and ground around the face."""

TIGHT_SHARE = 1.15
"""Side of a box as a multiple of that of a label, which reaches from the hairline to the chin."""

LEAST = 11.0
"""Side in pixels below which a face neither counts nor is ground."""

_VISIBLE = 0.45
"""Share of a box that a window must show for it to count; less is neither right nor wrong."""

_SKIN = ((255, 224, 200), (250, 208, 180), (240, 190, 156), (200, 146, 110), (150, 100, 74), (255, 236, 224))


@dataclass
class Scene:
    """An image and what is in it.

    Attributes:
        pixels: RGB, shape (height, width, 3).
        faces: left, top, right, bottom in pixels.
        ignored: areas that are neither faces nor free of them, as `faces`.
    """

    pixels: Pixels
    faces: list[tuple[float, float, float, float]] = field(default_factory=list)
    ignored: list[tuple[float, float, float, float]] = field(default_factory=list)


def decoded(content: bytes) -> Pixels | None:
    """RGB pixels of an encoded image; None if OpenCV cannot read it."""
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return None if found is None else np.ascontiguousarray(found[:, :, ::-1])


def compose(material: Material, side: int, rng: Random) -> Scene:
    """One scene of `side` x `side` pixels, changed in its colours.

    Args:
        material: faces, grounds and illustrations; at least one of them is there.
        side: of the scene, in pixels.
        rng: source of all that is random.
    """
    scene = (_page if rng.random() < 0.15 else _one)(material, side, side, rng)
    if rng.random() < 0.5:
        scene = _mirrored(scene)
    scene.pixels = _recoloured(scene.pixels, rng)
    return scene


def single(face: Pixels, side: int, share: float, rng: Random) -> Scene:
    """One face crop anywhere on a drawn ground, among drawn things that are none.

    Args:
        face: the crop, square.
        side: of the scene, in pixels.
        share: side of the crop as a share of the scene's, above 0 to 1.
        rng: source of all that is random.
    """
    scene = Scene(_ground(Material(), side, side, rng))
    for _ in range(rng.randint(3, 8)):
        _distract(scene.pixels, rng)
    extent = side * share
    x, y = (rng.uniform(extent / 2, side - extent / 2) for _ in range(2))
    if rng.random() < 0.5:
        _body(scene.pixels, face, x, y, extent, rng)
    _paste(scene, face, x, y, extent, rng.choice(("square", "soft")), rng)
    return scene


def _one(material: Material, width: int, height: int, rng: Random) -> Scene:
    """A scene of one kind."""
    if (material.illustrations and rng.random() < material.share) or not material.faces:
        return _window(rng.choice(material.illustrations), width, height, rng)
    return _pasted(material, width, height, rng)


def _page(material: Material, width: int, height: int, rng: Random) -> Scene:
    """Panels of a comic page, each a scene."""
    gap = rng.choice((0, 2, 4, 8))
    page = Scene(np.full((height, width, 3), rng.choice((255, 255, 250, 0)), np.uint8))
    down = rng.random() < 0.5
    whole = height if down else width
    cut = int(whole * rng.uniform(0.3, 0.7))
    for start, end in ((0, cut - gap), (cut, whole)):
        size = (width, end - start) if down else (end - start, height)
        if min(size) < 48:
            continue
        made = (_page if min(size) > 140 and rng.random() < 0.4 else _one)(material, *size, rng)
        x, y = (0, start) if down else (start, 0)
        page.pixels[y : y + size[1], x : x + size[0]] = made.pixels
        for kept, new in ((page.faces, made.faces), (page.ignored, made.ignored)):
            kept.extend((left + x, top + y, right + x, bottom + y) for left, top, right, bottom in new)
    return page


def _window(labelled: Labelled, width: int, height: int, rng: Random) -> Scene:
    """A window of an illustration: all of it, or around a face, or anywhere; turned, mostly a little."""
    image = decoded(labelled.content)
    if image is None:
        return Scene(np.full((height, width, 3), 128, np.uint8))
    rows, columns = image.shape[:2]
    fit = min(width / columns, height / rows)
    faces = [box for box, counts in labelled.boxes if counts]
    x, y = columns / 2, rows / 2
    scale = fit * rng.uniform(0.8, 1.1)
    if faces and rng.random() < 0.7:
        left, top, right, bottom = rng.choice(faces)
        extent = max(right - left, bottom - top, 1.0)
        side = math.exp(rng.uniform(math.log(14), math.log(0.9 * min(width, height))))
        # no more than three times as large as it is: there is nothing to see in blur
        scale = min(side / extent, 3.0)
        scale = max(scale, 0.6 * fit)
        x = (left + right) / 2 + rng.uniform(-0.5, 0.5) * width / scale
        y = (top + bottom) / 2 + rng.uniform(-0.5, 0.5) * height / scale
    elif rng.random() < 0.5:
        scale = fit * math.exp(rng.uniform(0, math.log(3)))
        x, y = rng.uniform(0, columns), rng.uniform(0, rows)
    # nothing beyond the image's edge but what cannot be avoided
    half_wide, half_high = width / scale / 2, height / scale / 2
    x = columns / 2 if half_wide * 2 >= columns else min(max(x, half_wide), columns - half_wide)
    y = rows / 2 if half_high * 2 >= rows else min(max(y, half_high), rows - half_high)
    if scale < 0.6:
        image = cv2.resize(
            image, (max(1, round(columns * scale)), max(1, round(rows * scale))), interpolation=cv2.INTER_AREA
        )
    shrunk = image.shape[1] / columns, image.shape[0] / rows
    angle = 0.0
    if rng.random() < 0.4:
        angle = rng.gauss(0, 14) if rng.random() < 0.85 else rng.uniform(-180, 180)
    stretch = math.exp(rng.gauss(0, 0.05))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    across, down = scale * stretch, scale / stretch
    turn = np.array([[cos * across, -sin * down], [sin * across, cos * down]])  # original pixels to the window's
    shift = np.array([width / 2, height / 2]) - turn @ np.array([x, y])
    matrix = np.column_stack([turn / np.array(shrunk), shift])
    border = tuple(int(v) for v in rng.choice((image[0, 0], image[-1, -1], np.array([255, 255, 255]))))
    pixels = cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=border
    )
    scene = Scene(pixels)
    for (left, top, right, bottom), counts in labelled.boxes:
        mx, my = turn @ np.array([(left + right) / 2, (top + bottom) / 2]) + shift
        wide, high = (right - left) * across * TIGHT_SHARE, (bottom - top) * down * TIGHT_SHARE
        # a face that is turned far is as wide as it is high
        blend = abs(sin)
        wide, high = wide * (1 - blend) + high * blend, high * (1 - blend) + wide * blend
        _add(scene, mx, my, wide, high, counts=counts)
    return scene


def _add(scene: Scene, x: float, y: float, wide: float, high: float, *, counts: bool) -> None:
    """Note a box by its centre and size; the part of it that the scene shows."""
    rows, columns = scene.pixels.shape[:2]
    left, right = max(0.0, x - wide / 2), min(float(columns), x + wide / 2)
    top, bottom = max(0.0, y - high / 2), min(float(rows), y + high / 2)
    if right <= left or bottom <= top:
        return
    seen = (right - left) * (bottom - top) / (wide * high)
    if counts and seen >= _VISIBLE and math.sqrt(wide * high) >= LEAST:
        scene.faces.append((left, top, right, bottom))
    else:
        scene.ignored.append((left, top, right, bottom))


def _pasted(material: Material, width: int, height: int, rng: Random) -> Scene:
    """Faces on a ground, among things that are none."""
    scene = Scene(_ground(material, width, height, rng))
    for _ in range(rng.choice((0, 1, 2, 4))):
        _distract(scene.pixels, rng)
    short = min(width, height)
    taken: list[tuple[float, float, float, Pixels]] = []
    count = rng.choice((0, 1, 1, 2, 3, 4, 6))
    for _ in range(count):
        most = short * (1.0 if count == 1 else 0.55)
        side = math.exp(rng.uniform(math.log(14), math.log(max(15.0, most))))
        edge = side * (0.35 if rng.random() < 0.12 else 0.0)  # how far it may reach out of the scene
        x = rng.uniform(side / 2 - edge, max(side / 2, width - side / 2 + edge))
        y = rng.uniform(side / 2 - edge, max(side / 2, height - side / 2 + edge))
        face = decoded(rng.choice(material.faces))
        if face is None or any(max(abs(x - u), abs(y - v)) < 0.5 * (side + s) for u, v, s, _ in taken):
            continue
        taken.append((x, y, side, np.ascontiguousarray(face[:, ::-1]) if rng.random() < 0.5 else face))
    if material.faces and rng.random() < 0.3:
        _patch(scene.pixels, material, rng)
    kinds = [rng.choice(("square", "square", "soft", "soft", "turned")) for _ in taken]
    for (x, y, side, face), kind in zip(taken, kinds, strict=True):  # first, so that none hides a face
        if kind != "square" and rng.random() < 0.6:
            _body(scene.pixels, face, x, y, side, rng)
    for (x, y, side, face), kind in zip(taken, kinds, strict=True):
        _paste(scene, face, x, y, side, kind, rng)
    if rng.random() < 0.3:
        _distract(scene.pixels, rng, small=True)
    return scene


def _patch(pixels: Pixels, material: Material, rng: Random) -> None:
    """Paste squares without a face, so that a pasted edge is no sign of one: other grounds, and hair alone."""
    rows, columns = pixels.shape[:2]
    for _ in range(rng.randint(1, 3)):
        side = int(math.exp(rng.uniform(math.log(14), math.log(0.5 * min(rows, columns)))))
        x, y = rng.randint(0, columns - side), rng.randint(0, rows - side)
        if rng.random() < 0.5:
            part = _ground(material, side, side, rng)
        else:
            face = decoded(rng.choice(material.faces))
            if face is None:
                continue
            strip = max(1, len(face) // 5)
            start = rng.randint(0, len(face) - strip)
            part = cv2.resize(face[:strip, start : start + strip], (side, side), interpolation=cv2.INTER_LINEAR)
        pixels[y : y + side, x : x + side] = part


def _paste(scene: Scene, face: Pixels, x: float, y: float, side: float, kind: str, rng: Random) -> None:
    """Put a face crop in a scene: as a `square`, `turned`, or cut out with `soft` edges."""
    rows, columns = scene.pixels.shape[:2]
    if rng.random() < 0.5:
        face = _recoloured(face, rng, slight=True)
    extent = face.shape[0]
    scale = side / extent
    if scale < 0.6:
        small = max(2, round(side))
        face = cv2.resize(face, (small, small), interpolation=cv2.INTER_AREA)
        extent, scale = small, side / small
    mask: Pixels = np.full((extent, extent), 255, np.uint8)
    if kind == "soft" or (kind == "turned" and rng.random() < 0.7):
        mask[:] = 0
        axes = (max(1, int(extent * rng.uniform(0.42, 0.52))), max(1, int(extent * rng.uniform(0.42, 0.52))))
        cv2.ellipse(mask, (extent // 2, extent // 2), axes, 0, 0, 360, 255, -1)
        if (blur := extent * rng.choice((0.0, 0.03, 0.07))) > 0.3:
            mask = cv2.GaussianBlur(mask, (0, 0), blur)
    angle = 0.0
    if kind == "turned":
        angle = rng.gauss(0, 22) if rng.random() < 0.85 else rng.uniform(-180, 180)
    cos, sin = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
    reach = int(side * 0.75) + 2
    left, top = int(x) - reach, int(y) - reach
    window = (max(0, left), max(0, top), min(columns, left + 2 * reach), min(rows, top + 2 * reach))
    wide, high = window[2] - window[0], window[3] - window[1]
    if wide <= 0 or high <= 0:
        return
    middle = (extent - 1) / 2
    dx, dy = x - 0.5 - window[0], y - 0.5 - window[1]
    matrix = np.array(
        [[cos, -sin, dx - cos * middle + sin * middle], [sin, cos, dy - sin * middle - cos * middle]], np.float64
    )
    drawn = cv2.warpAffine(face, matrix, (wide, high), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    alpha = cv2.warpAffine(mask, matrix, (wide, high), flags=cv2.INTER_LINEAR)
    place = scene.pixels[window[1] : window[3], window[0] : window[2]]
    weight = alpha[:, :, None].astype(np.uint16)
    place[:] = ((drawn * weight + place * (255 - weight) + 127) // 255).astype(np.uint8)
    box = side * CROP_SHARE
    if rng.random() < 0.1:
        _cover(scene.pixels, x, y, box, rng)
    _add(scene, x, y, box, box, counts=True)


def _body(pixels: Pixels, face: Pixels, x: float, y: float, side: float, rng: Random) -> None:
    """Hair behind a face in the colour of its upper edge, and shoulders below in any."""
    hair = tuple(int(v) for v in face[: max(1, len(face) // 8)].reshape(-1, 3).mean(0))
    skin = tuple(int(v) for v in rng.choice(_SKIN))
    cloth = tuple(rng.randrange(256) for _ in range(3))
    wide, long = side * rng.uniform(0.55, 0.75), side * rng.uniform(0.55, 1.1)
    cv2.ellipse(
        pixels, (int(x), int(y + 0.3 * (long - wide))), (int(wide), int(long)), 0, 0, 360, hair, -1, cv2.LINE_AA
    )
    neck = side * rng.uniform(0.12, 0.2)
    low = y + side * rng.uniform(0.55, 0.75)
    _polygon(pixels, [(x - neck, y), (x + neck, y), (x + neck, low), (x - neck, low)], skin)
    shoulder, hip = side * rng.uniform(0.5, 0.9), side * rng.uniform(0.4, 1.0)
    end = low + side * rng.uniform(0.8, 3.0)
    _polygon(pixels, [(x - shoulder, low), (x + shoulder, low), (x + hip, end), (x - hip, end)], cloth)


def _cover(pixels: Pixels, x: float, y: float, side: float, rng: Random) -> None:
    """Hide a third of a face behind a shape."""
    colour = tuple(int(v) for v in (rng.choice(_SKIN) if rng.random() < 0.5 else [rng.randrange(256)] * 3))
    angle = rng.uniform(0, 2 * math.pi)
    cx, cy = x + 0.42 * side * math.cos(angle), y + 0.42 * side * math.sin(angle)
    axes = (max(1, int(side * rng.uniform(0.12, 0.3))), max(1, int(side * rng.uniform(0.12, 0.3))))
    cv2.ellipse(pixels, (int(cx), int(cy)), axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)


def _ground(material: Material, width: int, height: int, rng: Random) -> Pixels:
    """A ground: one of the material's, a part of an illustration without faces, a plain or shaded one, or noise."""
    if material.illustrations and rng.random() < 0.4:
        bare = _bare(rng.choice(material.illustrations), rng)
        if bare is not None:
            return np.ascontiguousarray(cv2.resize(bare, (width, height), interpolation=cv2.INTER_AREA))
    if material.grounds and rng.random() < 0.8:
        image = decoded(rng.choice(material.grounds))
        if image is not None:
            rows, columns = image.shape[:2]
            share = rng.uniform(0.5, 1.0)
            wide, high = max(8, int(columns * share)), max(8, int(rows * share))
            x, y = rng.randint(0, max(0, columns - wide)), rng.randint(0, max(0, rows - high))
            part = image[y : y + high, x : x + wide]
            if rng.random() < 0.2:
                part = np.rot90(part, rng.randrange(1, 4))
            return np.ascontiguousarray(cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA))
    corners = np.array([[[rng.randrange(256) for _ in range(3)] for _ in range(2)] for _ in range(2)], np.uint8)
    if rng.random() < 0.4:
        corners[:] = corners[0, 0] if rng.random() < 0.5 else 255
    ground: Pixels = cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.3:
        coarse = max(2, int(min(width, height) / rng.choice((2, 6, 20, 60))))
        noise = np.random.default_rng(rng.getrandbits(64)).integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
        ground = cv2.addWeighted(ground, 0.6, cv2.resize(noise, (width, height)), 0.4, 0)
    return np.ascontiguousarray(ground)


def _bare(labelled: Labelled, rng: Random) -> Pixels | None:
    """A part of an illustration that no box comes near; None if a few attempts find none."""
    image = decoded(labelled.content)
    if image is None:
        return None
    rows, columns = image.shape[:2]
    for _ in range(8):
        wide, high = (rng.randint(side // 5, side) for side in (columns, rows))
        x, y = rng.randint(0, columns - wide), rng.randint(0, rows - high)
        part = image[y : y + high, x : x + wide]
        if min(wide, high) < 32 or part.std() < 16:  # nothing to learn from a plain ground
            continue
        if not any(
            x < 1.4 * right - 0.4 * left and x + wide > 1.4 * left - 0.4 * right
            and y < 1.4 * bottom - 0.4 * top and y + high > 1.4 * top - 0.4 * bottom
            for (left, top, right, bottom), _ in labelled.boxes
        ):  # fmt: skip
            return part
    return None


def _polygon(pixels: Pixels, corners: Sequence[tuple[float, float]], colour: Any) -> None:
    points = np.array(corners).round().astype(np.int32)
    cv2.fillPoly(pixels, [points], colour, cv2.LINE_AA)
    cv2.polylines(pixels, [points], True, tuple(int(v * 0.4) for v in colour), 1, cv2.LINE_AA)


def _distract(pixels: Pixels, rng: Random, *, small: bool = False) -> None:
    """Draw what is no face: limbs, writing, speech bubbles, rounded and angular shapes, hair, buttons, screen tone."""
    choose: Callable[[Pixels, float, Random], None] = rng.choice(
        (_writing, _strokes) if small else (_limb, _writing, _bubble, _shapes, _strokes, _buttons, _tone)
    )
    choose(pixels, min(pixels.shape[:2]) * (0.3 if small else 1.0), rng)


def _somewhere(pixels: Pixels, rng: Random) -> tuple[int, int]:
    return rng.randrange(pixels.shape[1]), rng.randrange(pixels.shape[0])


def _limb(pixels: Pixels, size: float, rng: Random) -> None:
    x, y = _somewhere(pixels, rng)
    skin = tuple(int(v) for v in rng.choice(_SKIN))
    thick, angle = max(3, int(size * rng.uniform(0.04, 0.22))), rng.uniform(0, 2 * math.pi)
    points = [(x, y)]
    for _ in range(2):
        angle += rng.uniform(-0.9, 0.9)
        reach = size * rng.uniform(0.15, 0.45)
        x, y = int(x + reach * math.cos(angle)), int(y + reach * math.sin(angle))
        points.append((x, y))
    line = np.array(points, np.int32)
    cv2.polylines(pixels, [line], False, tuple(int(v * 0.45) for v in skin), thick + 2, cv2.LINE_AA)
    cv2.polylines(pixels, [line], False, skin, thick, cv2.LINE_AA)
    cv2.circle(pixels, points[-1], int(thick * 0.7), skin, -1, cv2.LINE_AA)


def _writing(pixels: Pixels, size: float, rng: Random) -> None:
    x, y = _somewhere(pixels, rng)
    height = size * rng.uniform(0.04, 0.2)
    colour = rng.choice(((0, 0, 0), (255, 255, 255), tuple(rng.randrange(256) for _ in range(3))))
    for line in range(rng.randint(1, 3)):
        text = "".join(rng.choice("OQCDGABR08&@%S#ou.:") for _ in range(rng.randint(2, 9)))
        cv2.putText(
            pixels, text, (x - int(height), y + int(line * height * 1.3)), rng.randrange(8), height / 22, colour,
            max(1, int(height / 10)), cv2.LINE_AA,
        )  # fmt: skip


def _bubble(pixels: Pixels, size: float, rng: Random) -> None:
    x, y = _somewhere(pixels, rng)
    axes = (max(4, int(size * rng.uniform(0.08, 0.3))), max(4, int(size * rng.uniform(0.08, 0.3))))
    cv2.ellipse(pixels, (x, y), axes, 0, 0, 360, (255, 255, 255), -1, cv2.LINE_AA)
    cv2.ellipse(pixels, (x, y), axes, 0, 0, 360, (20, 20, 20), 1, cv2.LINE_AA)
    for column in range(-1, 2):
        for row in range(rng.randint(2, 5)):
            place = (x + column * axes[0] // 2, y - axes[1] // 2 + row * max(5, axes[1] // 3))
            cv2.putText(pixels, rng.choice("#8&@XHK"), place, 0, max(0.2, axes[1] / 90), (20, 20, 20), 1, cv2.LINE_AA)


def _shapes(pixels: Pixels, size: float, rng: Random) -> None:
    for _ in range(rng.randint(1, 4)):
        x, y = _somewhere(pixels, rng)
        colour = tuple(int(v) for v in (rng.choice(_SKIN) if rng.random() < 0.5 else [rng.randrange(256)] * 3))
        reach = size * rng.uniform(0.04, 0.3)
        if rng.random() < 0.5:
            axes = (max(2, int(reach)), max(2, int(reach * rng.uniform(0.5, 1.5))))
            cv2.ellipse(pixels, (x, y), axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
            cv2.ellipse(pixels, (x, y), axes, 0, 0, 360, tuple(int(v * 0.5) for v in colour), 1, cv2.LINE_AA)
        else:
            turns = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 6)))
            _polygon(pixels, [(x + reach * math.cos(t), y + reach * math.sin(t)) for t in turns], colour)


def _strokes(pixels: Pixels, size: float, rng: Random) -> None:
    x, y = _somewhere(pixels, rng)
    colour, angle = tuple(rng.randrange(256) for _ in range(3)), rng.uniform(0, 2 * math.pi)
    for _ in range(rng.randint(6, 20)):
        a, reach = angle + rng.gauss(0, 0.2), size * rng.uniform(0.2, 0.6)
        u, v = x + size * rng.gauss(0, 0.08), y + size * rng.gauss(0, 0.08)
        shade = tuple(min(255, max(0, int(c * rng.uniform(0.6, 1.3)))) for c in colour)
        end = (int(u + reach * math.cos(a)), int(v + reach * math.sin(a)))
        cv2.line(pixels, (int(u), int(v)), end, shade, rng.randint(1, max(2, int(size / 60))), cv2.LINE_AA)


def _buttons(pixels: Pixels, size: float, rng: Random) -> None:
    """Round things in pairs and rows, which may look like eyes, on cloth."""
    x, y = _somewhere(pixels, rng)
    cloth = tuple(rng.randrange(256) for _ in range(3))
    reach = size * rng.uniform(0.08, 0.3)
    _polygon(pixels, [(x - reach, y - reach), (x + reach, y - reach), (x + reach, y + reach), (x - reach, y + reach)],
             cloth)  # fmt: skip
    colour, radius = tuple(rng.randrange(256) for _ in range(3)), max(1, int(reach * rng.uniform(0.06, 0.2)))
    columns = rng.choice((1, 1, 2))
    for row in range(rng.randint(1, 4)):
        for column in range(columns):
            place = (int(x + (column - (columns - 1) / 2) * reach), int(y - reach * 0.7 + row * reach * 0.5))
            cv2.circle(pixels, place, radius, colour, -1, cv2.LINE_AA)
            cv2.circle(pixels, place, radius, (30, 30, 30), 1, cv2.LINE_AA)


def _tone(pixels: Pixels, size: float, rng: Random) -> None:
    """Screen tone of a comic: dots on a part of the scene."""
    x, y = _somewhere(pixels, rng)
    wide, high, step = int(size * rng.uniform(0.2, 0.8)), int(size * rng.uniform(0.2, 0.8)), rng.randint(3, 8)
    part = pixels[y : y + high, x : x + wide]
    rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
    dots = (rows % step - step // 2) ** 2 + (columns % step - step // 2) ** 2 <= (step * 0.3) ** 2
    part[dots] = rng.choice((0, 60, 255))


def _mirrored(scene: Scene) -> Scene:
    width = scene.pixels.shape[1]

    def turned(boxes: list[tuple[float, float, float, float]]) -> list[tuple[float, float, float, float]]:
        return [(width - right, top, width - left, bottom) for left, top, right, bottom in boxes]

    return Scene(np.ascontiguousarray(scene.pixels[:, ::-1]), turned(scene.faces), turned(scene.ignored))


def _recoloured(pixels: Pixels, rng: Random, *, slight: bool = False) -> Pixels:
    """Other light, contrast and hue; sometimes grey, blurred, grainy or compressed hard."""
    strength = 0.4 if slight else 1.0
    if rng.random() < 0.7:
        levels = np.arange(256, dtype=np.float32)[:, None] / 255
        gamma = math.exp(rng.gauss(0, 0.25 * strength))
        gains = np.array([math.exp(rng.gauss(0, 0.1 * strength)) for _ in range(3)], np.float32)
        table = (levels**gamma * gains * math.exp(rng.gauss(0, 0.1 * strength)) + rng.gauss(0, 0.04 * strength)) * 255
        pixels = cv2.LUT(pixels, table.clip(0, 255).astype(np.uint8)[None].reshape(1, 256, 3))
    if slight:
        return pixels
    if rng.random() < 0.15:
        order = rng.choice(((0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)))
        pixels = np.ascontiguousarray(pixels[:, :, order])
    if rng.random() < 0.14:
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        tint = np.array(rng.choice(((1, 1, 1), (1, 1, 1), (1.0, 0.92, 0.78))), np.float32)
        pixels = (grey[:, :, None] * tint).astype(np.uint8)
    kind = rng.random()
    if kind < 0.08:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.4, 1.4))
    elif kind < 0.14:
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, rng.uniform(2, 14), pixels.shape)
        pixels = (pixels + noise).clip(0, 255).astype(np.uint8)
    elif kind < 0.24:
        _, packed = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, rng.randint(20, 70)])
        pixels = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR))
    return np.ascontiguousarray(pixels)
