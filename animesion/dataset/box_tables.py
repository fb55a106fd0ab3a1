"""Boxes of images in files: tables (CSV), JSON lines, COCO and YOLO, written and read.

Boxes are relative to the upright image in memory and in pixels in every file but YOLO's. Files that are read were made
by anyone: what has no clear meaning is refused with its place. `animesion.dataset.box_files` only recognises such files
beside images.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from animesion.dataset import text_tables
from animesion.errors import UsageError
from animesion.schemas import Box
from animesion.storage.workspace import write_atomic

FORMATS = ("json", "csv", "coco", "yolo")

#: Columns of a table, as it is written; `flags` are separated by blanks.
COLUMNS = ("sha256", "file", "width", "height", "left", "top", "right", "bottom", "score", "kind", "flags")

_MOST_BYTES = 1_000_000_000
_MOST_FILES = 2_000_000
_MOST_SIDE = 1_000_000
_SLACK = 1.5
"""Pixels that a box may reach out of its image, as people draw it; it is clipped."""

_SEPARATORS = re.compile(r"[\s;,|]+")

_NAMES = {
    "sha256": ("sha256", "sha-256", "digest"),
    "file": ("file", "file_name", "filename", "path", "image"),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
    "left": ("left", "x1", "xmin"),
    "top": ("top", "y1", "ymin"),
    "right": ("right", "x2", "xmax"),
    "bottom": ("bottom", "y2", "ymax"),
    "score": ("score", "confidence"),
    "kind": ("kind", "class", "label", "category"),
    "flags": ("flags",),
}


@dataclass(frozen=True)
class KindBox:
    """A box and what it holds.

    Attributes:
        box: relative to the upright image; its score is 1 if the file has none.
        kind: such as `face`; empty if the file does not say.
        flags: further marks, such as `covered`.
    """

    box: Box
    kind: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageBoxes:
    """The boxes of an image.

    Attributes:
        file: path as in the file, with slashes.
        sha256: digest of the image's bytes as hex; empty if unknown.
        width: of the upright image in pixels; 0 if unknown.
        height: of the upright image in pixels; 0 if unknown.
        boxes: none for an image that has none.
    """

    file: str
    sha256: str = ""
    width: int = 0
    height: int = 0
    boxes: tuple[KindBox, ...] = ()


# -- writing -----------------------------------------------------------------------------------------------------------


def line(image: ImageBoxes) -> str:
    """An image as one line of JSON."""
    boxes = [
        {"box": _pixels(each.box, image), "score": round(each.box.score, 6)}
        | ({"kind": each.kind} if each.kind else {})
        | ({"flags": list(each.flags)} if each.flags else {})
        for each in image.boxes
    ]
    size = {"width": image.width, "height": image.height}
    return json.dumps({"file": image.file, "sha256": image.sha256, **size, "boxes": boxes}, ensure_ascii=False)


def text(images: Iterable[ImageBoxes], form: str) -> str:
    """Images as a text of the form `json` (lines), `csv` or `coco`."""
    if form == "json":
        return "".join(f"{line(image)}\n" for image in images)
    return _csv(images) if form == "csv" else _coco(list(images))


def write_yolo(images: Sequence[ImageBoxes], folder: Path) -> None:
    """Write a folder for YOLO: `labels/<path>.txt` with `class x y width height score`, and `classes.txt`.

    Raises:
        UsageError: two images would have the same label file, or one is outside the folder.
    """
    kinds = _kinds(images)
    files: dict[str, str] = {}
    for image in images:
        path = PurePosixPath(image.file)
        if path.is_absolute() or ".." in path.parts or "\0" in image.file:
            raise UsageError(f"{image.file} is outside the folder of the images: give that folder")
        name = str(path.with_suffix(".txt"))
        if name in files:
            raise UsageError(
                f"two images share the label file {name}: YOLO has one for each stem, so use another format"
            )
        rows = []
        for each in image.boxes:
            box = each.box
            numbers = (box.left + box.right) / 2, (box.top + box.bottom) / 2, box.right - box.left, box.bottom - box.top
            rows.append(f"{kinds.index(each.kind)} {' '.join(f'{v:.7f}' for v in numbers)} {box.score:.6f}\n")
        files[name] = "".join(rows)
    for name, content in files.items():
        target = folder / "labels" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content.encode())
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "classes.txt", "".join(f"{kind or 'object'}\n" for kind in kinds).encode())


def _csv(images: Iterable[ImageBoxes]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for image in images:
        first = [image.sha256, text_tables.cell_of(image.file), image.width, image.height]
        for each in image.boxes:
            last = [f"{each.box.score:.6f}", text_tables.cell_of(each.kind), text_tables.cell_of(" ".join(each.flags))]
            writer.writerow([*first, *_pixels(each.box, image), *last])
        if not image.boxes:  # so that it counts as looked at
            writer.writerow([*first, *[""] * 7])
    return out.getvalue()


def _coco(images: Sequence[ImageBoxes]) -> str:
    kinds = _kinds(images)
    document: dict[str, Any] = {
        "images": [
            {"id": i, "file_name": each.file, "width": each.width, "height": each.height, "sha256": each.sha256}
            for i, each in enumerate(images, 1)
        ],
        "annotations": [],
        "categories": [{"id": i, "name": kind or "object"} for i, kind in enumerate(kinds, 1)],
    }
    for i, image in enumerate(images, 1):
        for each in image.boxes:
            left, top, right, bottom = _pixels(each.box, image)
            wide, tall = round(right - left, 2), round(bottom - top, 2)
            entry: dict[str, Any] = {
                "id": len(document["annotations"]) + 1,
                "image_id": i,
                "category_id": kinds.index(each.kind) + 1,
            }
            entry |= {"bbox": [left, top, wide, tall], "area": round(wide * tall, 2), "iscrowd": 0}
            entry |= {"score": round(each.box.score, 6)} | ({"flags": list(each.flags)} if each.flags else {})
            document["annotations"].append(entry)
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _kinds(images: Iterable[ImageBoxes]) -> list[str]:
    return sorted({each.kind for image in images for each in image.boxes}) or [""]


def _pixels(box: Box, image: ImageBoxes) -> list[float]:
    """Left, top, right and bottom in pixels, to a hundredth."""
    sides = (image.width, image.height, image.width, image.height)
    return [round(share * side, 2) for share, side in zip(box[:4], sides, strict=True)]


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[ImageBoxes]:
    """Read a table, JSON lines, COCO's JSON, or a folder of YOLO's label files.

    Raises:
        UsageError: the file is none of them, or a row has no clear meaning; one sentence with its place.
    """
    if path.is_dir():
        return _read_yolo(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes: split it")
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"boxes {path} cannot be read: {(error.strerror or 'unreadable').lower()}") from None
    if path.suffix.lower() in {".json", ".jsonl"} or content.lstrip()[:1] in (b"{", b"["):
        return _read_json(content, str(path))
    return _read_table(text_tables.decoded(content, str(path)), str(path))


def _read_table(content: str, where: str) -> list[ImageBoxes]:
    rows = text_tables.rows(content, where)
    header = next(rows, [])
    columns = {name: text_tables.column(header, names) for name, names in _NAMES.items()}
    missing = [name for name in ("width", "height", "left", "top", "right", "bottom") if columns[name] is None]
    if columns["file"] is None and columns["sha256"] is None:
        missing.insert(0, "sha256 or file")
    if missing:
        raise UsageError(f"{where} has no column {', '.join(missing)}; columns of boxes are {', '.join(COLUMNS)}")
    found: dict[tuple[str, str], _Open] = {}
    for number, row in enumerate(rows, 2):
        place = f"{where}, row {number}"
        cells = {name: row[at] if at is not None and at < len(row) else "" for name, at in columns.items()}
        file, sha256 = text_tables.text_of_cell(cells["file"]), _digest(cells["sha256"], place)
        size = _whole(cells["width"], "width", place), _whole(cells["height"], "height", place)
        image = found.setdefault((sha256, file), _Open(size, []))
        if image.size != size:
            raise UsageError(
                f"{place}: {file or sha256} has {size[0]}x{size[1]} px here and {image.size[0]}x{image.size[1]} before"
            )
        corners = [cells[name] for name in ("left", "top", "right", "bottom")]
        if any(corners):
            score = _number(cells["score"], "score", place) if cells["score"] else 1.0
            numbers = [_number(cell, "box", place) for cell in corners]
            kind, flags = text_tables.text_of_cell(cells["kind"]), text_tables.text_of_cell(cells["flags"])
            image.boxes.append(
                _kind_box(numbers, size, score, kind, tuple(filter(None, _SEPARATORS.split(flags))), place)
            )
    return [ImageBoxes(file, sha256, *image.size, tuple(image.boxes)) for (sha256, file), image in found.items()]


@dataclass
class _Open:
    """An image whose boxes are being read."""

    size: tuple[int, int]
    boxes: list[KindBox]


def _read_json(content: bytes, where: str) -> list[ImageBoxes]:
    try:
        try:
            document = json.loads(content)
        except ValueError:
            document = [json.loads(each) for each in content.splitlines() if each.strip()]
    except (ValueError, RecursionError):
        raise UsageError(f"{where} is neither JSON nor lines of JSON") from None
    if isinstance(document, dict) and "boxes" in document and "annotations" not in document:
        document = [document]
    if isinstance(document, list):
        return [_of_line(each, f"{where}, image {number}") for number, each in enumerate(document, 1)]
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UsageError(f"{where} has neither images with boxes, as `animesion detect` writes, nor COCO's images")
    return _of_coco(document, where)


def _of_line(entry: Any, where: str) -> ImageBoxes:
    if not isinstance(entry, dict) or not isinstance(entry.get("boxes"), list):
        raise UsageError(f"{where} has no list 'boxes'")
    size = _whole(entry.get("width"), "width", where), _whole(entry.get("height"), "height", where)
    boxes = []
    for each in entry["boxes"]:
        if not isinstance(each, dict) or not isinstance(each.get("box"), list) or len(each["box"]) != 4:
            raise UsageError(f"{where}: a box needs 'box' with left, top, right and bottom in pixels")
        numbers = [_number(value, "box", where) for value in each["box"]]
        score = _number(each.get("score", 1.0), "score", where)
        boxes.append(_kind_box(numbers, size, score, _text(each.get("kind")), _texts(each.get("flags")), where))
    return ImageBoxes(_text(entry.get("file")), _digest(_text(entry.get("sha256")), where), *size, tuple(boxes))


def _of_coco(document: dict[str, Any], where: str) -> list[ImageBoxes]:
    kinds = {
        each["id"]: _text(each.get("name"))
        for each in _dicts(document.get("categories"))
        if isinstance(each.get("id"), int)
    }
    images: dict[int, tuple[str, str, tuple[int, int]]] = {}
    for each in _dicts(document["images"]):
        place = f"{where}, image {each.get('id')!r}"
        if not isinstance(each.get("id"), int) or each["id"] in images:
            raise UsageError(f"{place}: ids of images are different whole numbers")
        size = _whole(each.get("width"), "width", place), _whole(each.get("height"), "height", place)
        images[each["id"]] = _text(each.get("file_name")), _digest(_text(each.get("sha256")), place), size
    boxes: dict[int, list[KindBox]] = {image: [] for image in images}
    for each in _dicts(document.get("annotations")):
        place = f"{where}, annotation {each.get('id')!r}"
        image = each.get("image_id")
        if not isinstance(image, int) or image not in images:
            raise UsageError(f"{place} belongs to no image of the file")
        corners = each.get("bbox")
        if not isinstance(corners, list) or len(corners) != 4:
            raise UsageError(f"{place} has no 'bbox' of left, top, width and height")
        left, top, wide, tall = (_number(value, "bbox", place) for value in corners)
        flags = (*_texts(each.get("flags")), *(("crowd",) if each.get("iscrowd") else ()))
        score = _number(each.get("score", 1.0), "score", place)
        category = each.get("category_id")
        kind = kinds.get(category, "") if isinstance(category, int) else ""
        boxes[image].append(
            _kind_box([left, top, left + wide, top + tall], images[image][2], score, kind, flags, place)
        )
    return [ImageBoxes(file, sha256, *size, tuple(boxes[image])) for image, (file, sha256, size) in images.items()]


def _read_yolo(folder: Path) -> list[ImageBoxes]:
    """Label files below `labels/`, or below the folder itself; the file's name is the image's without its suffix."""
    root = folder / "labels" if (folder / "labels").is_dir() else folder
    kinds: list[str] = []
    for listed in (folder / "classes.txt", root / "classes.txt"):
        if listed.is_file() and not kinds:
            lines = text_tables.decoded(listed.read_bytes()[:1_000_000], str(listed)).splitlines()
            kinds = [each.strip() for each in lines]
    found = []
    for path in _label_files(root):
        boxes = []
        for number, row in enumerate(text_tables.text_of(path.read_bytes(), str(path)).splitlines(), 1):
            cells, place = row.split(), f"{path}, line {number}"
            if not cells:
                continue
            if len(cells) not in (5, 6):
                raise UsageError(f"{place}: a box of YOLO is a class and four numbers, not {len(cells)} columns")
            kind = _whole(cells[0], "class", place, least=0)
            if kinds and kind >= len(kinds):
                raise UsageError(f"{place}: class {kind} is not among the {len(kinds)} of classes.txt")
            x, y, wide, tall, *score = (_number(cell, "box", place) for cell in cells[1:])
            corners = [x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2]
            name = kinds[kind] if kinds else str(kind)
            boxes.append(_kind_box(corners, (1, 1), score[0] if score else 1.0, name, (), place, slack=0.01))
        found.append(ImageBoxes(path.relative_to(root).with_suffix("").as_posix(), boxes=tuple(boxes)))
    if not found:
        raise UsageError(f"{folder} has no label files of YOLO (*.txt): give the folder that holds labels/")
    return found


def _label_files(root: Path) -> Iterator[Path]:
    files = sorted(path for path in root.rglob("*.txt") if path.name != "classes.txt" and path.is_file())
    if len(files) > _MOST_FILES:
        raise UsageError(f"{root} has more than {_MOST_FILES:,} label files")
    yield from files


def _kind_box(
    corners: Sequence[float],
    size: Sequence[int],
    score: float,
    kind: str,
    flags: tuple[str, ...],
    where: str,
    slack: float = _SLACK,
) -> KindBox:
    """A box from its corners in units of the size.

    Raises:
        UsageError: it has no area inside the image, reaches out of the image, or its score is not from 0 to 1.
    """
    left, top, right, bottom = corners
    width, height = size
    if right <= max(0.0, left) or bottom <= max(0.0, top) or left >= min(width, right) or top >= min(height, bottom):
        raise UsageError(f"{where}: the box {left:g}, {top:g}, {right:g}, {bottom:g} has no area inside its image")
    if min(left, top) < -slack or right > width + slack or bottom > height + slack:
        raise UsageError(
            f"{where}: the box {left:g}, {top:g}, {right:g}, {bottom:g} reaches out of its image of {width}x{height}"
        )
    if not 0 <= score <= 1:
        raise UsageError(f"{where}: the score {score:g} is not from 0 to 1")
    left, right = max(0.0, left / width), min(1.0, right / width)
    top, bottom = max(0.0, top / height), min(1.0, bottom / height)
    return KindBox(Box(left, top, right, bottom, score), kind, flags)


def _digest(value: str, where: str) -> str:
    value = value.lower()
    if value and (len(value) != 64 or not set(value) <= set("0123456789abcdef")):
        raise UsageError(f"{where}: a SHA-256 has 64 hexadecimal digits, not {value[:80]!r}")
    return value


def _whole(value: object, name: str, where: str, least: int = 1) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_SIDE:
        raise UsageError(f"{where}: {name} is a whole number from {least}, not {str(value)[:40]!r}")
    return value


def _number(value: object, name: str, where: str) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or abs(number) > 1e9:
        raise UsageError(f"{where}: {name} has {str(value)[:40]!r} where a number is expected")
    return number


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: object) -> tuple[str, ...]:
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()


def _dicts(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
