"""Opt-outs inside image files: the IPTC/PLUS data-mining property and its like in XMP, IIM keywords, C2PA assertions.

Files are searched, not decoded: XMP packets and IIM datasets stand in clear in every format, except where a PNG
compresses them or a JPEG cuts them into pieces. C2PA manifests are read by the extra `c2pa`. Without it, a
training-mining assertion is recognised by its label, but what it says is not known, so it counts as a reservation.
"""

from __future__ import annotations

import binascii
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any
from xml.parsers import expat

from animesion.schemas import DropReason

_FILL = re.compile(rb"\xff{2,}+")

_LARGEST_PACKET = 4 << 20
"""Bytes of an XMP packet that are parsed, and of a compressed one after decompression."""

_MOST_PACKETS = 64
_MOST_BLOCKS = 100_000
"""Segments or chunks of a file that are looked at."""

_DEEPEST = 100
_LONGEST = 200

_EXTENDED = b"http://ns.adobe.com/xmp/extension/\0"
_RDF = b"22-rdf-syntax-ns#"
_META = re.compile(rb"<[A-Za-z_][\w.-]{0,60}:x[am]pmeta\b")
_NAME = re.compile(rb"<([A-Za-z_][\w.:-]{0,60})")
_MENTIONS = re.compile(rb"DataMining|DMI-PROHIBITED|noai|noimageai|/ns/tdmrep", re.IGNORECASE)

_RAW_PROFILES = {b"raw profile type xmp", b"raw profile type iptc", b"raw profile type 8bim"}
_WORDS = re.compile(rb"noai|noimageai", re.IGNORECASE)
_MOST_WORDS = 10_000
_IIM = b"\x1c\x02"
"""Start of a dataset of IIM's application record: this, its number, and its size in two bytes."""

_PLUS = "http://ns.useplus.org/ldf/xmp/1.0/ DataMining"
_SOURCE_TYPE = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/ DigitalSourceType"
_TDM = re.compile(r"https?://www\.w3\.org/ns/tdmrep[/#]? reservation")
_RESOURCE = "http://www.w3.org/1999/02/22-rdf-syntax-ns# resource"
_PERMISSIVE = frozenset({"", "DMI-ALLOWED", "DMI-UNSPECIFIED"})
"""Values of PLUS's vocabulary that reserve nothing; any other one, known or not, does."""

_ASSERTION = re.compile(rb"(?:c2pa|cawg)\.training-mining(?:__\d{1,9})?")
_COMPRESSED_MANIFEST = b"c2cm\0\x11\0\x10\x80\0\0\xaa\0\x38\x9b\x71"
"""Type of the box of a manifest that is compressed by Brotli, so that its labels cannot be seen (C2PA 2.1)."""

_LIBRARY = "c2pa"
"""The module of the extra `c2pa`, imported where a file has such an assertion."""

_MIME = {"jpg": "image/jpeg", "tif": "image/tiff"}


class _UnreadableError(Exception):
    """An XMP packet that is not parsed: no XML, a document type, too deep or too large."""


def find(content: bytes, extension: str) -> tuple[str, str]:
    """The reservation of data mining or training in an image file.

    Args:
        content: The file; hostile bytes are handled in linear time.
        extension: Its format, as `animesion.images.formats.sniff` returns it.

    Returns:
        The drop reason and the evidence; both are empty if there is none.
    """
    if evidence := _in_xmp(content, extension) or _in_iim(content, extension):
        return DropReason.METADATA_OPT_OUT, evidence
    if evidence := _in_c2pa(content, extension):
        return DropReason.C2PA_OPT_OUT, evidence
    return "", ""


def version() -> str:
    """The version of what `find` depends on, with that of the extra `c2pa` if it is installed."""
    return f"2/c2pa-{metadata.version('c2pa-python')}" if util.find_spec("c2pa") else "2"


# -- XMP -------------------------------------------------------------------------------------------------------------


def _in_xmp(content: bytes, extension: str) -> str:
    for packet in _packets(content, extension):
        if not _MENTIONS.search(packet):
            continue
        try:
            found = _read_packet(packet)
        except _UnreadableError as error:
            found = f"XMP: {error}, and it mentions data mining or AI, so it counts as reserved"
        if found:
            return found
    return ""


def _packets(content: bytes, extension: str) -> Iterator[bytes]:
    """XMP packets, or what is left of them."""
    yield from _find_packets(content)
    if extension == "jpg" and _EXTENDED in content:
        yield from _find_packets(_extended_xmp(content))
    elif extension == "png":
        for text in _compressed_texts(content):
            yield from _find_packets(text)


