"""Contact sheets: small images with boxes and scores, as an image file or as one HTML file without scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from animesion.errors import UsageError
from animesion.images import codec, files
from animesion.schemas import Box
from animesion.storage.workspace import write_atomic

#: Suffixes of sheets that can be written.
SUFFIXES = (".png", ".jpg", ".webp", ".html")

#: Colours of detectors, in their order.
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#9a6324")

RIGHT, WRONG, MISSED, IGNORED = "#2fae4e", "#ff8c00", "#e6194b", "#8a8a8a"

SIDE = 240
_COLUMNS, _GAP, _LINE = 6, 6, 14
_MOST_TEXT = 38


@dataclass(frozen=True)
class Mark:
    """A box to draw.

    Attributes:
        box: relative to the image.
        colour: as `#rrggbb`.
        text: such as the score.
        thin: a line of one pixel instead of two, for boxes that are unsure.
    """

    box: Box
    colour: str
    text: str = ""
    thin: bool = False


@dataclass(frozen=True)
class Cell:
    """An image of the sheet, with a caption."""

    path: Path
    caption: str
    marks: tuple[Mark, ...] = ()


def check(path: Path) -> None:
    """Refuse a file of another form.

    Raises:
        UsageError: its suffix is none of `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--sheet {path}: give a file that ends in {', '.join(SUFFIXES)}")


def write(path: Path, cells: Sequence[Cell], legend: Sequence[tuple[str, str]] = ()) -> None:
    """Write a sheet.

    Args:
        path: ends in one of `SUFFIXES`.
        cells: the images in their order; one that cannot be read stays empty.
        legend: colours and what they mean.

    Raises:
        UsageError: the suffix is none of them.
    """
    check(path)
    suffix = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".html":
        write_atomic(path, _html(cells, legend).encode())
        return
    sheet = _drawn(cells, legend)
    out = io.BytesIO()
    kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix]
    sheet.save(out, kind, **({"quality": 88} if kind != "PNG" else {}))
    write_atomic(path, out.getvalue())


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` images, evenly spaced."""
    if count <= most:
        return list(range(count))
    return [i * count // most for i in range(most)]


def _small(cell: Cell) -> Image.Image | None:
    content, problem = files.read(cell.path)
    if problem:
        return None
    try:
        image = codec.decode(content, codec.Limits()).image
    except codec.RejectedImageError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image


def _drawn(cells: Sequence[Cell], legend: Sequence[tuple[str, str]]) -> Image.Image:
    font = ImageFont.load_default(11)
    top = 2 * _GAP + _LINE if legend else _GAP
    columns = min(_COLUMNS, max(1, len(cells)))
    wide, tall = SIDE + _GAP, SIDE + _GAP + 2 * _LINE
    sheet = Image.new("RGB", (columns * wide + _GAP, -(-len(cells) // columns) * tall + top + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    at = _GAP
    for colour, text in legend:
        draw.rectangle((at, _GAP, at + 10, _GAP + 10), fill=colour)
        draw.text((at + 15, _GAP - 2), text, fill="black", font=font)
        at += 30 + int(draw.textlength(text, font=font))
    for number, cell in enumerate(cells):
        left, upper = _GAP + number % columns * wide, top + number // columns * tall
        if image := _small(cell):
            x, y = left + (SIDE - image.width) // 2, upper + (SIDE - image.height) // 2
            sheet.paste(image, (x, y))
            for mark in cell.marks:
                _outline(draw, mark, x, y, image.size, font)
        for line, text in enumerate(_lines(cell.caption)):
            draw.text((left, upper + SIDE + line * _LINE), text, fill="black", font=font)
    return sheet


def _outline(
    draw: ImageDraw.ImageDraw,
    mark: Mark,
    x: int,
    y: int,
    size: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    width, height = size
    box = mark.box
    left, top = x + box.left * width, y + box.top * height
    right, bottom = max(left + 1, x + box.right * width - 1), max(top + 1, y + box.bottom * height - 1)
    draw.rectangle((left, top, right, bottom), outline=mark.colour, width=1 if mark.thin else 2)
    if mark.text:
        place = (left + 1, max(y, top - 12))
        draw.rectangle(draw.textbbox(place, mark.text, font=font), fill=mark.colour)
        draw.text(place, mark.text, fill="white", font=font)


def _lines(caption: str) -> Iterator[str]:
    """At most two lines of a caption; the end of a long path tells more than its start."""
    for line in caption.split("\n")[:2]:
        text = "".join(c if c.isprintable() else "?" for c in line)
        yield text if len(text) <= _MOST_TEXT else "…" + text[-_MOST_TEXT:]


def _html(cells: Sequence[Cell], legend: Sequence[tuple[str, str]]) -> str:
    figures = []
    for cell in cells:
        image = _small(cell)
        caption = "<br>".join(html.escape(line) for line in cell.caption.split("\n")[:2])
        inner = '<span class="none">no image</span>'
        if image:
            out = io.BytesIO()
            image.save(out, "WEBP", quality=75)
            data = base64.b64encode(out.getvalue()).decode("ascii")
            shapes = "".join(_shape(mark, image.width, image.height) for mark in cell.marks)
            size = f'width="{image.width}" height="{image.height}"'
            inner = (
                f'<img {size} src="data:image/webp;base64,{data}" alt="">'
                f'<svg {size} viewBox="0 0 {image.width} {image.height}">{shapes}</svg>'
            )
        figures.append(f"<figure><div>{inner}</div><figcaption>{caption}</figcaption></figure>")
    keys = "".join(
        f'<li><b style="background:{html.escape(colour)}"></b>{html.escape(text)}</li>' for colour, text in legend
    )
    return _PAGE.replace("%LEGEND%", keys).replace("%FIGURES%", "\n".join(figures))


def _shape(mark: Mark, width: int, height: int) -> str:
    box, colour = mark.box, html.escape(mark.colour)
    x, y = box.left * width, box.top * height
    wide, tall = (box.right - box.left) * width, (box.bottom - box.top) * height
    text = f'<text x="{x + 1:.1f}" y="{max(9.0, y - 2):.1f}" fill="{colour}">{html.escape(mark.text)}</text>'
    line = f'fill="none" stroke="{colour}" stroke-width="{1 if mark.thin else 2}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" {line}/>{text}'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Boxes</title><style>
body { font: 13px system-ui, sans-serif; margin: 12px; }
ul { display: flex; gap: 18px; list-style: none; padding: 0; }
b { display: inline-block; width: 1em; height: 1em; margin-right: 6px; }
main { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 240px; overflow-wrap: anywhere; }
div { position: relative; } svg { position: absolute; left: 0; top: 0; }
text { font-size: 11px; font-weight: 600; paint-order: stroke; stroke: white; stroke-width: 2px; }
</style></head><body><ul>%LEGEND%</ul><main>
%FIGURES%
</main></body></html>
"""
