"""The source for local dumps in the layout of Danbooru2018 to 2021: JSON lines and images in `BBBB/ID.ext` buckets.

In such dumps numbers are strings, tags may repeat, ratings are s, q or e, and lines may be damaged. Exports of the API
have `tag_string_character` in place of `tags`, and may be one JSON array. Head boxes are read
from DanbooruAnimeFaces' `faces.tsv`, and the published order of classes from `tagIds.tsv`. Tags of characters and
artists are always read, the others if the recipe asks for tags: most tags are general ones.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, cast

from pydantic import Field

from animesion.config.settings import Section
from animesion.dataset import label_files
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, faces, stamps, tag_tables
from animesion.sources import families as by_name
from animesion.sources.image_root import ImageRoot
from animesion.sources.posts import NOT_IMAGES, families
from animesion.sources.stored import PathOrUrl, not_found
from animesion.sources.tag_tables import TagTableOptions, TagTables, clean_tag
from animesion.wording import amount

_FLAGS = {flag: f"is_{flag}" for flag in ("deleted", "banned", "pending", "flagged")}
_LONGEST_LINE = 16 * 1024 * 1024
_LONGEST_MEMBER = 1024 * 1024
#: Categories of tags that are always read, as dumps and as the site write them.
_NEEDED: dict[Any, str] = {"4": "character", 4: "character", "1": "artist", 1: "artist"}
#: Those that are read for the tags of samples.
_EVERY = _NEEDED | {"0": "general", 0: "general", "3": "copyright", 3: "copyright", "5": "meta", 5: "meta"}
_TRUE = frozenset({"true", "t", "yes", "y", "1", "1.0"})
_RATINGS = {
    "general": "g", "safe": "s", "sensitive": "s", "questionable": "q", "explicit": "e",
    "g": "g", "s": "s", "q": "q", "e": "e", "": "",
}  # fmt: skip
#: Rating of a word that is not in `_RATINGS`; no filter allows it by default.
_UNKNOWN_RATING = "?"


class DumpOptions(TagTableOptions):
    """Options of the `dump` source."""

    metadata: str = Field(
        description="JSON lines or one JSON array (.json, .jsonl; .gz and .xz too), or a folder of such files"
    )
    images: PathOrUrl = Field(
        description="folder of BBBB/ID.ext buckets, such as original/ or 512px/; may be s3:// or gs://"
    )
    faces: str = Field(
        "", description="faces.tsv with the head boxes; without it, set crop.detector to `auto` or to a detector"
    )
    tag_ids: str = Field("", description="tagIds.tsv; orders classes by the published tag id instead of by name")
    family: by_name.Family = "auto"
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")


class DumpSource:
    """Posts of a metadata dump."""

    Options: ClassVar[type[Section]] = DumpOptions
    summary: ClassVar[str] = "a danbooru2018-style dump: metadata JSON lines, image buckets, faces.tsv"
    remote: ClassVar[bool] = False

    def __init__(self, options: DumpOptions) -> None:
        self.options = options
        self.notes: list[str] = []
        self.with_tags = False
        self._tables = TagTables()

    def session(self) -> contextlib.AbstractContextManager[object]:
        """An empty context."""
        return contextlib.nullcontext()

    def items(self) -> Iterator[Item]:
        """One item per post, in the order of the metadata; `order` is the row of the post in `faces.tsv`, if any."""
        root = ImageRoot(self.options.images, "source.images")
        table = faces.load(Path(self.options.faces).expanduser()) if self.options.faces else None
        tag_ids = label_files.read_tag_ids(Path(self.options.tag_ids).expanduser()) if self.options.tag_ids else {}
        self._tables = self.tag_tables()
        seen: set[int] = set()
        repeats = position = labelled = 0
        for file in self._metadata_files():
            for line, value in _values(file):
                position += 1
                record = _record(value)
                if record is None:
                    yield _unreadable(file, line, position)
                elif record["id"] in seen:
                    repeats += 1
                else:
                    seen.add(record["id"])
                    item = self._item(root, record, table, tag_ids, position)
                    labelled += bool(item.labels)
                    yield item
        if repeats:
            self.notes.append(
                amount(
                    repeats,
                    "metadata record repeats a post and is skipped",
                    "metadata records repeat a post and are skipped",
                )
            )
        if seen and not labelled:
            self.notes.append(
                "no post has a character: the metadata need `tags` with their categories, or `tag_string_character`"
            )
        absent = sum(post not in seen for post in table.boxes) if table else 0
        if absent:
            self.notes.append(
                f"{amount(absent, 'post of the face table is', 'posts of the face table are')} not in the metadata"
            )

    def tag_tables(self) -> TagTables:
        """The tables of the options."""
        return tag_tables.load(self.options)

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """Read files below the image root."""
        places = [json.loads(item.locator) for item in items]
        return ImageRoot(self.options.images, "source.images").read(places, self.options.max_bytes)

    def stamp(self) -> str:
        """A digest of the names, sizes and times of the metadata, of the tables and of all images."""
        options = self.options
        tables = (options.metadata, options.faces, options.tag_ids, options.aliases, options.implications)
        return stamps.of([options.images], [file for file in tables if file])

    def _metadata_files(self) -> list[Path]:
        path = Path(self.options.metadata).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        elif path.exists():
            files = [path]
        else:
            raise not_found(path, "source.metadata")
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
        tags = _tags(record, _EVERY if self.with_tags else _NEEDED)
        characters = tags.get("character", ())
        if self._tables.aliases or self._tables.implications:
            characters = self._tables.labels(characters)
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
            labels=characters,
            families=(
                *families(str(number), _text(record, "parent_id"), _text(record, "pixiv_id"), _text(record, "source")),
                # a number alone says nothing to `auto`
                *(by_name.matched(str(number), self.options.family) if self.options.family != "auto" else ()),
            ),
            boxes=None if table is None else table.boxes.get(number, ()),
            class_order=tag_ids.get(characters[0], -1) if len(characters) == 1 else -1,
            rating=_RATINGS.get(_text(record, "rating").strip().lower(), _UNKNOWN_RATING),
            flags=tuple(flag for flag, field in _FLAGS.items() if (value := record.get(field)) and _is_true(value)),
            page_url=f"https://danbooru.donmai.us/posts/{number}",
            author=clean_text(" ".join(tags.get("artist", ())), 300),
            failure=failure,
            detail=detail,
            tags=tags if self.with_tags else None,
        )


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of each record of a file; None for a line that is not JSON.

    Raises:
        UsageError: The file cannot be read, is not JSON, or is an array that is damaged.
    """
    from animesion_scrapers.url_tables import encodings, json_arrays

    try:
        with _opened(path) as file:
            head = file.read(4096)
            if fault := encodings.not_text(head):
                raise UsageError(
                    f"source.metadata: {path} is {fault.partition(':')[0]}: save its rows as JSON lines and give that"
                )
            file.seek(0)
            if json_arrays.is_array(head):
                file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
                yield from json_arrays.members(file, _LONGEST_MEMBER)
            else:
                yield from _lines(file)
    except json_arrays.MalformedError as error:
        raise UsageError(
            f"source.metadata: {path}, line {error.line}: {error}; give one record per line, so that a damaged one is "
            "dropped alone"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"source.metadata: {path} cannot be read to its end ({clean_text(str(error), 120)})") from None


