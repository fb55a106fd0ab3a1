"""The files of a folder, a tar or zip, or a prefix of a bucket: listed once, read in place.

Archives are read member by member; nothing is ever extracted, so a member's name cannot leave the archive. What the
names mean is decided in `animesion.dataset.layouts`.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from animesion.errors import AnimesionError, UsageError
from animesion.schemas import DropReason, Payload
from animesion.sources import clean_text
from animesion.sources.image_root import read_file
from animesion.sources.stored import StoredPlace, not_found, place
from animesion.wording import amount

#: Bytes that are fetched ahead from a bucket: headers of a tar lie all over it, members of a zip are read one by one.
_TAR_BLOCK, _ZIP_BLOCK = 8 << 20, 256 << 10

_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}

#: Encodings of names by programs that do not state it.
_CODE_PAGES = frozenset({"cp932", "cp949", "gb18030", "cp950", "cp866", "cp437", "cp850", "cp852"})

Locator = dict[str, int | str]


@dataclass(frozen=True)
class Entry:
    """A file of the tree.

    Attributes:
        name: its path with slashes, as text from which the bytes can be had back.
        locator: how its bytes are found again, JSON-ready.
        failure: drop reason when it cannot be read.
        detail: of the failure.
    """

    name: str
    locator: Locator
    failure: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Listing:
    """What a tree holds.

    Attributes:
        entries: files in the order of their names.
        hidden: hidden and system files, not among the entries.
        hidden_folders: hidden folders that hold files.
        notes: sentences about what was passed over.
    """

    entries: list[Entry]
    hidden: list[Entry] = field(default_factory=list)
    hidden_folders: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def passed_over(self, used: Collection[str] = ()) -> list[str]:
        """A note on the hidden files but for those that were used after all, if there are any."""
        count = sum(entry.name not in used for entry in self.hidden)
        return [f"{amount(count, 'hidden or system file')} skipped"] if count else []


class FileTree:
    """Files below a place.

    Args:
        path: folder, .tar or .zip of this machine or a bucket, or prefix of a bucket.
        max_bytes: larger files are listed with a failure and never read.
        encoding: of the names in a zip without the UTF-8 flag; empty to detect it.

    Raises:
        UsageError: there is nothing at the path.
    """

    def __init__(self, path: str, max_bytes: int, encoding: str = "") -> None:
        self.root = place(path, "source.path")
        self._max_bytes = max_bytes
        self._encoding = encoding
        if not self.root.exists():
            raise not_found(self.root, "source.path")

    @property
    def is_archive(self) -> bool:
        """Whether the place is one file."""
        return self.root.is_file()

    def listing(self) -> Listing:
        """Every file, sorted by the bytes of its name.

        Raises:
            UsageError: a folder that cannot be listed, a damaged or compressed archive.
        """
        listing = self._listed()
        listing.entries.sort(key=lambda entry: os.fsencode(entry.name))
        listing.hidden.sort(key=lambda entry: os.fsencode(entry.name))
        if listing.hidden_folders:
            named = ", ".join(repr(clean_text(name)) for name in sorted(listing.hidden_folders)[:4])
            more = f" and {len(listing.hidden_folders) - 4} more" if len(listing.hidden_folders) > 4 else ""
            listing.notes.append(f"hidden folders are skipped: {named}{more}; rename a class that starts with a dot")
        return listing

    def contents(self, listing: Listing, names: Sequence[str]) -> Iterator[bytes]:
        """The bytes of files by their names, empty if they cannot be read; an archive is opened once."""
        by_name = {entry.name: entry.locator for entry in [*listing.hidden, *listing.entries]}
        for payload in self.read([by_name[name] for name in names]):
            yield payload.content

    def read(self, locators: Sequence[Mapping[str, int | str]]) -> Iterator[Payload]:
        """The bytes of listed files, in the order given; an archive is opened once."""
        root = self.root
        if isinstance(root, StoredPlace) and root.is_dir():
            yield from root.contents([(str(each["path"]), int(each["size"])) for each in locators], self._max_bytes)
        elif isinstance(root, Path) and root.is_dir():
            for each in locators:
                yield read_file(root / str(each["path"]), self._max_bytes)
        elif _is_zip(root):
            with _opened(root) as file, zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                for each in locators:
                    yield self._read_zipped(archive, members[int(each["index"])])
        else:
            places = [(int(each["offset"]), int(each["size"])) for each in locators]
            for content, (_, size) in zip(_pieces(root, places), places, strict=True):
                if len(content) < size:
                    yield Payload(reason=DropReason.FETCH_FAILED, detail="the archive is cut short")
                else:
                    yield Payload(content)

    def _listed(self) -> Listing:
        root = self.root
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
        except (tarfile.ReadError, RecursionError):
            raise UsageError(f"source.path: {root} is neither a folder nor a readable .tar or .zip") from None

    # -- folders and buckets -----------------------------------------------------------------------------------------

    def _stored(self, root: StoredPlace) -> Listing:
        """A bucket has no folders, only names with slashes; any name may stand in it."""
        listing = Listing([])
        for name, size, stamp in root.files():
            entry = _member_entry(name, {"path": name, "size": size, "stamp": stamp}, self._max_bytes, regular=True)
            _add(listing, entry)
        return listing

    def _walk(self, root: Path) -> Listing:
        listing = Listing([])
        visited: set[tuple[int, int]] = set()  # a link back up would be a loop

        def refuse(error: OSError) -> None:
            raise UsageError(
                f"source.path: the folder {error.filename} cannot be listed ({error.strerror}): its images would be "
                "missing; make it readable or move it away"
            )

        for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
            relative = Path(folder).relative_to(root)
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                listing.notes.append(
                    f"folder '{clean_text(str(relative))}' was already read under another name: skipped"
                )
                continue
            visited.add((status.st_dev, status.st_ino))
            if relative.parts and ".receipts" in folders:
                folders.clear()
                listing.notes.append(f"folder '{clean_text(str(relative))}' is the output of a build: skipped")
                continue
            folders.sort()
            listing.hidden_folders.extend(str(relative / name) for name in folders if is_hidden(name))
            folders[:] = [name for name in folders if not is_hidden(name)]
            if len(relative.parts) == 1 and not folders and all(is_hidden(name) for name in files):
                listing.notes.append(f"class folder '{clean_text(relative.parts[0])}' is empty")
            prefix = f"{relative.as_posix()}/" if relative.parts else ""
            for name in files:
                entry = _file_entry(os.path.join(folder, name), prefix + name, self._max_bytes)
                (listing.hidden if is_hidden(name) else listing.entries).append(entry)
        return listing

    # -- archives ----------------------------------------------------------------------------------------------------

    def _tar_members(self, root: Path | StoredPlace) -> Listing:
        listing = Listing([])
        stamp = root.stat().st_mtime_ns if isinstance(root, Path) else root.stamp()
        places: dict[str, tuple[int, int]] = {}  # of files that a hard link may name
        # errorlevel and `r:` keep tarfile to plain, uncompressed archives
        with (
            _opened(root, _TAR_BLOCK) as file,
            tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive,
        ):
            member = archive.next()
            while member is not None:
                archive.members = []  # type: ignore[attr-defined]  # a million headers are not kept
                if not member.isdir():
                    offset, size = member.offset_data, member.size
                    regular = member.isreg() and not member.issparse()
                    if regular:
                        places[member.name] = (offset, size)
                    elif member.islnk() and member.linkname in places:  # another name of a file that came before
                        offset, size = places[member.linkname]
                        regular = True
                    locator: Locator = {"offset": offset, "size": size, "stamp": stamp}
                    _add(listing, _member_entry(member.name, locator, self._max_bytes, regular=regular))
                try:
                    member = archive.next()
                # tarfile reads headers of headers by recursion, and seeks to whatever size they state
                except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError) as error:
                    last = listing.entries[-1].name if listing.entries else ""
                    raise UsageError(f"source.path: {root} is damaged after {last!r} ({error}); get it again") from None
            self._check_end(root, file, archive.offset, listing.notes)
        return listing

    def _check_end(self, root: Path | StoredPlace, file: IO[bytes], position: int, notes: list[str]) -> None:
        """A reader stops at a damaged header as it does at the end: distinguish the two, or images vanish."""
        for offset in (position - tarfile.BLOCKSIZE, position):
            file.seek(max(0, offset))
            block = file.read(tarfile.BLOCKSIZE)
            if block == bytes(tarfile.BLOCKSIZE):
                return
        if block:
            raise UsageError(f"source.path: {root} has a damaged header at byte {position}; get it again")
        notes.append(f"{root.name} has no end marker: it may be truncated")

    def _zip_members(self, root: Path | StoredPlace) -> Listing:
        listing = Listing([])
        with contextlib.ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(_opened(root))))
            except zipfile.BadZipFile as error:
                raise UsageError(f"source.path: {root} is a damaged zip ({error}); get it again") from None
            members = archive.infolist()
        encoding = self._zip_encoding(root, members, listing.notes)
        for index, info in enumerate(members):
            if info.is_dir():
                continue
            mode = info.external_attr >> 16
            regular = not mode or stat.S_IFMT(mode) in {0, stat.S_IFREG}
            name = info.filename
            if encoding and not _is_utf8(info):
                name = _zip_bytes(info).decode(encoding, "surrogateescape")
            # a zip made on Windows may have backslashes; the format has slashes only
            name = name.replace("\\", "/") if info.create_system == 0 else name
            locator: Locator = {"index": index, "size": info.file_size, "crc": info.CRC}
            _add(listing, _member_entry(name, locator, self._max_bytes, regular=regular))
        return listing

    def _zip_encoding(self, root: Path | StoredPlace, members: Sequence[zipfile.ZipInfo], notes: list[str]) -> str:
        """The encoding of names without the UTF-8 flag; empty if all of them are ASCII.

        Raises:
            UsageError: `encoding` is unknown or does not fit the names.
        """
        names = [_zip_bytes(info) for info in members if not _is_utf8(info)]
        names = [name for name in names if not name.isascii()]
        if not names:
            return ""
        encoding = self._encoding or _likely_encoding(root, names)
        try:
            decoded = [name.decode(encoding) for name in names]
        except UnicodeDecodeError:
            raise UsageError(
                f"source.encoding: the names in {root} are not {encoding}: leave it out, or give another, such as cp932"
            ) from None
        except LookupError:
            raise UsageError(f"source.encoding: there is no encoding {encoding!r}") from None
        if not self._encoding:
            shown = clean_text(decoded[0].partition("/")[0], 40)
            notes.append(
                f"{root.name} does not state the encoding of its names: read as {encoding}, such as {shown!r}; "
                "source.encoding sets another"
            )
        return encoding

    def _read_zipped(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Payload:
        try:
            with archive.open(info) as file:
                content = file.read(self._max_bytes + 1)  # the declared size may be wrong
        except AnimesionError:  # the store's, not the member's
            raise
        except Exception as error:  # damage, encryption, and what zlib, lzma and bz2 each raise
            return Payload(reason=DropReason.FETCH_FAILED, detail=clean_text(str(error), 120))
        return Payload(content) if len(content) <= self._max_bytes else Payload(reason=DropReason.TOO_MANY_BYTES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _add(listing: Listing, entry: Entry) -> None:
    """Among the entries, or the hidden ones; a hidden folder is named once."""
    parts = entry.name.split("/")
    hidden = [i for i, part in enumerate(parts) if part not in {".", ".."} and is_hidden(part)]
    if not hidden:
        listing.entries.append(entry)
    elif hidden[0] == len(parts) - 1:
        listing.hidden.append(entry)
    else:
        folder = "/".join(parts[: hidden[0] + 1])
        if folder not in listing.hidden_folders:
            listing.hidden_folders.append(folder)


def _likely_encoding(root: Path | StoredPlace, names: Sequence[bytes]) -> str:
    """The encoding of names that are not ASCII: UTF-8, or a code page of Windows, where such zips are made.

    Raises:
        UsageError: two are about equally likely.
    """
    from animesion_scrapers.url_tables import legacy

    parts = dict.fromkeys(part for name in names for part in name.split(b"/"))  # a class is named in many paths
    whole = b"\n".join(parts)
    with contextlib.suppress(UnicodeDecodeError):
        whole.decode("utf-8")
        return "utf-8"
    found = legacy.guess(whole, _CODE_PAGES)
    if found.rival:
        shown = max(parts, key=len)
        read = (f"{shown.decode(each, 'replace')!r} as {each}" for each in (found.encoding, found.rival))
        raise UsageError(
            f"source.encoding: {root} does not state the encoding of its names, of which one may be "
            f"{clean_text(' or '.join(read), 200)}: set it to the right one"
        )
    return found.encoding or "cp437"


def _is_utf8(info: zipfile.ZipInfo) -> bool:
    return bool(info.flag_bits & 0x800)


def _zip_bytes(info: zipfile.ZipInfo) -> bytes:
    """The bytes of a name that zipfile has decoded."""
    name = info.orig_filename.partition("\0")[0]
    return name.encode("utf-8" if _is_utf8(info) else "cp437")


def _opened(root: Path | StoredPlace, block: int = _ZIP_BLOCK) -> IO[bytes]:
    return root.open("rb") if isinstance(root, Path) else root.open(block)


def _is_zip(root: Path | StoredPlace) -> bool:
    with _opened(root) as file:
        return zipfile.is_zipfile(file)


def _pieces(root: Path | StoredPlace, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    if isinstance(root, StoredPlace):
        yield from root.pieces(places)
        return
    with root.open("rb") as file:
        for offset, size in places:
            file.seek(offset)
            yield file.read(size)


def _file_entry(path: str, name: str, max_bytes: int) -> Entry:
    try:
        status = os.stat(path)  # pathlib takes three times as long, for each of a million files
    except OSError as error:
        return Entry(name, {"path": name}, DropReason.MISSING_FILE, os.strerror(error.errno or 0))
    locator: Locator = {"path": name, "size": status.st_size, "stamp": status.st_mtime_ns}
    if not stat.S_ISREG(status.st_mode):
        return Entry(name, locator, DropReason.NOT_A_REGULAR_FILE)
    return Entry(name, locator, DropReason.TOO_MANY_BYTES if status.st_size > max_bytes else "")


def _member_entry(name: str, locator: Locator, max_bytes: int, *, regular: bool) -> Entry:
    parts = PurePosixPath(name).parts
    failure = ""
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name):
        failure = DropReason.UNSAFE_PATH
    elif not regular:
        failure = DropReason.NOT_A_REGULAR_FILE
    elif int(locator["size"]) > max_bytes:
        failure = DropReason.TOO_MANY_BYTES
    return Entry(str(PurePosixPath(name)), locator, failure)
