"""Forms of images: mode, depth, profile, container and damage, each with the pixels that are right.

Files are written by hand, or by Pillow from pixels without its conversions. What is right follows from the values that
were written, with the formulas of the colour spaces in NumPy: no decoder is asked.
"""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from animesion.images import codec, formats
from animesion.images.codec import Limits, RejectedImageError

LIMITS = Limits()
HEIGHT, WIDTH = 16, 24
Pixels = npt.NDArray[Any]

# -- what is written ---------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)  # from black to white
LEVELS = np.rint(RAMP * 255).astype(np.uint8)
COLOURS = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]], axis=-1)
COLOURS[:4, :6] = (219, 0, 0), (90, 160, 40), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128)
DEEP = np.rint(RAMP * 65_535).astype(np.uint16)
DEEP_COLOURS = COLOURS.astype(np.uint16) * 257
ALPHA = np.where(np.arange(WIDTH) < 12, 255, 0).astype(np.uint8)[None].repeat(HEIGHT, 0)
DEEP_ALPHA = ALPHA.astype(np.uint16) * 257


def on(ground: int, colours: Pixels, alpha: Pixels) -> Pixels:
    share = (alpha / 255)[..., None]
    return np.rint(colours * share + ground * (1 - share))


def grey(levels: Pixels) -> Pixels:
    return levels[..., None].repeat(3, -1)


# -- files by hand -----------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes, *, right: bool = True) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ (not right))