def _lines(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Number and value of non-empty lines; the value is None above `_LONGEST_LINE` and for malformed JSON."""
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if not line.endswith(b"\n"):
            while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return cast(IO[bytes], lzma.open(path, "rb")) if path.suffix == ".xz" else path.open("rb")


def _record(value: Any) -> dict[str, Any] | None:
    """A record with its id as an integer; None if the value is not an object or has no id."""
    try:
        number = int(value["id"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    return {**value, "id": number} if isinstance(value, dict) and 0 < number < 10**12 else None


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


def _tags(record: dict[str, Any], wanted: Mapping[Any, str]) -> dict[str, tuple[str, ...]]:
    """Distinct tags by category: those of `tags`, or of the `tag_string_*` fields if it lists none with a name.

    Args:
        record: of a post.
        wanted: name of each category to read, by its code.
    """
    found: dict[str, dict[str, None]] = {}
    value = record.get("tags")
    listed = value if isinstance(value, list) else []
    without_general = wanted is _NEEDED
    for tag in listed:
        # most tags are general: cleaning them too would cost more than parsing the record
        if not isinstance(tag, dict) or ((category := tag.get("category")) == "0" and without_general):
            continue
        # exact types, as `True` equals 1
        if type(category) in (str, int) and (known := wanted.get(category)) and isinstance(tag.get("name"), str):
            found.setdefault(known, {})[clean_tag(tag["name"])] = None
    if not found and not any(isinstance(tag, dict) and isinstance(tag.get("name"), str) for tag in listed):
        for category in dict.fromkeys(wanted.values()):
            value = record.get(f"tag_string_{category}") or record.get(f"tags_{category}") or ()
            names = value.split() if isinstance(value, str) else value if isinstance(value, list) else ()
            found[category] = dict.fromkeys(clean_tag(name) for name in names if isinstance(name, str))
    return {category: tuple(filter(None, names)) for category, names in found.items()}


def _is_true(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and str(value).strip().lower() in _TRUE


def _text(record: dict[str, Any], name: str) -> str:
    """A field as text: numbers are strings in dumps, but not on the site itself."""
    value = record.get(name)
    if isinstance(value, bool) or value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return str(value)[:2000] if isinstance(value, (str, int, float)) else ""
