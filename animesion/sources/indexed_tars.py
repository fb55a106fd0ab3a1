"""The source for tars with a JSON index of offsets, as mirrors of boorus are published: `0000.tar` and `0000.json`.

Files are read at their offsets, from disk, from a bucket or with HTTP range requests (`animesion.sources.tar_ranges`);
a tar is never read as a whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import Field

from animesion.config.settings import Section
from animesion.dataset import readings, sidecars, text_tables
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, families, file_key
from animesion.sources.crawled import PrivateHosts
from animesion.sources.file_sets import ordered_splits, split_of
from animesion.sources.stored import PathOrUrl
from animesion.sources.tar_ranges import Mirror
from animesion.splits import SPLIT_NAMES
from animesion.wording import amount

_LARGEST_LABELS = 1 << 30
_LARGEST_SIDECAR = 1 << 20

#: Names of columns of a table of labels.
_FILE = ("id", "post_id", "file", "file_name", "filename", "path", "image")
_LABEL = ("label", "class", "class_name", "category", "character", "species", "cultivar")
_SPLIT = ("split", "subset", "partition")

#: Files whose sidecars are read at once.
_AT_ONCE = 256


class IndexedTarOptions(Section):
    """Options of the `indexed-tar` source."""

    index: PathOrUrl = Field(
        description="folder of .json indexes with their tars, one index, or pattern such as {0000..0999}.json; may be "
        "s3://, gs://, hf://datasets/owner/name, or https:// for indexes that a pattern names"
    )
    tars: PathOrUrl = Field("", description="folder or URL of the tars; empty if they are next to their indexes")
    labels: str = Field(
        "", description="table of id (or file) and label, maybe split; empty to read a .json member for each image"
    )
    contact: str = Field("", description="e-mail address or URL for the User-Agent; required for https://")
    requests_per_second: float = Field(1.0, gt=0, le=10, strict=False, description="highest rate per host")
    allow_private: PrivateHosts = Field([])
    encoding: text_tables.Encoding = ""
    family: families.Family = "auto"
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a tar as the index states it."""

    tar: str
    name: str
    offset: int
    size: int
    sha256: str
    failure: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Label:
    """Class names, published split and provenance of an image."""

    labels: tuple[str, ...] = ()
    split: str = ""
    fields: tuple[tuple[str, str], ...] = ()


