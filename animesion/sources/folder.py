"""The source for class folders: `ROOT/<class>/**/<image>`, or a tar or zip of them, local or in a bucket.

Archives are read in place, member by member, and never extracted, so a member's name cannot escape to the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, ClassVar

from pydantic import Field, field_validator

from animesion.config.settings import Section
from animesion.errors import AnimesionError, UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, file_key
from animesion.sources.image_root import read_file
from animesion.sources.stored import PathOrUrl, StoredPlace, place

#: Read-ahead in bytes from a bucket: headers are spread all over a tar, while members of a zip are read one by one.
_TAR_BLOCK, _ZIP_BLOCK = 8 << 20, 256 << 10

_HIDDEN = {"thumbs.db", "desktop.ini", "__macosx"}
_DIGEST_STEM = r"(?:.*[-_])?((?:[0-9a-f]{64}|[0-9a-f]{40}|[0-9a-f]{32})(?![0-9a-f]))(?:[-_.].*)?"


class FolderOptions(Section):
    """Options of the `folder` source."""

    path: PathOrUrl = Field(description="folder of class folders, or a .tar or .zip of them; may be s3:// or gs://")
    family: str = Field(
        _DIGEST_STEM,
        description="regular expression for a file's stem; images with equal first groups are of one post and stay in "
        "one split. The default matches names with a digest, such as <md5>-<k>.jpg; empty for none",
    )
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")

    @field_validator("family")
    @classmethod
    def _one_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if value and groups < 1:
            raise ValueError("the regular expression needs a group, such as '(.+)-[0-9]+'")
        return value


@dataclass(frozen=True)
class _Entry:
    """A file in the folder or archive.

    Attributes:
        name: POSIX path; bytes that are not UTF-8 are surrogates.
        locator: path, or position in the archive, with size and time stamp.
        failure: drop reason of a file that cannot be read; empty otherwise.
        detail: description of the failure.
    """

    name: str
    locator: dict[str, int | str]
    failure: str = ""
    detail: str = ""


class FolderSource:
    """Images in class folders."""

    Options = FolderOptions
    summary: ClassVar[str] = "class folders, or a tar or zip of them"
    remote: ClassVar[bool] = False

    def __init__(self, options: FolderOptions) -> None:
        self.options = options
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """An empty context."""
        return contextlib.nullcontext()

    def items(self) -> Iterator[Item]:
        """One item per file, sorted by name; files outside a class folder have no label."""
        root = place(self.options.path, "source.path")
        if not root.exists():
            raise UsageError(f"source.path: {root} not found")
        entries = self._entries(root)
        prefix = _common_root(entries) if root.is_file() else ""
        family = re.compile(self.options.family) if self.options.family else None
        seen: dict[str, int] = {}
        folder_of: dict[str, str] = {}
        entries.sort(key=lambda entry: os.fsencode(entry.name))
        if not entries:
            raise UsageError(f"source.path: {root} contains no files")
        for order, entry in enumerate(entries):
            repeat = seen[entry.name] = seen.get(entry.name, -1) + 1  # an archive may repeat a name
            path = PurePosixPath(entry.name.removeprefix(prefix))
            raw = os.fsencode(entry.name) + (b"\0%d" % repeat if repeat else b"")
            match = family.fullmatch(path.stem) if family else None
            label = clean_text(path.parts[0]) if len(path.parts) > 1 else ""
            if label and folder_of.setdefault(label, path.parts[0]) != path.parts[0]:
                self._note_once(
                    f"folders whose names differ only in spaces or the encoding of accents are one class: '{label}'"
                )
            yield Item(
                key=file_key("folder", raw, path.stem),
                source="folder",
                source_id=clean_text(str(path), 1000),
                locator=json.dumps(entry.locator),
                order=order,
                labels=(label,) if label else (),
                families=(f"file:{match[1]}",) if match and match[1] else (),
                failure=entry.failure,
                detail=entry.detail,
            )

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """Read files, or members of an archive, which is opened once."""
        root = place(self.options.path, "source.path")
        where = [json.loads(item.locator) for item in items]
        if isinstance(root, StoredPlace) and root.is_dir():
            yield from root.contents([(each["path"], each["size"]) for each in where], self.options.max_bytes)
        elif isinstance(root, Path) and root.is_dir():
            for each in where:
                yield read_file(root / each["path"], self.options.max_bytes)
        elif _is_zip(root):
            with _open(root) as file, zipfile.ZipFile(file) as archive:
                for each in where:
                    yield self._read_zipped(archive, each["index"])
        else:
            places = [(each["offset"], each["size"]) for each in where]
            for content, (_, size) in zip(_pieces(root, places), places, strict=True):
                short = len(content) < size
                yield (
                    Payload(reason=DropReason.FETCH_FAILED, detail="the archive is truncated")
                    if short
                    else Payload(content)
                )

    def _entries(self, root: Path | StoredPlace) -> list[_Entry]:
        if isinstance(root, StoredPlace) and root.is_dir():
            return self._stored(root)
        if isinstance(root, Path) and root.is_dir():
            return self._walk(root)
        if _is_zip(root):
            return self._zip_members(root)
        if root.name.endswith((".gz", ".tgz", ".xz", ".bz2", ".zst")):
            raise UsageError(
                f"source.path: {root} is compressed as a whole; unpack it to a plain .tar or a folder first"
            )
        try:
            return self._tar_members(root)
        except tarfile.ReadError:
            raise UsageError(f"source.path: {root} is neither a folder nor a readable .tar or .zip") from None

    def _stored(self, root: StoredPlace) -> list[_Entry]:
        """Entries of a bucket, which has no folders, only names with slashes, and allows any name."""
        entries: list[_Entry] = []
        hidden: set[str] = set()
        for name, size, stamp in root.files():
            parts = name.split("/")
            first = next((i for i, part in enumerate(parts) if part not in {".", ".."} and _is_hidden(part)), None)
            if first is not None:
                hidden.add("/".join(parts[: first + 1]))
                continue
            locator: dict[str, int | str] = {"path": name, "size": size, "stamp": stamp}
            entries.append(_archive_entry(name, locator, self.options.max_bytes, regular=True))
        self._note_hidden(len(hidden))
        return entries

    def _walk(self, root: Path) -> list[_Entry]:
        entries: list[_Entry] = []
        hidden = 0
        visited: set[tuple[int, int]] = set()  # links to a parent folder are loops
        for folder, folders, files in os.walk(root, followlinks=True):
            relative = Path(folder).relative_to(root)
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                self.notes.append(f"folder '{clean_text(str(relative))}' was already read under another name: skipped")
                continue
            visited.add((status.st_dev, status.st_ino))
            if relative.parts and ".receipts" in folders:
                folders.clear()
                self.notes.append(f"folder '{clean_text(str(relative))}' is the output of a build: skipped")
                continue
            folders.sort()
            hidden += sum(_is_hidden(name) for name in [*folders, *files])
            folders[:] = [name for name in folders if not _is_hidden(name)]
            visible = [name for name in files if not _is_hidden(name)]
            if len(relative.parts) == 1 and not visible and not folders:
                self.notes.append(f"class folder '{clean_text(relative.parts[0])}' is empty")
            for name in visible:
                path = relative / name
                entries.append(_file_entry(root / path, path, self.options.max_bytes))
        self._note_hidden(hidden)
        return entries

    def _tar_members(self, root: Path | StoredPlace) -> list[_Entry]:
        entries: list[_Entry] = []
        hidden = 0
        stamp = root.stat().st_mtime_ns if isinstance(root, Path) else root.stamp()
        # errorlevel and `r:` keep tarfile to plain, uncompressed archives
        with (
            _open(root, _TAR_BLOCK) as file,
            tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive,
        ):
            member = archive.next()
            while member is not None:
                archive.members = []  # type: ignore[attr-defined]  # a million headers would fill the memory
                name = member.name.replace("\\", "/")
                if not member.isdir():
                    if any(_is_hidden(part) for part in PurePosixPath(name).parts if part not in {".", ".."}):
                        hidden += 1
                    else:
                        locator: dict[str, int | str] = {"offset": member.offset_data, "size": member.size}
                        locator["stamp"] = stamp
                        regular = member.isreg() and not member.issparse()
                        entries.append(_archive_entry(name, locator, self.options.max_bytes, regular=regular))
                try:
                    member = archive.next()
                except (tarfile.TarError, ValueError, OverflowError) as error:
                    raise UsageError(f"source.path: {root} is damaged after {name!r} ({error}); get it again") from None
            self._check_end(root, file, archive.offset)
        self._note_hidden(hidden)
        return entries

    def _check_end(self, root: Path | StoredPlace, file: IO[bytes], position: int) -> None:
        """Check that the tar was read to its end: `tarfile` also stops at a damaged header, and would lose images."""
        for offset in (position - tarfile.BLOCKSIZE, position):
            file.seek(max(0, offset))
            block = file.read(tarfile.BLOCKSIZE)
            if block == bytes(tarfile.BLOCKSIZE):
                return
        if block:
            raise UsageError(f"source.path: {root} has a damaged header at byte {position}; get it again")
        self.notes.append(f"{root.name} has no end marker: it may be truncated")

    def _zip_members(self, root: Path | StoredPlace) -> list[_Entry]:
        entries: list[_Entry] = []
        hidden = 0
        with contextlib.ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(_open(root))))
            except zipfile.BadZipFile as error:
                raise UsageError(f"source.path: {root} is a damaged zip ({error}); get it again") from None
            for index, info in enumerate(archive.infolist()):
                name = info.filename.replace("\\", "/")
                if info.is_dir():
                    continue
                if any(_is_hidden(part) for part in PurePosixPath(name).parts if part not in {".", ".."}):
                    hidden += 1
                    continue
                mode = info.external_attr >> 16
                regular = not mode or stat.S_IFMT(mode) in {0, stat.S_IFREG}
                locator: dict[str, int | str] = {"index": index, "size": info.file_size, "crc": info.CRC}
                entries.append(_archive_entry(name, locator, self.options.max_bytes, regular=regular))
        self._note_hidden(hidden)
        return entries

    def _note_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _note_hidden(self, hidden: int) -> None:
        if hidden:
            self.notes.append(f"{hidden} hidden or system file(s) and folder(s) skipped")

    def _read_zipped(self, archive: zipfile.ZipFile, index: int) -> Payload:
        info = archive.infolist()[index]
        try:
            with archive.open(info) as file:
                content = file.read(self.options.max_bytes + 1)  # the declared size may be wrong
        except AnimesionError:  # of the store, not of this member
            raise
        except Exception as error:  # zlib, lzma and bz2 raise different errors for damage, and zipfile for encryption
            return Payload(reason=DropReason.FETCH_FAILED, detail=clean_text(str(error), 120))
        return Payload(content) if len(content) <= self.options.max_bytes else Payload(reason=DropReason.TOO_MANY_BYTES)


def _open(root: Path | StoredPlace, block: int = _ZIP_BLOCK) -> IO[bytes]:
    return root.open("rb") if isinstance(root, Path) else root.open(block)


def _is_zip(root: Path | StoredPlace) -> bool:
    with _open(root) as file:
        return zipfile.is_zipfile(file)


def _pieces(root: Path | StoredPlace, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    if isinstance(root, StoredPlace):
        yield from root.pieces(places)
        return
    with root.open("rb") as file:
        for offset, size in places:
            file.seek(offset)
            yield file.read(size)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN


def _file_entry(path: Path, relative: Path, max_bytes: int) -> _Entry:
    name = relative.as_posix()
    try:
        status = path.stat()
    except OSError as error:
        return _Entry(name, {"path": name}, DropReason.MISSING_FILE, os.strerror(error.errno or 0))
    locator: dict[str, int | str] = {"path": name, "size": status.st_size, "stamp": status.st_mtime_ns}
    if not stat.S_ISREG(status.st_mode):
        return _Entry(name, locator, DropReason.NOT_A_REGULAR_FILE)
    return _Entry(name, locator, DropReason.TOO_MANY_BYTES if status.st_size > max_bytes else "")


def _archive_entry(name: str, locator: dict[str, int | str], max_bytes: int, *, regular: bool) -> _Entry:
    parts = PurePosixPath(name).parts
    failure = ""
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:/", name):
        failure = DropReason.UNSAFE_PATH
    elif not regular:
        failure = DropReason.NOT_A_REGULAR_FILE
    elif int(locator["size"]) > max_bytes:
        failure = DropReason.TOO_MANY_BYTES
    return _Entry(str(PurePosixPath(name)), locator, failure)


def _common_root(entries: Sequence[_Entry]) -> str:
    """`name/` if all files of an archive are below one folder of folders, else an empty string."""
    paths = [PurePosixPath(entry.name).parts for entry in entries if not entry.failure]
    tops = {parts[0] for parts in paths}
    return f"{tops.pop()}/" if len(tops) == 1 and all(len(parts) > 2 for parts in paths) else ""
