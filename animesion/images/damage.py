"""Find JPEG files that end early, and read what remains of files whose metadata are broken.

Pillow does not report libjpeg's warnings: a scan that ends early is filled with grey. Where the last pixels, or the
bytes before the end, raise a suspicion, the file is decoded a second time with other bytes after its last scan. A scan
that is complete does not read them; one that ends early does, and gives other pixels.
"""

from __future__ import annotations

import functools
import io
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

_SOI, _EOI, _SOS, _DHT = b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc4"
_IEND = b"\0\0\0\0IEND\xaeB`\x82"

#: The first marker after a scan: neither a stuffed FF, nor a restart, nor a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF markers
_ADOBE = 0xEE  # APP14, which names the colour space: pixels depend on it
_SEGMENTS = frozenset({*range(0xE0, 0xF0), 0xFE})  # APP0 to APP15, comments

_NOISE = bytes(1 + (i * 7919 >> 4) % 254 for i in range(2048))

#: What stands in for the bytes that a scan lacks: entropy-coded data, no run of one code. libjpeg puts zeros there, so
#: it begins with ones. Restart markers follow for a scan that ends before one.
_FILL = b"\xfe\xd7" + _NOISE + 2 * b"".join(bytes((0xFF, 0xD0 + i)) + _NOISE[i:99] for i in range(8))

_GREY = range(126, 131)  # levels of a block without data: 128, up to the rounding of colour conversion
_TAIL = 3  # bytes at the end of a scan, all but 7 bits of which are read
_ZEROS = bytes(8)

#: Ancillary chunks that pixels depend on, and the one that marks an animation.
_CHUNKS = frozenset({b"tRNS", b"iCCP", b"eXIf", b"acTL"})


class _Scans(NamedTuple):
    """Facts from the markers of a JPEG.

    Attributes:
        data: offset of the entropy-coded data of the last scan.
        end: offset of the marker after the last scan, or of the end of the file.
        ended: an end-of-image marker follows the last scan.
        covered: the scans together hold all coefficients of all components to the last bit.
    """

    data: int
    end: int
    ended: bool
    covered: bool


def is_suspicious(image: Image.Image, content: bytes) -> bool:
    """Whether a decoded JPEG may have ended early: a check of little cost, which `is_whole` settles.

    Args:
        image: as Pillow decoded it, before any conversion or rotation.
        content: the bytes.
    """
    # the last block is no evidence where several scans refine the whole image
    scan = _first_scan(image, content)
    if "progressive" in image.info or content[scan + 4] != getattr(image, "layers", 0):
        return True
    end = len(content) - 2
    if not content.endswith(_EOI):
        scans = _scans(content)
        if not scans.ended:
            return True
        end = scans.end
    if content[max(0, end - len(_ZEROS)) : end] == _ZEROS or _ends_grey(image):
        return True
    # an encoder ends the last block with a code of its own and fills the last byte with ones
    tables = content[content.find(_DHT) if "exif" not in image.info else 2 : scan + 14]
    return not _ends_block(content[max(0, end - 8) : end], tables)


def _first_scan(image: Image.Image, content: bytes) -> int:
    """Offset of the first scan of a JPEG."""
    if "exif" not in image.info:
        return content.find(_SOS)
    # a preview has scans of its own
    return next((start for marker, start in _headers(content) if marker == _SOS[1]), 0)


def _ends_block(tail: bytes, tables: bytes) -> bool:
    """Whether entropy-coded data end as those of a whole scan do, unless the very last coefficient is not 0.

    Args:
        tail: the last bytes.
        tables: the segments of the file from its first Huffman table to the header of the scan.
    """
    known = _end_of_block(tables)
    if known is None:
        return False
    code, length = known
    bits = int.from_bytes(tail.replace(b"\xff\0", b"\xff")[-4:], "big")
    for _ in range(8):
        if bits & ((1 << length) - 1) == code:
            return True
        if not bits & 1:
            return False
        bits >>= 1
    return False