class IndexedTarSource:
    """Images in tars with an index."""

    Options = IndexedTarOptions
    summary: ClassVar[str] = "tars with a JSON index of offsets (booru mirrors), read in place, also over HTTP"
    remote: ClassVar[bool] = True

    def __init__(self, options: IndexedTarOptions) -> None:
        self.options = options
        self.notes: list[str] = []
        #: address and port to connect to instead of a host, as in `animesion.sources.crawled`
        self.connect_to: dict[str, tuple[str, int]] = {}
        self._mirror: Mirror | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """One limiter for all requests of the session."""
        self._mirror = self._make_mirror()
        try:
            yield
        finally:
            self._mirror = None

    def items(self) -> Iterator[Item]:
        """One item per image that the indexes list, by index and offset."""
        mirror = self._mirror or self._make_mirror()
        path = Path(self.options.labels).expanduser() if self.options.labels else None
        table = _read_labels(path, self.options.encoding, self.notes) if path else None
        files: list[_File] = []
        labels: list[_Label] = []
        notes: Counter[str] = Counter()
        tars = 0
        for tar, content, tar_size in mirror.indexes():
            tars += 1
            images, side = _listed(tar, content, tar_size, mirror.where(tar), self.options.max_bytes, notes)
            files += images
            if table is not None:
                labels += [_from_table(table, image) for image in images]
            else:
                labels += _from_sidecars(mirror, tar, images, side)
        if not files:
            raise UsageError(f"source.index: the indexes of {self.options.index} list no images")
        if not any(label.labels for label in labels):
            raise UsageError(
                f"source.labels: none of the {len(files):,} images has a label"
                + (f" in {self.options.labels}" if table is not None else ": no .json member names characters")
                + "; give a table with the columns id or file, and label"
            )
        yield from self._items(files, labels)
        self.notes += self._sentences(files, labels, tars, notes)

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The bytes of images at their offsets, checked against the digests of the index."""
        mirror = self._mirror or self._make_mirror()
        places: list[dict[str, Any]] = [json.loads(item.locator) for item in items]
        for tar, group in itertools.groupby(places, key=lambda place: str(place["tar"])):
            wanted = list(group)
            spans = [(int(place["offset"]), int(place["size"])) for place in wanted]
            for place, (_, size), payload in zip(wanted, spans, mirror.pieces(tar, spans), strict=True):
                yield payload if payload.reason else _checked(payload.content, size, str(place["sha256"]))

    def _make_mirror(self) -> Mirror:
        return Mirror(
            self.options.index,
            self.options.tars,
            contact=self.options.contact,
            requests_per_second=self.options.requests_per_second,
            connect_to=self.connect_to,
            allow_private=self.options.allow_private,
        )

    def _items(self, files: Sequence[_File], labels: Sequence[_Label]) -> Iterator[Item]:
        stems = [PurePosixPath(file.name).stem for file in files]
        firsts = [label.labels[0] if label.labels else "" for label in labels]
        known = families.tokens(stems, firsts, self.options.family)
        for order, (file, label, stem, family) in enumerate(zip(files, labels, stems, known, strict=True)):
            name = f"{file.tar}/{file.name}"
            place = {"tar": file.tar, "offset": file.offset, "size": file.size, "sha256": file.sha256}
            fields = dict(label.fields)
            yield Item(
                key=file_key("indexed-tar", name.encode("utf-8", "surrogatepass"), stem),
                source="indexed-tar",
                source_id=clean_text(name, 1000),
                locator=json.dumps(place),
                order=order,
                labels=label.labels,
                families=family,
                split=label.split or split_of(file.tar),
                rating=fields.get("rating", "")[:1].lower(),
                author=fields.get("author", ""),
                page_url=fields.get("page_url", ""),
                file_url=fields.get("file_url", ""),
                licence=fields.get("licence", ""),
                failure=file.failure,
                detail=file.detail,
            )

    def _sentences(
        self, files: Sequence[_File], labels: Sequence[_Label], tars: int, counts: Counter[str]
    ) -> list[str]:
        classes = {name for label in labels for name in label.labels}
        splits = ordered_splits({label.split or split_of(file.tar) for file, label in zip(files, labels, strict=True)})
        by = PurePosixPath(self.options.labels).name if self.options.labels else ".json members"
        words = [
            amount(len(classes), "class", "classes")
            + f"{f' in splits {chr(47).join(splits)}' if splits else ''}, by {by}",
            f"{amount(len(files), 'image')} in {amount(tars, 'tar')}",
        ]
        without = sum(not label.labels for label in labels)
        if without:
            words.append(amount(without, "image has no label", "images have no label"))
        bad = sum(file.failure == DropReason.BAD_RECORD for file in files)
        if bad:
            example = next(file.detail for file in files if file.failure == DropReason.BAD_RECORD)
            words.append(f"{bad:,} entries have no valid place in their tar, such as {example}")
        words += [f"{text}: {count:,}" for text, count in counts.items()]
        return [f"{'; '.join(words)} (source.labels gives other labels)"]


def _listed(
    tar: str, content: bytes, tar_size: int, where: str, most: int, counts: Counter[str]
) -> tuple[list[_File], dict[str, _File]]:
    """The images of an index in the order of their offsets, and its other files by name.

    Args:
        tar: the tar's name.
        content: of the index.
        tar_size: size of the tar in bytes, or -1 if it is not known.
        where: path of the tar, for messages.
        most: size of the largest image that is read.
        counts: receives the number of files that are neither images nor sidecars.

    Raises:
        UsageError: the index is no JSON of this form, or of another tar.
    """
    try:
        index = json.loads(content)
    except (ValueError, RecursionError):
        raise UsageError(f"source.index: the index of {where} is no JSON: get it again") from None
    entries = index.get("files") if isinstance(index, dict) else None
    if not isinstance(entries, dict):
        raise UsageError(
            f'source.index: the index of {where} has no "files": it is no index of a tar; name the indexes with a '
            "pattern such as {0000..0999}.json"
        )
    stated = index.get("filesize")
    stated = stated if isinstance(stated, int) and not isinstance(stated, bool) and stated > 0 else -1
    if 0 <= tar_size != stated >= 0:
        raise UsageError(
            f"source.index: {where} has {tar_size:,} bytes, and its index is of a tar of {stated:,}: get both again"
        )
    end = tar_size if tar_size >= 0 else stated
    images, side = [], {}
    for name, facts in entries.items():
        file = _file(tar, name, facts, end, most)
        if readings.is_image(name):
            images.append(file)
        elif not file.failure:
            side[file.name] = file
            if not name.lower().endswith(".json"):
                counts["files that are no images, left out"] += 1
    return sorted(images, key=lambda file: (file.offset, file.name)), side


def _file(tar: str, name: str, facts: Any, end: int, most: int) -> _File:
    """An entry of an index, with a failure if it points outside the tar or has an unsafe name."""
    facts = facts if isinstance(facts, dict) else {}
    offset, size, sha256 = facts.get("offset"), facts.get("size"), facts.get("sha256")
    sha256 = sha256.lower() if isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256) else ""
    if not _is_number(offset) or not _is_number(size) or (end >= 0 and offset + size > end):
        detail = f"offset {str(offset)[:24]} and size {str(size)[:24]}"
        return _File(tar, name, 0, 0, "", DropReason.BAD_RECORD, clean_text(detail))
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:[/\\]", name):
        return _File(tar, name, offset, size, sha256, DropReason.UNSAFE_PATH)
    return _File(tar, name, offset, size, sha256, DropReason.TOO_MANY_BYTES if size > most else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _from_table(table: dict[str, _Label], image: _File) -> _Label:
    """The label of an image by its path, its file name or its stem."""
    path = PurePosixPath(image.name)
    keys = (f"{image.tar}/{image.name}", image.name, path.name, path.stem, path.stem.lstrip("0"))
    return next((table[key] for key in keys if key in table), _Label())


def _from_sidecars(mirror: Mirror, tar: str, images: Sequence[_File], side: dict[str, _File]) -> Iterator[_Label]:
    """The labels of images by the `.json` members that are named after them, read a few hundred at a time."""
    owners = sidecars.of_images([image.name for image in images], [name for name in side if name.endswith(".json")])
    by_image = {image: name for name, image in owners.items()}
    for start in range(0, len(images), _AT_ONCE):
        batch = images[start : start + _AT_ONCE]
        wanted = [
            side[by_image[image.name]]
            for image in batch
            if image.name in by_image and side[by_image[image.name]].size <= _LARGEST_SIDECAR
        ]
        pieces = mirror.pieces(tar, [(file.offset, file.size) for file in wanted])
        contents = {file.name: payload.content for file, payload in zip(wanted, pieces, strict=True)}
        found = {owners[name]: sidecars.read(content) for name, content in contents.items()}
        for image in batch:
            sidecar = found.get(image.name)
            if sidecar is None:
                yield _Label()
                continue
            fields = tuple((name, clean_text(value, 2000)) for name, value in sidecar.fields.items())
            yield _Label(tuple(text for label in sidecar.labels if (text := clean_text(label))), "", fields)


def _read_labels(path: Path, encoding: str, notes: list[str]) -> dict[str, _Label]:
    """The rows of a table of labels by id or file; several rows of one image are several labels.

    Args:
        path: of the table.
        encoding: as in `text_tables.text_of`.
        notes: receives a sentence if a legacy encoding was recognised.

    Raises:
        UsageError: it cannot be read, or has no column of ids or labels.
    """
    where = f"source.labels: {path}"
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_LABELS + 1)
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror})") from None
    if len(content) > _LARGEST_LABELS:
        raise UsageError(f"{where} has more than {_LARGEST_LABELS:,} bytes: give the rows of these tars only")
    rows = text_tables.rows(text_tables.decoded(content, where, encoding), where)
    notes += filter(None, [text_tables.encoding_note(content, path.name, encoding)])
    header = next(rows, [])
    file_at, label_at = text_tables.column(header, _FILE), text_tables.column(header, _LABEL)
    split_at = text_tables.column(header, _SPLIT)
    if file_at is None or label_at is None:
        raise UsageError(
            f"{where} needs a header with the columns id or file, and label; it is {','.join(header)[:80]!r}"
        )
    table: dict[str, _Label] = {}
    for row in rows:
        if len(row) <= max(file_at, label_at) or not row[file_at]:
            continue
        name = row[file_at].replace("\\", "/").removeprefix("./")
        split = SPLIT_NAMES.get(row[split_at].lower(), "") if split_at is not None and split_at < len(row) else ""
        label = clean_text(row[label_at])
        known = table.get(name, _Label()).labels
        table[name] = _Label((*known, label) if label and label not in known else known, split)
    return table


def _checked(content: bytes, size: int, sha256: str) -> Payload:
    """The bytes of an image, or why they are not those that the index states."""
    if len(content) < size:
        return Payload(reason=DropReason.FETCH_FAILED, detail="the tar is cut short")
    if not sha256:
        return Payload(content)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        return Payload(reason=DropReason.CHECKSUM_MISMATCH, detail=f"the SHA-256 is {found}")
    return Payload(content, digest=f"sha256:{sha256}")
