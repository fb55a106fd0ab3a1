"""Hostile and odd images: each decodes upright to RGB, or is refused for the right reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from animesion.images import codec
from animesion.images.codec import Limits, RejectedImageError
from animesion.schemas import Box

LIMITS = Limits()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def scene(mode: str = "RGB") -> Image.Image:
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :30] = (250, 10, 10)
    pixels[20:, 30:] = (10, 10, 250)
    return Image.fromarray(pixels).convert(mode)


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def reason(content: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(RejectedImageError) as caught:
        codec.decode(content, limits)
    return caught.value.reason


JPEG = saved(scene(), "JPEG", quality=95)
PNG = saved(scene(), "PNG")


@pytest.mark.parametrize(
    ("content", "due"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>not here</html>", "not an image"),
        (b"\x00" * 100, "not an image"),
        (b"\xff\xd8\xff", "truncated image"),
        (JPEG[: len(JPEG) // 2], "truncated image"),
        (PNG[: len(PNG) // 2], "truncated image"),
        (PNG[:20], "truncated image"),
        (PNG.replace(PNG[60:70], bytes(10)), "corrupt image"),
        (b"PK\x03\x04" + bytes(40), "unsupported format"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(40), "unsupported format"),
        (b"CWS\x08" + bytes(40), "unsupported format"),
        (b"\x1aE\xdf\xa3" + bytes(40), "unsupported format"),
        (png(60_000, 60_000), "too many pixels"),
        (png(40_000, 2), "too many pixels"),
        (saved(scene(), "GIF", save_all=True, append_images=[scene("L")]), "animated"),
        (saved(scene(), "WEBP", save_all=True, append_images=[scene("L").convert("RGB")]), "animated"),
        (saved(scene(), "PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]), "animated"),
    ],
)
def test_what_is_no_still_image_is_refused_for_the_right_reason(content: bytes, due: str) -> None:
    assert reason(content) == due


def test_a_jpeg_of_the_largest_declarable_side_is_refused_before_it_is_decoded() -> None:
    start = JPEG.index(b"\xff\xc0")
    bomb = JPEG[: start + 5] + b"\xff\xff\xff\xff" + JPEG[start + 9 :]
    assert reason(bomb) == "too many pixels"


def test_limits_hold() -> None:
    assert reason(JPEG, Limits(max_side=50)) == "too many pixels"
    assert reason(JPEG, Limits(max_pixels=100)) == "too many pixels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_every_readable_format(kind: str) -> None:
    image = codec.decode(saved(scene(), kind, **({"quality": 95} if kind in {"JPEG", "WEBP", "AVIF"} else {})), LIMITS)
    assert image.image.mode == "RGB"
    assert image.image.size == (60, 40)
    assert np.abs(np.asarray(image.image, dtype=int) - np.asarray(scene(), dtype=int)).mean() < 6


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "PA"])
def test_every_mode_comes_out_as_it_looks(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "TIFF" if mode == "PA" else "PNG"
    image = scene("L").convert("1") if mode == "1" else scene("P").convert("PA") if mode == "PA" else scene(mode)
    decoded = codec.decode(saved(image, kind, **({"quality": 95} if mode == "CMYK" else {})), LIMITS)
    assert decoded.image.mode == "RGB"
    assert not decoded.plain
    expected = np.asarray(image.convert("RGB"), dtype=int)
    assert np.abs(np.asarray(decoded.image, dtype=int) - expected).mean() < 4


def test_transparency_is_composited_on_white_not_on_what_is_hidden_below() -> None:
    pixels = np.zeros((10, 10, 4), dtype=np.uint8)
    pixels[..., 0] = 200  # garbage under full transparency
    pixels[:5, :, 3] = 255
    image = codec.decode(saved(Image.fromarray(pixels), "PNG"), LIMITS).image
    assert image.getpixel((2, 2)) == (200, 0, 0)
    assert image.getpixel((2, 8)) == (255, 255, 255)


def test_palette_and_colour_key_transparency() -> None:
    palette = scene().convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    index = palette.getpixel((59, 0))
    keyed = codec.decode(saved(palette, "PNG", transparency=index), LIMITS)
    assert keyed.image.getpixel((59, 0)) == (255, 255, 255)
    rgb = codec.decode(saved(scene(), "PNG", transparency=(0, 0, 0)), LIMITS)
    assert rgb.image.getpixel((59, 0)) == (255, 255, 255)
    assert not rgb.plain


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65_535, 60, dtype=np.uint16)[None].repeat(4, 0)
    image = codec.decode(saved(Image.fromarray(ramp), "PNG"), LIMITS).image
    grey = np.asarray(image)[0, :, 0].astype(int)
    assert np.abs(grey - np.round(np.linspace(0, 255, 60))).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = codec.decode(saved(scene(), "JPEG", exif=exif, quality=95), LIMITS)
    assert image.image.size == ((60, 40) if orientation <= 4 else (40, 60))
    assert image.plain == (orientation == 1)


def test_broken_exif_does_not_lose_the_image() -> None:
    broken = JPEG[:2] + b"\xff\xe1\x00\x10Exif\x00\x00II*\x00\xff\xff\xff\xff" + JPEG[2:]
    assert codec.decode(broken, LIMITS).image.size == (60, 40)


def test_a_wrong_extension_does_not_matter() -> None:
    assert codec.sniff(PNG) == "png"
    assert codec.decode(PNG, LIMITS).format == "png"


@pytest.mark.parametrize(
    ("box", "margin", "square", "due"),
    [
        (Box(0.25, 0.25, 0.5, 0.75, 1), 0.0, False, (25, 50, 50, 150)),
        (Box(0.25, 0.25, 0.5, 0.75, 1), 0.2, False, (20, 30, 55, 170)),
        (Box(0.25, 0.25, 0.5, 0.75, 1), 0.0, True, (0, 50, 100, 150)),
        (Box(0.9, 0.9, 1.3, 1.2, 1), 0.0, False, (90, 180, 100, 200)),
        (Box(0.8, 0.4, 1.0, 0.6, 1), 0.0, True, (60, 80, 100, 120)),
        (Box(0.5, 0.75, 0.25, 0.25, 1), 0.0, False, (25, 50, 50, 150)),
        (Box(1.2, 0.1, 1.5, 0.2, 1), 0.0, False, None),
        (Box(0.0, 0.0, 1.0, 1.0, 1), 0.5, True, (0, 0, 100, 200)),
    ],
)
def test_crops(box: Box, margin: float, square: bool, due: tuple[int, int, int, int] | None) -> None:
    assert codec.crop_pixels(box, 100, 200, margin, square=square) == due


@pytest.mark.parametrize(
    ("size", "fit", "due"),
    [(0, "stretch", (60, 40)), (32, "stretch", (32, 32)), (20, "short-side", (30, 20)), (30, "inside", (30, 20))],
)
def test_resizing(size: int, fit: str, due: tuple[int, int]) -> None:
    assert codec.resized(scene(), None, size, fit).size == due


def test_cropping_and_resizing_take_the_right_place() -> None:
    assert codec.resized(scene(), (0, 0, 30, 20), 0, "stretch").getpixel((5, 5)) == (250, 10, 10)
    red = np.asarray(codec.resized(scene(), (0, 0, 30, 20), 10, "stretch"))
    assert (red == (250, 10, 10)).all()


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_encoding_is_repeatable_and_sniffed_as_itself(extension: str) -> None:
    content = codec.encode(scene(), extension, 95)
    assert content == codec.encode(scene(), extension, 95)
    assert codec.sniff(content) == extension