def _find_packets(content: bytes) -> Iterator[bytes]:
    """Elements with the namespace of RDF, from `xmpmeta` where it encloses them."""
    at = 0
    for _ in range(_MOST_PACKETS):
        place = content.find(_RDF, at)
        if place < 0:
            return
        before = max(at, place - 4096)
        outer = None
        for outer in _META.finditer(content, before, place):  # noqa: B007 (the last one is used)
            pass
        start = outer.start() if outer else content.rfind(b"<", before, place)
        name = _NAME.match(content, max(start, 0))
        if start < 0 or name is None:
            at = place + len(_RDF)
            continue
        end = content.find(b"</" + name[1], place)
        close = content.find(b">", end) if end >= 0 else -1
        if close < 0:
            yield content[start : start + _LARGEST_PACKET]
            return
        yield content[start : close + 1]
        at = close + 1
    # what follows so many packets is not read any more
    yield content[at : at + _LARGEST_PACKET]


def _read_packet(packet: bytes) -> str:
    """The evidence in a packet; empty if there is none.

    Raises:
        _UnreadableError: It is not parsed.
    """
    if len(packet) > _LARGEST_PACKET:
        raise _UnreadableError(f"a packet of more than {_LARGEST_PACKET >> 20} MiB")
    found: list[str] = []
    path: list[str] = []
    texts: list[list[str]] = []

    def judge(name: str, value: str) -> None:
        told = _judge(name, value.strip())
        if told and not found:
            found.append(told)

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(path) >= _DEEPEST:
            raise _UnreadableError(f"a packet of more than {_DEEPEST} levels")
        path.append(name)
        texts.append([])
        for attribute, value in attributes.items():
            if attribute == _RESOURCE:
                for outer in path:
                    judge(outer, value)
            judge(attribute, value)

    def text(data: str) -> None:
        if texts:
            texts[-1].append(data)

    def end(name: str) -> None:
        # A value may be an element inside the property, as in a bag or with `rdf:value`.
        value = "".join(texts.pop())
        if value.strip():
            for outer in reversed(path):
                judge(outer, value)
        path.pop()

    def doctype(*declaration: object) -> None:
        raise _UnreadableError("a packet with a document type")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = doctype
    parser.EntityDeclHandler = doctype
    try:
        parser.Parse(packet, True)
    except expat.ExpatError:
        if found:
            return found[0]
        raise _UnreadableError("a packet that is no XML") from None
    return found[0] if found else ""


def _judge(name: str, value: str) -> str:
    """The evidence in the value of a property; empty if it reserves nothing."""
    if name == _PLUS:
        term = value.rstrip("/").rpartition("/")[2].upper()
        return f"XMP: plus:DataMining: {_line(value)}" if term not in _PERMISSIVE else ""
    if name == _SOURCE_TYPE and "DMI-PROHIBITED" in value.upper():
        return f"XMP: Iptc4xmpExt:DigitalSourceType: {_line(value)}"
    if _TDM.fullmatch(name) and value not in {"", "0"}:
        return f"XMP: tdm:reservation: {_line(value)}"
    if len(value) < 1000 and (words := _refusals(value)):
        return f"XMP: {_line(name.rpartition(' ')[2])}: {words}"
    return ""


def _refusals(value: str) -> str:
    """The words of a list with commas that refuse AI."""
    return ", ".join(sorted({"noai", "noimageai"} & {word.strip() for word in value.lower().split(",")}))


def _extended_xmp(content: bytes) -> bytes:
    """The part of a JPEG's XMP that did not fit into one segment, put together."""
    pieces: dict[int, bytes] = {}
    size = 0
    for kind, payload in _jpeg_segments(content):
        if kind == 0xE1 and payload.startswith(_EXTENDED):
            piece = payload[len(_EXTENDED) + 40 :]
            size += len(piece)
            if size > 2 * _LARGEST_PACKET:
                break
            pieces[int.from_bytes(payload[len(_EXTENDED) + 36 : len(_EXTENDED) + 40], "big")] = piece
    return b"".join(pieces[offset] for offset in sorted(pieces))


def _compressed_texts(content: bytes) -> Iterator[bytes]:
    """XMP and IIM in compressed text chunks of a PNG, as the standard has it and as ImageMagick writes them."""
    for kind, payload in _png_chunks(content):
        keyword, _, rest = payload[:2048].partition(b"\0")
        start = len(keyword) + 1
        if kind == b"iTXt" and keyword == b"XML:com.adobe.xmp" and rest[:1] == b"\1":
            language = payload.find(b"\0", start + 2)
            keyword_end = payload.find(b"\0", language + 1)  # of the translated keyword
            yield _inflate(payload[keyword_end + 1 :])
        elif kind == b"zTXt" and keyword.lower() in _RAW_PROFILES:
            lines = _inflate(payload[start + 1 :]).split(b"\n", 3)
            try:
                yield binascii.unhexlify(lines[-1].translate(None, b" \r\n"))
            except binascii.Error:
                yield b""


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _LARGEST_PACKET)
    except zlib.error:
        return b""


# -- IIM -------------------------------------------------------------------------------------------------------------