def png(pixels: Pixels, colour: int, depth: int = 8, before: bytes = b"", end: bytes = chunk(b"IEND", b"")) -> bytes:
    """A PNG; pixels of shape (height, width) or (height, width, channels), below 2^depth."""
    rows = pixels.reshape(len(pixels), -1)
    if depth < 8:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        lines = [np.packbits(row.ravel()).tobytes() for row in bits]
    else:
        lines = [row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + end


def tiff(
    data: bytes, bits: tuple[int, ...], photometric: int, *, order: str = "<", sample: int = 1, **tags: tuple[int, ...]
) -> bytes:
    """An uncompressed TIFF of 24 x 16 pixels. Planar data are one strip per channel."""
    n = len(bits)
    planar = tags.get("planar", (1,))[0]
    strips = n if planar == 2 else 1
    entries: list[tuple[int, str, tuple[int, ...]]] = [
        (256, "H", (WIDTH,)),
        (257, "H", (HEIGHT,)),
        (258, "H", bits),
        (259, "H", (1,)),
        (262, "H", (photometric,)),
        (273, "I", tuple(range(strips))),  # offsets: filled in below
        (277, "H", (n,)),
        (278, "H", (HEIGHT,)),
        (279, "I", (len(data) // strips,) * strips),
        (284, "H", (planar,)),
        (339, "H", (sample,) * n),
    ]
    if profile := tags.get("profile"):
        entries.append((34_675, "B", profile))
    at = 8 + 2 + 12 * len(entries) + 4
    table, extra = struct.pack(f"{order}H", len(entries)), b""
    size = sum(len(v) * struct.calcsize(c) for _, c, v in entries if len(v) * struct.calcsize(c) > 4)
    for tag, code, values in entries:
        if tag == 273:
            values = tuple(at + size + i * (len(data) // strips) for i in values)
        body = struct.pack(f"{order}{len(values)}{code}", *values)
        kind = {"B": 7, "H": 3, "I": 4}[code]
        where = body.ljust(4, b"\0") if len(body) <= 4 else struct.pack(f"{order}I", at + len(extra))
        extra += body if len(body) > 4 else b""
        table += struct.pack(f"{order}HHI", tag, kind, len(values)) + where
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + table + bytes(4) + extra + data


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """A profile of a display (RGB, grey) or a printer (CMYK) from its tags."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78), b"wtpt": xyz(D50), **tags}
    tags[b"cprt"] = b"text\0\0\0\0x\0"
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I", at + len(body)) + b"none" + struct.pack(">I", 0x02100000)
    head += (b"prtr" if space == b"CMYK" else b"mntr") + space + connection + bytes(12) + b"acsp" + bytes(28)
    return (head + xyz(D50)[8:]).ljust(128, b"\0") + table + body


def xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65_536)) for value in values)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


D50 = (0.9642, 1.0, 0.8249)
WIDE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # of Adobe RGB
SRGB = ((0.4360747, 0.2225045, 0.0139322), (0.3850649, 0.7168786, 0.0971045), (0.1430804, 0.0606169, 0.7141733))


def display(primaries: tuple[tuple[float, ...], ...], curve: bytes) -> bytes:
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries), strict=True))
    return icc(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def srgb_curve() -> bytes:
    level = np.linspace(0, 1, 1024)
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.rint(linear * 65_535).astype(">u2").tobytes()


def printer() -> bytes:
    """A CMYK profile whose table has two points per ink, all 16 with a colour of their own."""
    identity = b"".join(struct.pack(">i", 65_536 * (i % 4 == 0)) for i in range(9))
    ramp = bytes(range(256))
    return icc(
        b"CMYK",
        {b"A2B0": b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + 4 * ramp + INKS.tobytes() + 3 * ramp},
        b"Lab ",
    )


INKS = np.random.default_rng(3).integers((40, 108, 108), (230, 148, 148), (16, 3), dtype=np.uint8)  # L, a, b as bytes
INKS[0], INKS[1], INKS[15] = (255, 128, 128), (0, 128, 128), (0, 128, 128)  # paper, black, all inks

WIDE_PROFILE = display(WIDE, gamma(2.2))
SRGB_PROFILE = display(SRGB, srgb_curve())
GREY_PROFILE = icc(b"GRAY", {b"kTRC": gamma(1.0)})
BROKEN_PROFILE = WIDE_PROFILE[:16] + b"CMYK" + WIDE_PROFILE[20:140]


# -- what is right -----------------------------------------------------------------------------------------------------


def encoded(linear: Pixels) -> Pixels:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def of_wide(colours: Pixels) -> Pixels:
    exponent = round(2.2 * 256) / 256
    return encoded((colours / 255) ** exponent @ np.array(WIDE) @ np.linalg.inv(np.array(SRGB)))


def of_lab(lab: Pixels) -> Pixels:
    """sRGB of L (0 to 100), a and b."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    white = np.array(D50)
    values = white * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return encoded(values @ np.linalg.inv(np.array(SRGB)))


def corners() -> tuple[Pixels, Pixels]:
    """All combinations of full and no ink as CMYK, and their index in the table."""
    index = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 16
    inks = np.stack([(index >> shift & 1) * 255 for shift in (3, 2, 1, 0)], axis=-1).astype(np.uint8)
    return inks, index


def saved(pixels: Pixels, kind: str, mode: str | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(pixels) if mode is None else Image.frombytes(mode, (WIDTH, HEIGHT), pixels.tobytes())
    image.save(out, kind, **options)
    return out.getvalue()


PALETTE = COLOURS.reshape(-1, 3)[:: HEIGHT * WIDTH // 16][:16]
INDEX = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 16
PLTE = chunk(b"PLTE", PALETTE.tobytes())
CLEAR = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
INKED = ((RAMP * 9 % 1 > 0.5) * 255).astype(np.uint8)  # alpha of a drawing: stripes
WHITE = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
CMYK, CORNERS = corners()
LAB = np.stack([LEVELS // 2 + 60, LEVELS // 8, 140 - LEVELS // 8], axis=-1).astype(np.uint8)
SIGNED = np.rint(RAMP * 60_000 - 30_000)
MIXED = np.where(INDEX == 5, np.nan, RAMP).astype("<f4")


def packed12(values: Pixels) -> bytes:
    first, second = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


def iccp(profile: bytes, *, right: bool = True) -> bytes:
    return chunk(b"iCCP", b"p\0\0" + zlib.compress(profile), right=right)


def rgba(colours: Pixels, alpha: Pixels) -> Pixels:
    return np.concatenate([colours, alpha[..., None].astype(colours.dtype)], axis=-1)


def interleaved(*channels: Pixels) -> Pixels:
    return np.stack(channels, axis=-1)


def planes(colours: Pixels) -> bytes:
    return np.ascontiguousarray(np.moveaxis(colours, -1, 0)).tobytes()


ROUGH = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)  # fills every scan
BIG = np.kron(COLOURS, np.ones((8, 8, 1), np.uint8))
JPEG = saved(BIG, "JPEG", quality=95, subsampling=0)
PROGRESSIVE = saved(BIG, "JPEG", quality=95, subsampling=0, progressive=True)
REFINED = saved(ROUGH, "JPEG", quality=90, progressive=True)
TEXT = PngImagePlugin.PngInfo()
TEXT.add_itxt("workflow", "node " * 500_000, zip=True)
BROKEN_EXIF = (
    b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\x69\x87\x04\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0"
)


def cut(content: bytes, share: float, padding: bytes) -> bytes:
    return content[: int(len(content) * share)] + padding


def mif1(content: bytes) -> bytes:
    return content[:8] + b"mif1" + content[12:]


#: Name -> the file, the right pixels or the drop reason, and the largest deviation in levels.
FORMS: dict[str, tuple[bytes, Pixels | str, float]] = {
    # PNG: mode and depth
    "PNG, 1-bit grey": (png(LEVELS >> 7, 0, 1), grey((LEVELS >> 7) * 255), 0),
    "PNG, 2-bit grey": (png(LEVELS >> 6, 0, 2), grey((LEVELS >> 6) * 85), 0),
    "PNG, 4-bit grey": (png(LEVELS >> 4, 0, 4), grey((LEVELS >> 4) * 17), 0),
    "PNG, 8-bit grey": (png(LEVELS, 0), grey(LEVELS), 0),
    "PNG, 16-bit grey": (png(DEEP, 0, 16), grey(DEEP / 257), 0.5),
    "PNG, 8-bit RGB": (png(COLOURS, 2), COLOURS, 0),
    "PNG, 16-bit RGB": (png(DEEP_COLOURS, 2, 16), COLOURS, 0),
    "PNG, palette of 4 bits": (png(INDEX, 3, 4, PLTE), PALETTE[INDEX], 0),
    # PNG: transparency
    "PNG, 8-bit grey and alpha": (png(interleaved(LEVELS, ALPHA), 4), on(255, grey(LEVELS), ALPHA), 0),
    "PNG, 16-bit grey and alpha": (png(interleaved(DEEP, DEEP_ALPHA), 4, 16), on(255, grey(DEEP / 257), ALPHA), 1),
    "PNG, 8-bit RGB and alpha": (png(rgba(COLOURS, ALPHA), 6), on(255, COLOURS, ALPHA), 0),
    "PNG, 16-bit RGB and alpha": (png(rgba(DEEP_COLOURS, DEEP_ALPHA), 6, 16), on(255, COLOURS, ALPHA), 0),
    "PNG, half-transparent": (png(rgba(COLOURS, ALPHA // 2), 6), on(255, COLOURS, ALPHA // 2), 1),
    "PNG, transparent 8-bit grey": (
        png(INDEX * 16, 0, 8, chunk(b"tRNS", b"\0\x30")),
        grey(np.where(INDEX == 3, 255, INDEX * 16)),
        0,
    ),
    "PNG, transparent 16-bit grey": (
        png(INDEX * 4000, 0, 16, chunk(b"tRNS", struct.pack(">H", 12_000))),
        grey(np.where(INDEX == 3, 255, INDEX * 4000 / 257)),
        0.5,
    ),
    "PNG, transparent 8-bit colour": (
        png(PALETTE[INDEX], 2, 8, chunk(b"tRNS", struct.pack(">3H", *PALETTE[3]))),
        np.where((PALETTE[INDEX] == PALETTE[3]).all(-1)[..., None], 255, PALETTE[INDEX]),
        0,
    ),
    "PNG, transparent palette entry": (
        png(INDEX, 3, 4, PLTE + chunk(b"tRNS", b"\xff\xff\xff\0")),
        np.where(INDEX[..., None] == 3, 255, PALETTE[INDEX]),
        0,
    ),
    "PNG, white ink on transparent ground": (png(rgba(grey(WHITE), INKED), 6), grey(INKED), 0),
    "PNG, white ink, grey and alpha": (png(interleaved(WHITE, INKED), 4), grey(INKED), 0),
    "PNG, black ink on transparent ground": (png(rgba(grey(CLEAR), INKED), 6), grey(255 - INKED), 0),
    "PNG, wholly transparent": (png(rgba(COLOURS, CLEAR), 6), "blank", 0),
    "WebP, white ink on transparent ground": (saved(rgba(grey(WHITE), INKED), "WEBP", lossless=True), grey(INKED), 0),
    # TIFF: depth
    "TIFF, 8-bit grey, white is zero": (tiff(LEVELS.tobytes(), (8,), 0), grey(255 - LEVELS), 0),
    "TIFF, 12-bit grey": (tiff(packed12(DEEP >> 4), (12,), 1), grey((DEEP >> 4) / 4095 * 255), 0.5),
    "TIFF, 16-bit grey": (tiff(DEEP.tobytes(), (16,), 1), grey(DEEP / 257), 0.5),
    "TIFF, 16-bit grey, big-endian": (tiff(DEEP.astype(">u2").tobytes(), (16,), 1, order=">"), grey(DEEP / 257), 0.5),
    "TIFF, 16-bit grey, white is zero": (tiff(DEEP.tobytes(), (16,), 0), grey(255 - DEEP / 257), 0.5),
    "TIFF, signed 16-bit grey": (tiff(SIGNED.astype("<i2").tobytes(), (16,), 1, sample=2), grey(RAMP * 255), 0.6),
    "TIFF, signed 32-bit grey": (
        tiff((RAMP * 2e9 - 1e9).astype("<i4").tobytes(), (32,), 1, sample=2),
        grey(RAMP * 255),
        0.6,
    ),
    "TIFF, unsigned 32-bit grey": (tiff((RAMP * 4e9).astype("<u4").tobytes(), (32,), 1), grey(RAMP * 255), 0.6),
    "TIFF, float, 0 to 1": (tiff((RAMP / 2).astype("<f4").tobytes(), (32,), 1, sample=3), grey(RAMP * 127.5), 0.6),
    "TIFF, float, -5 to 300": (
        tiff((RAMP * 305 - 5).astype("<f4").tobytes(), (32,), 1, sample=3),
        grey(RAMP * 255),
        0.6,
    ),
    "TIFF, float of 64 bits": (tiff(RAMP.tobytes(), (64,), 1, sample=3), "unsupported format", 0),
    "TIFF, float with NaN": (
        tiff(MIXED.tobytes(), (32,), 1, sample=3),
        grey(np.nan_to_num(MIXED) * 255),
        0.6,
    ),
    "TIFF, float, all the same": (tiff(np.full((16, 24), 7, "<f4").tobytes(), (32,), 1, sample=3), "blank", 0),
    "TIFF, 16-bit RGB": (tiff(DEEP_COLOURS.tobytes(), (16, 16, 16), 2), COLOURS, 0),
    "TIFF, 16-bit RGB, big-endian": (
        tiff(DEEP_COLOURS.astype(">u2").tobytes(), (16, 16, 16), 2, order=">"),
        COLOURS,
        0,
    ),
    "TIFF, 8-bit RGB, planar": (tiff(planes(COLOURS), (8, 8, 8), 2, planar=(2,)), COLOURS, 0),
    "TIFF, 16-bit RGB, planar": (tiff(planes(DEEP_COLOURS), (16, 16, 16), 2, planar=(2,)), "unsupported format", 0),
    "TIFF, L*a*b*": (
        tiff(LAB.tobytes(), (8, 8, 8), 8),
        of_lab(np.stack([LAB[..., 0] / 2.55, *(LAB[..., i].astype(np.int8) for i in (1, 2))], axis=-1)),
        3,
    ),
    "TIFF, CMYK without profile": (
        tiff(CMYK.tobytes(), (8,) * 4, 5),
        (255 - CMYK[..., :3].astype(int)) * (255 - CMYK[..., 3:].astype(int)) / 255,
        1,
    ),
    # profiles
    "TIFF, CMYK with profile": (
        tiff(CMYK.tobytes(), (8,) * 4, 5, profile=tuple(printer())),
        of_lab((INKS[CORNERS] - np.array((0, 128, 128))) / np.array((2.55, 1, 1))),
        3,
    ),
    "PNG, RGB with a wide profile": (png(COLOURS, 2, 8, iccp(WIDE_PROFILE)), of_wide(COLOURS), 2),
    "PNG, RGB with an sRGB profile": (png(COLOURS, 2, 8, iccp(SRGB_PROFILE)), COLOURS, 0),
    "PNG, RGB with a broken profile": (png(COLOURS, 2, 8, iccp(BROKEN_PROFILE)), COLOURS, 0),
    "PNG, RGB with a printer's profile": (png(COLOURS, 2, 8, iccp(printer())), COLOURS, 0),
    "PNG, 16-bit RGB with a wide profile": (png(DEEP_COLOURS, 2, 16, iccp(WIDE_PROFILE)), of_wide(COLOURS), 2),
    "PNG, RGB and alpha, wide profile": (
        png(rgba(COLOURS, ALPHA), 6, 8, iccp(WIDE_PROFILE)),
        on(255, of_wide(COLOURS), ALPHA),
        2,
    ),
    "PNG, palette with a wide profile": (png(INDEX, 3, 4, iccp(WIDE_PROFILE) + PLTE), of_wide(PALETTE[INDEX]), 2),
    "PNG, grey with a linear profile": (png(LEVELS, 0, 8, iccp(GREY_PROFILE)), grey(encoded(LEVELS / 255)), 2),
    "PNG, 16-bit grey, linear profile": (png(DEEP, 0, 16, iccp(GREY_PROFILE)), grey(encoded(LEVELS / 255)), 2),
    "PNG, grey and alpha, linear profile": (
        png(interleaved(LEVELS, ALPHA), 4, 8, iccp(GREY_PROFILE)),
        on(255, grey(encoded(LEVELS / 255)), ALPHA),
        2,
    ),
    "PNG, grey with a profile of RGB": (png(LEVELS, 0, 8, iccp(WIDE_PROFILE)), grey(LEVELS), 0),
    "JPEG, RGB with a wide profile": (
        saved(BIG, "JPEG", quality=100, subsampling=0, icc_profile=WIDE_PROFILE),
        of_wide(BIG),
        12,
    ),
    "JPEG, CMYK with a broken profile": (
        saved(np.full((16, 24, 4), (0, 255, 0, 0), np.uint8), "JPEG", "CMYK", quality=100, icc_profile=BROKEN_PROFILE),
        np.full((16, 24, 3), (255, 0, 255)),
        3,
    ),
    "JPEG, CMYK with profile": (
        saved(np.full((16, 24, 4), (0, 255, 0, 0), np.uint8), "JPEG", "CMYK", quality=100, icc_profile=printer()),
        of_lab((INKS[np.full((16, 24), 4)] - np.array((0, 128, 128))) / np.array((2.55, 1, 1))),
        3,
    ),
    "WebP, RGB with a wide profile": (
        saved(COLOURS, "WEBP", lossless=True, icc_profile=WIDE_PROFILE),
        of_wide(COLOURS),
        2,
    ),
    "TIFF, RGB with a wide profile": (
        tiff(COLOURS.tobytes(), (8, 8, 8), 2, profile=tuple(WIDE_PROFILE)),
        of_wide(COLOURS),
        2,
    ),
    # containers
    "AVIF": (saved(BIG, "AVIF", quality=100, subsampling="4:4:4"), BIG, 8),
    "AVIF, brand mif1": (mif1(saved(BIG, "AVIF", quality=100, subsampling="4:4:4")), BIG, 8),
    "BMP": (saved(COLOURS, "BMP"), COLOURS, 0),
    "GIF": (saved(LEVELS, "GIF"), grey(LEVELS), 0),
    # damage
    "JPEG, half of it, then its end marker": (cut(JPEG, 0.5, b"\xff\xd9"), "truncated image", 0),
    "JPEG, half of it, then end markers": (cut(JPEG, 0.5, b"\xff\xd9" * 500), "truncated image", 0),
    "JPEG, half of it, then zeros": (cut(JPEG, 0.5, bytes(len(JPEG))), "truncated image", 0),
    "JPEG, half of it, zeros, end marker": (cut(JPEG, 0.5, bytes(len(JPEG)) + b"\xff\xd9"), "truncated image", 0),
    "JPEG, half of it, then a web page": (cut(JPEG, 0.5, b"<p>Bad gateway</p>" * 9999), "truncated image", 0),
    "progressive JPEG, first scans": (cut(REFINED, 0.3, b"\xff\xd9"), "truncated image", 0),
    "progressive JPEG, cut in its last scan": (cut(REFINED, 0.95, b"\xff\xd9"), "truncated image", 0),
    "progressive JPEG, 3/4 of it, then zeros": (cut(REFINED, 0.75, bytes(9999)), "truncated image", 0),
    "JPEG without its end marker": (JPEG[:-2], BIG, 12),
    "progressive JPEG without its end marker": (PROGRESSIVE[:-2], BIG, 12),
    "JPEG, then zeros": (JPEG + bytes(999), BIG, 12),
    "JPEG with broken EXIF": (saved(BIG, "JPEG", quality=95, subsampling=0, exif=BROKEN_EXIF), BIG, 12),
    "PNG, half of it": (cut(png(COLOURS, 2), 0.5, b""), "truncated image", 0),
    "PNG without its last chunk": (png(COLOURS, 2, end=b""), COLOURS, 0),
    "PNG, 2.5 MB of text": (saved(COLOURS, "PNG", pnginfo=TEXT), COLOURS, 0),
    "PNG, text with a wrong checksum": (png(COLOURS, 2, 8, chunk(b"tEXt", b"a\0b", right=False)), COLOURS, 0),
    "PNG, profile with a wrong checksum": (png(COLOURS, 2, 8, iccp(WIDE_PROFILE, right=False)), COLOURS, 0),
    "GIF, half of it": (cut(saved(LEVELS, "GIF"), 0.5, b""), "truncated image", 0),
    "BMP, half of it": (cut(saved(COLOURS, "BMP"), 0.5, b""), "truncated image", 0),
}


def decoded(content: bytes) -> Pixels | str:
    try:
        return np.asarray(codec.decode(content, LIMITS).image)
    except RejectedImageError as error:
        return error.reason


@pytest.mark.parametrize("name", FORMS)
def test_a_form_gives_the_right_pixels_or_reason(name: str) -> None:
    content, right, tolerance = FORMS[name]
    ours = decoded(content)
    if isinstance(right, str) or isinstance(ours, str):
        assert isinstance(ours, str)
        assert isinstance(right, str)
        assert ours == right
    else:
        assert ours.shape == right.shape
        assert np.abs(ours.astype(float) - right).max() <= tolerance


def test_the_documentation_has_the_table_of_forms() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pixels.md").read_text(encoding="utf-8")
    assert table() in page, "run python tests/unit/test_image_forms.py and copy what it prints"


def table() -> str:
    """The forms as a table in Markdown: the file, and the right and our values of one pixel."""
    lines = ["| file | right | ours |", "|---|---|---|"]
    for name, (content, right, _) in FORMS.items():
        lines.append(f"| {name} | {_cell(right)} | {_cell(decoded(content))} |")
    return "\n".join(lines)


def _cell(found: Pixels | str) -> str:
    if isinstance(found, str):
        return f"`{found}`"
    return " ".join(str(round(float(value))) for value in found[len(found) * 5 // 8, len(found[0]) // 3])


# -- kinds -------------------------------------------------------------------------------------------------------------


def pixels_of(content: bytes) -> bytes | None:
    """The decoded pixels; None for a truncated image."""
    found = decoded(content)
    if isinstance(found, str):
        assert found == "truncated image"
        return None
    return found.tobytes()


jpegs = st.fixed_dictionaries(
    {
        "quality": st.sampled_from([30, 75, 90, 97]),
        "progressive": st.booleans(),
        "optimize": st.booleans(),
        "subsampling": st.sampled_from([0, 1, 2]),
        "restart_marker_rows": st.sampled_from([0, 1]),
    }
)
shapes = st.tuples(st.integers(17, 120), st.integers(17, 120))


def noisy(shape: tuple[int, int], seed: int, mode: str) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)


@given(jpegs, shapes, st.integers(0, 99), st.sampled_from(["RGB", "L", "CMYK"]))
@settings(max_examples=60, deadline=None)
@example(  # all rows are there before Pillow misses the marker
    options={"quality": 30, "progressive": False, "optimize": True, "subsampling": 0, "restart_marker_rows": 0},
    shape=(38, 67),
    seed=38,
    mode="RGB",
)
def test_a_jpeg_is_whole_with_and_without_its_end_marker(
    options: dict[str, Any], shape: tuple[int, int], seed: int, mode: str
) -> None:
    out = io.BytesIO()
    noisy(shape, seed, mode).save(out, "JPEG", **options)
    content = out.getvalue()
    right = pixels_of(content)
    assert right is not None
    for ending in (content[:-2], content[:-1], content + bytes(50), content + content, content + b"\r\n"):
        assert pixels_of(ending) == right
        assert ending in {content + content, content + bytes(50), content + b"\r\n"} or not plain(ending)


def plain(content: bytes) -> bool:
    return codec.decode(content, LIMITS).plain


@given(
    jpegs,
    # what is cut is more than the last blocks, which may be no more than padding of the image (docs/pixels.md)
    st.tuples(st.integers(40, 120), st.integers(40, 120)),
    st.integers(0, 99),
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.floats(0.05, 0.7),
    st.sampled_from([b"", b"\xff\xd9", b"\xff\xd9" * 300, bytes(90), bytes(99_999), bytes(9_999) + b"\xff\xd9"]),
)
@settings(max_examples=120, deadline=None)
@example(  # cut between the two bytes of a stuffed FF
    options={"quality": 75, "progressive": False, "optimize": True, "subsampling": 0, "restart_marker_rows": 1},
    shape=(67, 67),
    seed=12,
    mode="RGB",
    share=0.1126621363707951,
    padding=b"\xff\xd9",
)
def test_a_jpeg_that_ends_early_is_truncated_whatever_follows(
    options: dict[str, Any], shape: tuple[int, int], seed: int, mode: str, share: float, padding: bytes
) -> None:
    out = io.BytesIO()
    noisy(shape, seed, mode).save(out, "JPEG", **options)
    content = out.getvalue()
    start = content.index(b"\xff\xda") + 20
    assert pixels_of(content[: start + int((len(content) - start) * share)] + padding) is None


@pytest.mark.parametrize("level", [0, 127, 128, 129, 255])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
def test_plain_jpegs_that_look_like_missing_data_are_whole(level: int, options: dict[str, Any]) -> None:
    for mode in ("RGB", "L", "CMYK"):
        out = io.BytesIO()
        Image.new(mode, (640, 480), level if mode == "L" else (level,) * len(mode)).save(out, "JPEG", **options)
        assert pixels_of(out.getvalue()) is not None
        assert pixels_of(out.getvalue()[:-2]) is not None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_broken_exif_still_turns_the_image(orientation: int) -> None:
    exif = BROKEN_EXIF.replace(b"\x12\x01\x03\0\x01\0\0\0\x01", b"\x12\x01\x03\0\x01\0\0\0" + bytes([orientation]))
    decoded = codec.decode(saved(BIG, "JPEG", exif=exif), LIMITS)
    assert (decoded.image.width < decoded.image.height) == (orientation >= 5)
    assert decoded.plain == (orientation == 1)


@given(st.binary(max_size=400), st.sampled_from(["RGB", "L", "CMYK"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_profile_loses_an_image(profile: bytes, mode: str, whole: bool) -> None:
    full = {"RGB": WIDE_PROFILE, "L": GREY_PROFILE, "CMYK": printer()}[mode]
    profile = full[:100] + profile + full[100 + len(profile) :] if whole else profile
    image = Image.fromarray(COLOURS).convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF" if mode == "CMYK" else "PNG", icc_profile=profile)
    assert codec.decode(out.getvalue(), LIMITS).image.size == (WIDTH, HEIGHT)


def test_a_broken_profile_leaves_the_values_alone() -> None:
    assert np.array_equal(decoded(png(COLOURS, 2, 8, iccp(b"not a profile"))), COLOURS)


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_profiles_near_srgb_change_nothing(seed: int) -> None:
    """Profiles that are sRGB by their content differ in names and roundings."""
    rng = np.random.default_rng(seed)
    near = tuple(tuple(v + rng.uniform(-1e-4, 1e-4) for v in row) for row in SRGB)
    found = codec.decode(png(COLOURS, 2, 8, iccp(display(near, srgb_curve()))), LIMITS)
    assert found.plain
    assert np.array_equal(np.asarray(found.image), COLOURS)


def test_only_a_profile_that_is_srgb_is_plain() -> None:
    jpeg = {name: saved(BIG, "JPEG", icc_profile=p) for name, p in (("srgb", SRGB_PROFILE), ("wide", WIDE_PROFILE))}
    assert plain(jpeg["srgb"])
    assert not plain(jpeg["wide"])
    assert plain(saved(BIG, "JPEG"))
    assert not plain(png(COLOURS, 2, end=b""))
    assert not plain(saved(COLOURS, "PNG", pnginfo=TEXT))


@given(st.integers(200, 255), st.integers(1, 255), st.floats(0.01, 0.9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_ink_is_seen_on_its_ground(level: int, opacity: int, share: float, seed: int) -> None:
    """A drawing in one light grey is never lost: it differs from its ground, or it is refused as blank."""
    drawn = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < share
    content = png(rgba(np.full((HEIGHT, WIDTH, 3), level, np.uint8), (drawn * opacity).astype(np.uint8)), 6)
    found = decoded(content)
    if isinstance(found, str):
        assert found == "blank"
        assert opacity <= 3 or not drawn.any() or drawn.all()
    else:
        assert np.ptp(found) >= min(31, int(opacity * 0.78) - 1)


@given(st.integers(0, 65_535), st.integers(1, 65_535))
@settings(max_examples=40, deadline=None)
def test_deep_grey_keeps_its_order_and_range(low: int, span: int) -> None:
    high = min(65_535, low + span)
    values = np.rint(low + RAMP * (high - low)).astype(np.uint16)
    for content in (png(values, 0, 16), tiff(values.tobytes(), (16,), 1)):
        found = decoded(content)
        assert isinstance(found, np.ndarray)
        assert (np.diff(found[..., 0].ravel().astype(int)) >= 0).all()
        assert abs(int(found.min()) - low / 257) <= 0.5
        assert abs(int(found.max()) - high / 257) <= 0.5


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "heic"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafavif", "avif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf", "heif"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "mp4"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "mov"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "cr3"),
        (b"\xff\x0a\xfa\x7f", "jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
        (b"\xff\x4f\xff\x51\0\x2f", "jp2"),
        (b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0", "ico"),
        (b"8BPS\0\1", "psd"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
        (
            b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- made by hand -->\n<!DOCTYPE svg PUBLIC 'x' 'y'>\n<svg width='1'>",
            "svg",
        ),
        (b"RIFF\0\0\0\0AVI LIST", "avi"),
        (b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1fB\x86\x81\x01B\x82\x84webm", "webm"),
        (b"\x1aE\xdf\xa3\xa3B\x86\x81\x01B\x82\x88matroska", "mkv"),
        (b"\0\0\1\xba\x44\0", "mpg"),
        (b"OggS\0\2", "ogv"),
        (b"FLV\1\5", "flv"),
        (b"%PDF-1.7", "pdf"),
        (b"II*\0\x10\0\0\0CR\2\0", "cr2"),
        (b"P6\n4 4\n255\n", "ppm"),
        (b"GIF89a", "gif"),
        (b"II+\0\x08\0\0\0", "tif"),
        (b"<!DOCTYPE html><html><svg></svg>", ""),
        (b"<?xml version='1.0'?><rss/>", ""),
        (b"\0\0\1\0" + bytes(30), ""),
        (bytes(100), ""),
        (b"G", ""),
    ],
)
def test_formats_are_named_for_what_they_are(content: bytes, names: str) -> None:
    assert codec.sniff(content) == names
    assert codec.sniff(content + bytes(300)) == names


@pytest.mark.parametrize("part", [b" ", b"<!---->", b"<!-- --> ", b"<?x?>", b"<!-- ", b"<!DOCTYPE svg [", b"<"])
def test_naming_a_format_takes_no_time(part: bytes) -> None:
    started = time.process_time()
    assert codec.sniff(part * 4096) == ""
    assert time.process_time() - started < 0.2


@pytest.mark.parametrize("content", [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\xff\x0a" + bytes(99)])
def test_a_format_that_an_extra_reads_names_the_extra(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_registered", lambda extension: False)
    with pytest.raises(RejectedImageError, match=r"unsupported format: (heic|jxl): .*animesion\[formats\]"):
        codec.decode(content, LIMITS)


@pytest.mark.parametrize("kind", ["heic", "jxl"])
def test_the_extra_reads_its_formats(kind: str) -> None:
    pytest.importorskip({"heic": "pillow_heif", "jxl": "pillow_jxl"}[kind])
    assert formats.plugin_of(kind)
    content = saved(BIG, formats.plugin_of(kind), **({"lossless": True} if kind == "jxl" else {"quality": 100}))
    found = codec.decode(content, LIMITS)
    assert found.format == kind
    assert np.abs(np.asarray(found.image).astype(int) - BIG).mean() < 3


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_equal_pixels_give_equal_bytes_without_metadata(extension: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    text = PngImagePlugin.PngInfo()
    text.add_text("secret", "a secret")
    files = [
        png(COLOURS, 2),
        saved(COLOURS, "PNG", pnginfo=text, exif=exif, icc_profile=SRGB_PROFILE, dpi=(72, 72)),
        saved(COLOURS, "WEBP", lossless=True, xmp=b"a secret", exif=exif, icc_profile=SRGB_PROFILE),
        saved(COLOURS, "TIFF", description="a secret", icc_profile=SRGB_PROFILE),
        saved(COLOURS, "BMP"),
    ]
    found = {codec.encode(codec.decode(each, LIMITS).image, extension, 90) for each in files}
    assert len(found) == 1
    packed = found.pop()
    assert b"secret" not in packed
    marked = codec.decode(files[1], LIMITS).image.copy()
    marked.info = {"icc_profile": printer(), "comment": b"a secret", "exif": exif.tobytes(), "xmp": b"a secret"}
    assert codec.encode(marked, extension, 90) == packed


if __name__ == "__main__":
    print(table())
