"""Encoding of drawn images to files in all forms found on real boorus: valid, unusual or damaged.

The same image and coding always give the same bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, PngImagePlugin

from animesion_sample.drawing import Drawing, render

SOUND = ("jpg", "png", "webp")
ODD = ("cmyk", "palette", "png16", "rgba", "la", "grey", "exif", "disguised", "webp", "progressive")
ANIMATED = ("gif", "animated_webp", "apng")
FOREIGN = ("mp4", "zip", "swf")
DAMAGE = ("empty", "html", "noise", "truncated", "bad_crc", "bad_data", "huge_png", "huge_jpg")

_EXTENSIONS = {
    "cmyk": "jpg", "palette": "png", "png16": "png", "rgba": "png", "la": "png", "grey": "jpg", "exif": "jpg",
    "disguised": "jpg", "progressive": "jpg", "animated_webp": "webp", "apng": "png",
}  # fmt: skip


@dataclass(frozen=True)
class Coding:
    """The encoding of an image.

    Attributes:
        form: One of ``SOUND``, ``ODD``, ``ANIMATED`` or ``FOREIGN``.
        quality: JPEG and WebP quality; for PNG the zlib level is ``quality // 10``.
        scale: Factor by which the image is scaled before encoding.
        note: Comment in a PNG's metadata.
        damage: One of ``DAMAGE``, or empty.
    """

    form: str = "jpg"
    quality: int = 90
    scale: float = 1.0
    note: str = ""
    damage: str = ""

    @property
    def extension(self) -> str:
        """The file's extension, which is wrong for a disguised PNG."""
        return _EXTENSIONS.get(self.form, self.form)


def image_size(drawing: Drawing, coding: Coding) -> tuple[int, int]:
    """Width and height in pixels of the file's image, upright."""
    return round(drawing.width * coding.scale), round(drawing.height * coding.scale)


def encode(drawing: Drawing, coding: Coding) -> bytes:
    """Draw an image and encode it."""
    rng = Random(f"{drawing.seed}/bytes")
    if coding.damage == "empty":
        return b""
    if coding.damage == "html":
        return (
            b"<!DOCTYPE html>\n<html><head><title>503</title></head><body><h1>Down for maintenance</h1></body></html>\n"
        )
    if coding.damage == "noise":
        return rng.randbytes(9000)
    if coding.damage == "huge_png":
        return _png(60000, 60000, 8, zlib.compress(bytes(4096)))
    if coding.form in FOREIGN:
        return _foreign(coding.form, rng)
    image = render(drawing)
    if coding.scale != 1.0:
        image = image.resize(image_size(drawing, coding), Image.Resampling.LANCZOS)
    data = _encode_image(image, coding, rng)
    if coding.damage == "truncated":
        return data[: int(len(data) * rng.uniform(0.4, 0.9))]
    if coding.damage == "bad_crc":
        return data[:29] + bytes(b ^ 0xFF for b in data[29:33]) + data[33:]
    if coding.damage == "bad_data":
        third = len(data) // 3
        return data[:third] + rng.randbytes(third) + data[2 * third :]
    if coding.damage == "huge_jpg":
        frame = data.index(b"\xff\xc0")
        return data[: frame + 5] + struct.pack(">HH", 65535, 65535) + data[frame + 9 :]
    return data


def _encode_image(image: Image.Image, coding: Coding, rng: Random) -> bytes:
    form, quality = coding.form, coding.quality
    if form in ("jpg", "cmyk", "grey", "progressive", "exif"):
        if form == "exif":
            exif = Image.Exif()
            exif[0x0112] = 6
            return _save(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=quality, exif=exif.tobytes())
        image = image.convert({"cmyk": "CMYK", "grey": "L"}.get(form, "RGB"))
        return _save(image, "JPEG", quality=quality, progressive=form == "progressive")
    if form == "webp":
        return _save(image, "WEBP", quality=quality, method=2)
    if form == "png16":
        return _png16(image)
    if form in ANIMATED:
        return _animated(image, form)
    if form in ("rgba", "la", "palette"):
        return _transparent(image, form, rng)
    info = PngImagePlugin.PngInfo()
    if coding.note:
        info.add_text("Comment", coding.note)
    return _save(image, "PNG", compress_level=min(9, quality // 10), pnginfo=info)


def _save(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _transparent(image: Image.Image, form: str, rng: Random) -> bytes:
    """Make the corners transparent, over colours that a correct reader never shows."""
    mask = Image.new("L", image.size, 0)
    width, height = image.size
    ImageDraw.Draw(mask).rounded_rectangle((3, 3, width - 4, height - 4), radius=min(width, height) // 5, fill=255)
    if form == "la":
        return _save(Image.merge("LA", (image.convert("L"), mask)), "PNG", compress_level=4)
    if form == "palette":
        reduced = image.quantize(128, method=Image.Quantize.FASTOCTREE)
        colours = reduced.getpalette() or []
        hole = len(colours) // 3
        reduced.putpalette([*colours, 255, 0, 255])
        reduced.paste(hole, mask=ImageChops.invert(mask))
        return _save(reduced, "PNG", compress_level=4, transparency=hole)
    garbage = Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3)).resize(image.size, Image.Resampling.NEAREST)
    hidden = Image.composite(image, garbage, mask)
    hidden.putalpha(mask)
    return _save(hidden, "PNG", compress_level=4)


def _animated(image: Image.Image, form: str) -> bytes:
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    frames = [ImageChops.offset(small, 0, 2 * k) for k in range(1, 4)]
    kind = {"gif": "GIF", "animated_webp": "WEBP", "apng": "PNG"}[form]
    return _save(small, kind, save_all=True, append_images=frames, duration=120, loop=0)


def _foreign(form: str, rng: Random) -> bytes:
    if form == "zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(zipfile.ZipInfo("000000.jpg"), rng.randbytes(4000))
        return stream.getvalue()
    if form == "mp4":
        return b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + rng.randbytes(9000)
    return b"CWS\x0a" + struct.pack("<I", 9000) + zlib.compress(rng.randbytes(6000))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, packed: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _png16(image: Image.Image) -> bytes:
    """An RGB PNG with 16 bits per channel, which Pillow can read but not write."""
    deep = np.repeat(np.asarray(image).reshape(image.height, -1), 2, axis=1)
    rows = np.concatenate([np.zeros((image.height, 1), np.uint8), deep], axis=1)
    return _png(image.width, image.height, 16, zlib.compress(rows.tobytes(), 4))