def _in_iim(content: bytes, extension: str) -> str:
    """The evidence in IPTC-IIM: a keyword, or another text, that refuses AI."""
    for data in (content, *(_compressed_texts(content) if extension == "png" else ())):
        for number, word in enumerate(_WORDS.finditer(data)):
            if number >= _MOST_WORDS:
                break
            at = data.rfind(_IIM, max(0, word.start() - 1000), word.start())
            size = int.from_bytes(data[at + 3 : at + 5], "big")
            if at < 0 or not at + 5 <= word.start() or word.end() > at + 5 + size or size > 1000:
                continue
            if words := _refusals(data[at + 5 : at + 5 + size].decode("utf-8", "replace")):
                return f"IPTC-IIM: 2:{data[at + 2]:02d}: {words}"
    return ""


# -- C2PA ------------------------------------------------------------------------------------------------------------


def _in_c2pa(content: bytes, extension: str) -> str:
    if b"jumb" not in content:
        return ""
    boxes = _manifest_bytes(content, extension)
    if b".training-mining" not in boxes and _COMPRESSED_MANIFEST not in boxes:
        return ""
    label = _ASSERTION.search(boxes)
    if label is None and _COMPRESSED_MANIFEST not in boxes:
        return ""
    name = label[0].decode() if label else "a compressed manifest"
    try:
        library = importlib.import_module(_LIBRARY)
    except (ImportError, OSError):
        return f"C2PA: {name}, which is not read without the extra: pip install 'animesion[c2pa]'"
    try:
        document = _read_manifests(library, content, _MIME.get(extension, f"image/{extension}"))
        found, use = _reserved_use(document)
    except (library.C2paError, ValueError, LookupError, RecursionError, TypeError, AttributeError) as error:
        return f"C2PA: {name}, which cannot be read: {_line(str(error))}"
    # The label may be all that is left of an assertion, as in a claim whose assertion is damaged or was redacted.
    return f"C2PA: {name}, which is not among the assertions of its manifests" if label and not found else use


def _read_manifests(library: Any, content: bytes, mime: str) -> Any:
    """The manifest store as plain data; nothing is requested from the network."""
    settings = library.Settings.from_dict({"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}})
    with (
        library.Context(settings=settings) as context,
        library.Reader(mime, io.BytesIO(content), context=context) as reader,
    ):
        return json.loads(reader.json())


def _reserved_use(document: Any) -> tuple[bool, str]:
    """Whether any manifest has such an assertion, and the first use that one does not allow; ingredients count too."""
    found = False
    for manifest in document["manifests"].values():
        for assertion in manifest.get("assertions", ()):
            label = str(assertion.get("label", ""))
            if not _ASSERTION.fullmatch(label.encode()):
                continue
            found = True
            for use, entry in assertion["data"]["entries"].items():
                allowed = entry.get("use") if isinstance(entry, dict) else entry
                if allowed != "allowed":
                    return True, f"C2PA: {label}: {_line(f'{use}: {allowed}')}"
    return found, ""


def _manifest_bytes(content: bytes, extension: str) -> bytes:
    """Bytes in which the boxes of a C2PA manifest are contiguous: put together where the format cuts them."""
    if extension == "jpg":
        pieces: dict[bytes, list[tuple[int, bytes]]] = {}
        for kind, payload in _jpeg_segments(content):
            if kind == 0xEB and payload[:2] == b"JP":
                known = pieces.setdefault(payload[2:4], [])
                # Every segment repeats the header of the box.
                known.append((int.from_bytes(payload[4:8], "big"), payload[16:] if known else payload[8:]))
        return b"".join(piece for known in pieces.values() for _, piece in sorted(known, key=lambda each: each[0]))
    if extension == "gif":
        at = content.find(b"\x21\xff\x0bC2PA_GIF")
        blocks: list[bytes] = []
        at += 14
        while at > 13 and at < len(content) and content[at] and len(blocks) < _MOST_BLOCKS:
            blocks.append(content[at + 1 : at + 1 + content[at]])
            at += 1 + content[at]
        return b"".join(blocks)
    return content


# -- containers ------------------------------------------------------------------------------------------------------


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and payload of the segments before the first scan."""
    at = 2
    for _ in range(_MOST_BLOCKS):
        if fill := _FILL.match(content, at):
            at = fill.end() - 1
        if at + 4 > len(content) or content[at] != 0xFF or content[at + 1] in (0xD9, 0xDA):
            return
        size = int.from_bytes(content[at + 2 : at + 4], "big")
        if size < 2:
            return
        yield content[at + 1], content[at + 4 : at + 2 + size]
        at += 2 + size


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and payload of the chunks."""
    at = 8
    for _ in range(_MOST_BLOCKS):
        if at + 12 > len(content):
            return
        size = int.from_bytes(content[at : at + 4], "big")
        kind = content[at + 4 : at + 8]
        if kind in (b"iTXt", b"zTXt"):
            yield kind, content[at + 8 : at + 8 + size]
        at += 12 + size


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text.strip()[:_LONGEST])
