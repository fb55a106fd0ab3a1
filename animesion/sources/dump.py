"""The source for local dumps in the layout of Danbooru2018 to 2021: JSON lines and images in `BBBB/ID.ext` buckets.

In such dumps numbers are strings, tags may repeat, ratings are s, q or e, and lines may be damaged. Head boxes are read
from DanbooruAnimeFaces' `faces.tsv`, and the published order of classes from `tagIds.tsv`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, cast

from pydantic import Field

from animesion.config.settings import Section
from animesion.dataset import label_files
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, faces
from animesion.sources.image_root import ImageRoot
from animesion.sources.posts import NOT_IMAGES, families
from animesion.sources.stored import PathOrUrl

_CHARACTER = "4"
_ARTIST = "1"
_FLAGS = ("deleted", "banned", "pending", "flagged")
_LONGEST_LINE = 16 * 1024 * 1024


class DumpOptions(Section):
    """Options of the `dump` source."""

    metadata: str = Field(description="a JSON-lines file (.json, .jsonl; .gz and .xz too) or a folder of them")
    images: PathOrUrl = Field(
        description="folder of BBBB/ID.ext buckets, such as original/ or 512px/; may be s3:// or gs://"
    )
    faces: str = Field("", description="faces.tsv with the head boxes; without it, set crop.detector to a detector")
    tag_ids: str = Field("", description="tagIds.tsv; orders classes by the published tag id instead of by name")
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")


class DumpSource:
    """Posts of a metadata dump."""

    Options: ClassVar[type[Section]] = DumpOptions
    summary: ClassVar[str] = "a danbooru2018-style dump: metadata JSON lines, image buckets, faces.tsv"
    remote: ClassVar[bool] = False

    def __init__(self, options: DumpOptions) -> None:
        self.options = options
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """An empty context."""
        return contextlib.nullcontext()

    def items(self) -> Iterator[Item]:
        """One item per post, in the order of the metadata; `order` is the row of the post in `faces.tsv`, if any."""
        root = ImageRoot(self.options.images, "source.images")
        table = faces.load(Path(self.options.faces).expanduser()) if self.options.faces else None
        tag_ids = label_files.read_tag_ids(Path(self.options.tag_ids).expanduser()) if self.options.tag_ids else {}
        seen: set[int] = set()
        repeats = position = 0
        for file in self._metadata_files():
            for line, text in _lines(file):
                position += 1
                record = _record(text)
                if record is None:
                    yield _unreadable(file, line, position)
                elif record["id"] in seen:
                    repeats += 1
                else:
                    seen.add(record["id"])
                    yield self._item(root, record, table, tag_ids, position)
        if repeats:
            self.notes.append(f"{repeats} metadata record(s) repeat a post and are skipped")
        absent = sum(post not in seen for post in table.boxes) if table else 0
        if absent:
            self.notes.append(f"{absent} post(s) of the face table are not in the metadata")

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """Read files below the image root."""
        places = [json.loads(item.locator) for item in items]
        return ImageRoot(self.options.images, "source.images").read(places, self.options.max_bytes)

    def _metadata_files(self) -> list[Path]:
        path = Path(self.options.metadata).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        elif path.exists():
            files = [path]
        else:
            raise UsageError(f"source.metadata: {path} not found")
        if not files:
            raise UsageError(f"source.metadata: {path} contains no files")
        return files

    def _item(
        self,
        root: ImageRoot,
        record: dict[str, Any],
        table: faces.FaceTable | None,
        tag_ids: dict[str, int],
        position: int,
    ) -> Item:
        number = record["id"]
        tags = _tags(record)
        characters = tags.get(_CHARACTER, [])
        extension = _text(record, "file_ext").lower()
        failure, detail = "", ""
        locator: dict[str, Any] = {}
        if extension in NOT_IMAGES:
            failure, detail = DropReason.UNSUPPORTED_FORMAT, extension
        else:
            bucket = f"{number % 1000:04d}"
            # whole-image dumps keep the extension, the 512px subset is all JPEG
            for name in dict.fromkeys(f"{bucket}/{number}.{e}" for e in (extension, "jpg", "png") if e.isalnum()):
                locator, failure = root.locate(name)
                if locator:
                    break
        row = table.row.get(number, -1) if table else -1
        order = row if row >= 0 else (table.rows if table else 0) + position
        return Item(
            key=f"danbooru-{number}",
            source="danbooru",
            source_id=str(number),
            locator=json.dumps(locator),
            order=order,
            labels=tuple(characters),
            families=families(
                str(number), _text(record, "parent_id"), _text(record, "pixiv_id"), _text(record, "source")
            ),
            boxes=None if table is None else table.boxes.get(number, ()),
            class_order=tag_ids.get(characters[0], -1) if len(characters) == 1 else -1,
            rating=_text(record, "rating")[:1],
            flags=tuple(flag for flag in _FLAGS if str(record.get(f"is_{flag}")).lower() in {"true", "1"}),
            page_url=f"https://danbooru.donmai.us/posts/{number}",
            author=clean_text(" ".join(tags.get(_ARTIST, [])), 300),
            failure=failure,
            detail=detail,
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield non-empty lines with their numbers; one above `_LONGEST_LINE` is cut, so that it counts as unreadable."""
    try:
        with _opened(path) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if not line.endswith(b"\n"):
                    while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                if line.strip():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UsageError(f"source.metadata: {path} cannot be read to its end ({clean_text(str(error), 120)})") from None


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return cast(IO[bytes], lzma.open(path, "rb")) if path.suffix == ".xz" else path.open("rb")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        number = int(record["id"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    return {**record, "id": number} if isinstance(record, dict) and 0 < number < 10**12 else None


def _unreadable(file: Path, line: int, position: int) -> Item:
    return Item(
        key=f"danbooru-record-{position}",
        source="danbooru",
        source_id=clean_text(f"{file.name}:{line}"),
        locator="{}",
        order=2**62 + position,
        boxes=(),
        failure=DropReason.BAD_RECORD,
        detail=clean_text(f"{file.name}, line {line}", 200),
    )


def _tags(record: dict[str, Any]) -> dict[str, list[str]]:
    """Distinct tag names by category."""
    found: dict[str, dict[str, None]] = {}
    listed = record.get("tags")
    for tag in listed if isinstance(listed, list) else ():
        if isinstance(tag, dict) and isinstance(tag.get("name"), str):
            found.setdefault(str(tag.get("category")), {})[clean_text(tag["name"])] = None
    return {category: list(names) for category, names in found.items()}


def _text(record: dict[str, Any], name: str) -> str:
    """A field as text: numbers are strings in dumps, but not on the site itself."""
    value = record.get(name)
    if isinstance(value, bool) or value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return str(value)[:2000] if isinstance(value, (str, int, float)) else ""
