"""Image formats: recognise them by magic number, and know which Pillow plug-in reads each.

Decoding is done in `animesion.images.codec`.
"""

from __future__ import annotations

import functools
import importlib
import re
from importlib import metadata, util
from typing import NamedTuple

from animesion.schemas import DropReason

#: Sniffed extension -> the only Pillow plug-in that may open such bytes.
READABLE = {
    "jpg": "JPEG",
    "png": "PNG",
    "gif": "GIF",
    "webp": "WEBP",
    "bmp": "BMP",
    "tif": "TIFF",
    "avif": "AVIF",
}


class _Plugin(NamedTuple):
    """An optional plug-in of Pillow: its distribution, its module, the function to call, the name it registers."""

    distribution: str
    module: str
    register: str
    kind: str


#: Sniffed extension -> the plug-in of the extra `formats` that reads it.
_PLUGINS = {
    "heic": _Plugin("pillow-heif", "pillow_heif", "register_heif_opener", "HEIF"),
    "jxl": _Plugin("pillow-jxl-plugin", "pillow_jxl", "", "JXL"),  # registers itself when it is imported
}

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0\x10\0\0\0CR", "cr2"),  # before TIFF: a camera's raw file, of which a TIFF reader sees the preview
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"II+\0", "tif"),
    (b"MM\0+", "tif"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"8BPS", "psd"),
    (b"\0\0\x01\0", "ico"),
    (b"\0\0\x02\0", "cur"),
    (b"gimp xcf", "xcf"),
    (b"qoif", "qoi"),
    (b"\x76\x2f\x31\x01", "exr"),
    (b"#?RADIANCE", "hdr"),
    (b"DDS ", "dds"),
    (b"%PDF", "pdf"),
    (b"%!PS", "eps"),
    (b"\xc5\xd0\xd3\xc6", "eps"),
    (b"AT&TFORM", "djvu"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"Rar!\x1a\x07", "rar"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"\x1f\x8b\x08", "gz"),
    (b"FWS", "swf"),
    (b"CWS", "swf"),
    (b"ZWS", "swf"),
    (b"FLV\x01", "flv"),
    (b"OggS", "ogv"),
    (b"\0\0\x01\xba", "mpg"),
    (b"\0\0\x01\xb3", "mpg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wmv"),
)

_NETPBM = re.compile(rb"P[1-7][\s#]+[\d#W]")
_SVG = re.compile(  # possessive: what precedes the root element is read once
    rb"(?:\xef\xbb\xbf)?"
    rb"(?:\s|<\?[^>]*>|<!--(?:(?!-->).)*-->|<!DOCTYPE\s+svg[^>\[]*(?:\[[^\]]*\]\s*)?>)*+"
    rb"<svg[\s>:]",
    re.DOTALL,
)
_BMP_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})

#: Brands of the ISO base media format -> extension. `mif1` and `msf1` only name the container of AVIF and HEIC.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "avif"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "heic"),
    **dict.fromkeys((b"j2ki", b"jpeg", b"vvic", b"evbi"), "heif"),
    b"jxl ": "jxl",
    b"crx ": "cr3",
    b"qt  ": "mov",
}
_CONTAINERS = frozenset({b"mif1", b"mif2", b"msf1", b"miaf", b"MiHB", b"MiHE"})


class RejectedImageError(Exception):
    """The bytes are not a usable image; `reason` is an `animesion.schemas.DropReason`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def sniff(content: bytes) -> str:
    """The extension for the magic number of the bytes, or an empty string if it is unknown."""
    head = content[:32]
    for magic, extension in _MAGIC:
        if head.startswith(magic):
            return _checked(extension, content)
    if head[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(head[8:12], "")
    if head[4:8] == b"ftyp":
        return _of_brands(content)
    if head.startswith(b"BM") and int.from_bytes(content[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "mkv" if b"matroska" in content[:64] else "webm"
    if head[4:12] == b"moovlmvh" or head[4:8] in {b"moov", b"mdat", b"wide"}:
        return "mov"
    if content[:1] == b"G" and content[188:189] == b"G" and content[376:377] == b"G":
        return "ts"
    if _NETPBM.match(head):
        return "ppm"
    return "svg" if _SVG.match(content[:4096]) else ""


def _checked(extension: str, content: bytes) -> str:
    """The extension, or an empty string where a magic number of few bytes is not followed by a plausible header."""
    if extension in {"ico", "cur"} and not (content[4:6] != b"\0\0" and content[9:10] == b"\0"):
        return ""
    return extension


def _of_brands(content: bytes) -> str:
    """Extension of a file of the ISO base media format, by its major brand, then its compatible ones."""
    major = content[8:12]
    if major in _BRANDS:
        return _BRANDS[major]
    if major not in _CONTAINERS:
        return "mp4"
    size = min(int.from_bytes(content[:4], "big"), 1024)
    compatible = [content[at : at + 4] for at in range(16, size, 4)]
    found = [_BRANDS[brand] for brand in compatible if brand in _BRANDS]
    return "avif" if "avif" in found else found[0] if found else "heif"


def plugin_of(extension: str) -> str:
    """The name of the Pillow plug-in that reads a sniffed extension.

    Raises:
        RejectedImageError: no installed plug-in reads it; the detail names the format, and the extra if one does.
    """
    if extension in READABLE:
        return READABLE[extension]
    if extension not in _PLUGINS:
        raise RejectedImageError(DropReason.UNSUPPORTED_FORMAT, extension)
    if not _registered(extension):
        detail = f"{extension}: install the extra that reads it: pip install 'animesion[formats]'"
        raise RejectedImageError(DropReason.UNSUPPORTED_FORMAT, detail)
    return _PLUGINS[extension].kind


@functools.cache
def _registered(extension: str) -> bool:
    """Register the plug-in of a format with Pillow, once per process; whether that is possible."""
    plugin = _PLUGINS[extension]
    try:
        module = importlib.import_module(plugin.module)
    except ImportError:
        return False
    if plugin.register:
        getattr(module, plugin.register)()
    return True


def plugin_versions() -> str:
    """The installed optional plug-ins with their versions, such as `/pillow-heif-1.8.1`; empty if there are none.

    It is part of the version of the stages that decode: a plug-in that is installed later reads what was dropped.
    """
    found = [plugin.distribution for plugin in _PLUGINS.values() if util.find_spec(plugin.module)]
    return "".join(f"/{name}-{metadata.version(name)}" for name in found)
