"""Class folders: `ROOT/<class>/**/<picture>`, or a tar or zip of them.

Archives are read in place, member by member; nothing is ever extracted, so a member's name cannot leave the archive.
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
from typing import ClassVar

from pydantic import Field, field_validator

from animesion.errors import UsageError
from animesion.records import Item, Payload
from animesion.settings import Section
from animesion.sources import clean_text, file_key

_HIDDEN = {"thumbs.db", "desktop.ini", "__macosx"}
_DIGEST_STEM = r"(?:.*[-_])?((?:[0-9a-f]{64}|[0-9a-f]{40}|[0-9a-f]{32})(?![0-9a-f]))(?:[-_.].*)?"


class FolderOptions(Section):
    """Options of the `folder` source."""

    path: str = Field(description="folder of class folders, or a .tar or .zip of them")
    family: str = Field(
        _DIGEST_STEM,
        description="regular expression for a file's stem; pictures with equal first groups come from one post and "
        "stay in one split. The default knows names built on a digest, such as <md5>-<k>.jpg; empty for none",
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
    """A file in the folder or archive: posix path as bytes-safe text, where it lies, or why it cannot be read."""

    name: str
    locator: dict[str, int | str]
    failure: str = ""
    detail: str = ""


class FolderSource:
    """Pictures in class folders."""

    Options = FolderOptions
    summary: ClassVar[str] = "class folders, or a tar or zip of them"
    remote: ClassVar[bool] = False

    def __init__(self, options: FolderOptions) -> None:
        self.options = options
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """Nothing needs to be held open."""
        return contextlib.nullcontext()

    def items(self) -> Iterator[Item]:
        """One item a file, sorted by name; files outside a class folder have no label."""
        root = Path(self.options.path).expanduser()
        if not root.exists():
            raise UsageError(f"source.path: there is no folder or archive {root}")
        entries = self._entries(root)
        prefix = _common_root(entries) if root.is_file() else ""
        family = re.compile(self.options.family) if self.options.family else None
        seen: dict[str, int] = {}
        spelt: dict[str, str] = {}
        entries.sort(key=lambda entry: os.fsencode(entry.name))
        if not entries:
            raise UsageError(f"source.path: {root} holds no files")
        for order, entry in enumerate(entries):
            repeat = seen[entry.name] = seen.get(entry.name, -1) + 1  # an archive may hold one name twice
            path = PurePosixPath(entry.name.removeprefix(prefix))
            raw = os.fsencode(entry.name) + (b"\0%d" % repeat if repeat else b"")
            match = family.fullmatch(path.stem) if family else None
            label = clean_text(path.parts[0]) if len(path.parts) > 1 else ""
            if label and spelt.setdefault(label, path.parts[0]) != path.parts[0]:
                self._note_once(
                    f"several folders are spelt alike but for blanks or accents and are one class: '{label}'"
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
        """Read files, or the members of an archive that is opened once."""
        root = Path(self.options.path).expanduser()
        if root.is_dir():
            for item in items:
                yield self._read_file(root / json.loads(item.locator)["path"])
        elif zipfile.is_zipfile(root):
            with zipfile.ZipFile(root) as archive:
                for item in items:
                    yield self._read_zipped(archive, json.loads(item.locator)["index"])
        else:
            with root.open("rb") as file:
                for item in items:
                    where = json.loads(item.locator)
                    file.seek(where["offset"])
                    content = file.read(where["size"])
                    short = len(content) < where["size"]
                    yield (
                        Payload(reason="fetch failed", detail="the archive is cut short") if short else Payload(content)
                    )

    def _entries(self, root: Path) -> list[_Entry]:
        if root.is_dir():
            return self._walk(root)
        if zipfile.is_zipfile(root):
            return self._zip_members(root)
        if root.name.endswith((".gz", ".tgz", ".xz", ".bz2", ".zst")):
            raise UsageError(
                f"source.path: {root} is compressed as a whole; unpack it to a plain .tar or a folder first"
            )
        try:
            return self._tar_members(root)
        except tarfile.ReadError:
            raise UsageError(f"source.path: {root} is neither a folder nor a .tar or .zip that can be read") from None

    def _walk(self, root: Path) -> list[_Entry]:
        entries: list[_Entry] = []
        hidden = 0
        visited: set[tuple[int, int]] = set()  # a link back up would be a loop
        for folder, folders, files in os.walk(root, followlinks=True):
            relative = Path(folder).relative_to(root)
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                self.notes.append(
                    f"folder '{clean_text(str(relative))}' was already read under another name: passed over"
                )
                continue
            visited.add((status.st_dev, status.st_ino))
            if relative.parts and ".receipts" in folders:
                folders.clear()
                self.notes.append(f"folder '{clean_text(str(relative))}' is the output of a build: passed over")
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

    def _tar_members(self, root: Path) -> list[_Entry]:
        entries: list[_Entry] = []
        hidden = 0
        stamp = root.stat().st_mtime_ns
        # errorlevel and `r:` keep tarfile to plain, uncompressed archives
        with tarfile.open(root, "r:", errors="surrogateescape") as archive:
            member = archive.next()
            while member is not None:
                archive.members = []  # type: ignore[attr-defined]  # a million headers are not kept
                name = member.name.replace("\\", "/")
                if not member.isdir():
                    if any(_is_hidden(part) for part in PurePosixPath(name).parts if part not in {".", ".."}):
                        hidden += 1
                    else:
                        locator = {"offset": member.offset_data, "size": member.size, "stamp": stamp}
                        regular = member.isreg() and not member.issparse()
                        entries.append(_archive_entry(name, locator, self.options.max_bytes, regular=regular))
                try:
                    member = archive.next()
                except (tarfile.TarError, ValueError, OverflowError) as error:
                    raise UsageError(f"source.path: {root} is damaged after {name!r} ({error}); get it again") from None
            self._check_end(root, archive.offset)
        self._note_hidden(hidden)
        return entries

    def _check_end(self, root: Path, position: int) -> None:
        """A reader stops at a damaged header as it does at the end: tell the two apart, or pictures vanish."""
        with root.open("rb") as file:
            for offset in (position - tarfile.BLOCKSIZE, position):
                file.seek(max(0, offset))
                block = file.read(tarfile.BLOCKSIZE)
                if block == bytes(tarfile.BLOCKSIZE):
                    return
        if block:
            raise UsageError(f"source.path: {root} has a damaged header at byte {position}; get it again")
        self.notes.append(f"{root.name} has no end marker: it may have been cut short")

    def _zip_members(self, root: Path) -> list[_Entry]:
        entries: list[_Entry] = []
        hidden = 0
        try:
            archive = zipfile.ZipFile(root)
        except zipfile.BadZipFile as error:
            raise UsageError(f"source.path: {root} is a damaged zip ({error}); get it again") from None
        with archive:
            for index, info in enumerate(archive.infolist()):
                name = info.filename.replace("\\", "/")
                if info.is_dir():
                    continue
                if any(_is_hidden(part) for part in PurePosixPath(name).parts if part not in {".", ".."}):
                    hidden += 1
                    continue
                mode = info.external_attr >> 16
                regular = not mode or stat.S_IFMT(mode) in {0, stat.S_IFREG}
                locator = {"index": index, "size": info.file_size, "crc": info.CRC}
                entries.append(_archive_entry(name, locator, self.options.max_bytes, regular=regular))
        self._note_hidden(hidden)
        return entries

    def _note_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _note_hidden(self, hidden: int) -> None:
        if hidden:
            self.notes.append(f"{hidden} hidden or system file(s) and folder(s) passed over")

    def _read_file(self, path: Path) -> Payload:
        try:
            with path.open("rb") as file:
                content = file.read(self.options.max_bytes + 1)
        except FileNotFoundError:
            return Payload(reason="missing file")
        except OSError as error:
            return Payload(reason="fetch failed", detail=os.strerror(error.errno or 0))
        return Payload(content) if len(content) <= self.options.max_bytes else Payload(reason="too many bytes")

    def _read_zipped(self, archive: zipfile.ZipFile, index: int) -> Payload:
        info = archive.infolist()[index]
        try:
            with archive.open(info) as file:
                content = file.read(self.options.max_bytes + 1)  # the declared size may lie
        except Exception as error:  # damage, encryption, and what zlib, lzma and bz2 each raise
            return Payload(reason="fetch failed", detail=clean_text(str(error), 120))
        return Payload(content) if len(content) <= self.options.max_bytes else Payload(reason="too many bytes")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN


def _file_entry(path: Path, relative: Path, max_bytes: int) -> _Entry:
    name = relative.as_posix()
    try:
        status = path.stat()
    except OSError as error:
        return _Entry(name, {"path": name}, "missing file", os.strerror(error.errno or 0))
    locator: dict[str, int | str] = {"path": name, "size": status.st_size, "stamp": status.st_mtime_ns}
    if not stat.S_ISREG(status.st_mode):
        return _Entry(name, locator, "not a regular file")
    return _Entry(name, locator, "too many bytes" if status.st_size > max_bytes else "")


def _archive_entry(name: str, locator: dict[str, int], max_bytes: int, *, regular: bool) -> _Entry:
    parts = PurePosixPath(name).parts
    failure = ""
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:/", name):
        failure = "unsafe path"
    elif not regular:
        failure = "not a regular file"
    elif locator["size"] > max_bytes:
        failure = "too many bytes"
    return _Entry(str(PurePosixPath(name)), dict(locator), failure)


def _common_root(entries: Sequence[_Entry]) -> str:
    """`name/` when everything in an archive lies under one folder that holds only folders, else an empty string."""
    paths = [PurePosixPath(entry.name).parts for entry in entries if not entry.failure]
    tops = {parts[0] for parts in paths}
    return f"{tops.pop()}/" if len(tops) == 1 and all(len(parts) > 2 for parts in paths) else ""