@functools.lru_cache(maxsize=64)
def _end_of_block(tables: bytes) -> tuple[int, int] | None:
    """Code and number of bits of the symbol that ends a block of the last component; None if there is none."""
    codes: dict[int, tuple[int, int]] = {}
    for marker, start in _headers(tables, 0):
        body = tables[start + 4 : start + 2 + int.from_bytes(tables[start + 2 : start + 4], "big")]
        if marker == _SOS[1]:
            return codes.get(body[2 * body[0]] & 15) if body and len(body) > 2 * body[0] else None
        while marker == _DHT[1] and len(body) > 17:
            counts, symbols = body[1:17], body[17 : 17 + sum(body[1:17])]
            rank, code = symbols.find(0), 0
            for length, count in enumerate(counts, 1):  # codes of one length are consecutive
                if 0 <= rank < count and body[0] >> 4:
                    codes[body[0] & 15] = code + rank, length
                    break
                rank, code = rank - count, (code + count) << 1
            body = body[17 + len(symbols) :]
    return None


def _ends_grey(image: Image.Image) -> bool:
    """Whether the last block of 8 x 8 pixels is grey, as one without data."""
    width, height = image.size
    pixel = image.getpixel((width - 1, height - 1))
    # luminance of RGB, grey, or the last channel of CMYK, which no colour conversion changes
    if isinstance(pixel, tuple):
        pixel = (299 * pixel[0] + 587 * pixel[1] + 114 * pixel[2]) // 1000 if image.mode == "RGB" else pixel[-1]
    if pixel not in _GREY:
        return False
    block = image.crop(((width - 1) // 8 * 8, (height - 1) // 8 * 8, width, height))
    grey = block.convert("L") if image.mode == "RGB" else block.getchannel(len(block.getbands()) - 1)
    low, high = grey.getextrema()
    return low in _GREY and high in _GREY


def is_whole(content: bytes, pixels: bytes | None = None) -> bool:
    """Whether all scans of a JPEG are complete. The end-of-image marker may be missing.

    Args:
        content: the bytes of a JPEG.
        pixels: what they decode to, if that is known.
    """
    scans = _scans(content)
    if not scans.covered:
        return False
    # an FF before a marker is a fill byte, or half of a stuffed FF that the cut went through: it would make a marker of
    # what is put behind it
    body = content[: scans.end].rstrip(b"\xff")
    if pixels is None or not scans.ended:
        pixels = _decoded(body + _EOI)
    if pixels is None or _decoded(body + _FILL + _EOI) != pixels:
        return False
    padded = body.endswith(_ZEROS)
    if scans.ended and not padded:
        return True
    # padding may be enough to fill the scan; its last bytes are not read then, whereas those of a scan are, unless
    # nothing of the scan matters
    if not _is_idle(body, len(body) - _TAIL, pixels) or _is_idle(body, scans.data, pixels):
        return True
    return padded and is_whole(body.rstrip(b"\0") + _EOI)


def _is_idle(body: bytes, start: int, pixels: bytes) -> bool:
    """Whether a JPEG without end marker decodes to the same pixels without the bytes from `start` on."""
    return all(_decoded(body[:start] + other + _EOI) == pixels for other in (_FILL, b""))


def has_end(content: bytes) -> bool:
    """Whether a JPEG has an end-of-image marker after its last scan."""
    return content.endswith(_EOI) or _scans(content).ended


def lacks_scans(content: bytes) -> bool:
    """Whether scans of a JPEG are missing after its first one."""
    scans = _scans(content)
    return scans.end > 0 and not scans.covered


def with_end(content: bytes) -> bytes:
    """A JPEG whose scans are complete, with an end-of-image marker after the last one."""
    return content[: _scans(content).end] + _EOI


def _decoded(content: bytes) -> bytes | None:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return image.tobytes()
    except MemoryError:
        raise
    except Exception:  # decoders raise nearly anything on malformed input
        return None


def _headers(content: bytes, at: int = 2) -> Iterator[tuple[int, int]]:
    """Marker and offset of each segment of a JPEG up to its first scan."""
    while (found := content.find(b"\xff", at)) >= 0 and found + 4 <= len(content):
        marker = content[found + 1]
        if marker == 0xFF:  # a fill byte
            at = found + 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # no segment follows
            at = found + 2
        elif marker == _EOI[1]:
            return
        else:
            yield marker, found
            if marker == _SOS[1]:
                return
            at = found + 2 + int.from_bytes(content[found + 2 : found + 4], "big")


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG; entropy-coded data belong to the segment of their scan."""
    at, marker = 2, 0
    while True:
        start = -1
        for marker, start in _headers(content, at):
            end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
            if marker == _SOS[1]:
                after = _MARKER.search(content, end)
                end = after.start() if after else len(content.rstrip(b"\xff"))
            yield marker, start, end
            at = end
        if start < 0 or marker != _SOS[1]:
            return


def _scans(content: bytes) -> _Scans:
    data, end, progressive = 0, 0, False
    # (component, coefficient) -> lowest bit that a scan has sent; -1 before the first one
    sent: dict[tuple[int, int], int] = {}
    for marker, start, stop in _segments(content):
        body = content[start + 4 : stop]
        if marker in _FRAMES and len(body) >= 6:
            progressive = marker in {0xC2, 0xC6, 0xCA, 0xCE}
            components = [body[6 + 3 * i] for i in range(body[5]) if 6 + 3 * i < len(body)]
            sent = {(c, k): -1 for c in components for k in range(64 if progressive else 1)}
        elif marker == _SOS[1] and body and len(body) > 3 + 2 * body[0]:
            data, end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big"), stop
            first, last, bits = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            for component in body[1 : 1 + 2 * body[0] : 2]:
                for k in range(first, min(last, 63) + 1) if progressive else (0,):
                    sent[component, k] = bits & 15 if progressive else 0
    covered = bool(end) and all(bit == 0 for bit in sent.values())
    return _Scans(data, end, content[end : end + 2] == _EOI, covered)


# -- metadata --------------------------------------------------------------------------------------------------------


def is_terminated(content: bytes) -> bool:
    """Whether a PNG has its last chunk; Pillow reads it without, other readers do not."""
    return content.endswith(_IEND) or _IEND in content


def without_metadata(content: bytes, extension: str) -> Iterator[bytes]:
    """The same image with less metadata, then with none: for files that a decoder refuses."""
    if extension == "png":
        yield _bare_png(content, _CHUNKS)
        yield _bare_png(content, frozenset({b"tRNS", b"acTL"}))
    elif extension == "jpg":
        yield _bare_jpeg(content, frozenset({0xE1, 0xE2, _ADOBE}))
        yield _bare_jpeg(content, frozenset({_ADOBE}))


def _bare_png(content: bytes, kept: frozenset[bytes]) -> bytes:
    """A PNG with its critical chunks and those of `kept` whose checksum is right."""
    parts, at = [content[:8]], 8
    while at + 8 <= len(content):
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        end = at + 12 + size
        critical = not kind[0] & 32
        right = end <= len(content) and zlib.crc32(content[at + 4 : end - 4]) == int.from_bytes(
            content[end - 4 : end], "big"
        )
        if critical or (kind in kept and right):
            parts.append(content[at:end])
        if kind == b"IEND":
            break
        at = end
    return b"".join(parts)


def _bare_jpeg(content: bytes, kept: frozenset[int]) -> bytes:
    """A JPEG without comments and application segments, except those of `kept`."""
    parts, at = [_SOI], 2
    for marker, start, end in _segments(content):
        at = end
        if marker not in _SEGMENTS or marker in kept:
            parts.append(content[start:end])
    return b"".join([*parts, content[at:]])
