"""Tables of URLs (CSV, TSV, JSON lines, Parquet) read in batches.

A table may be larger than memory and written by strangers: a row that cannot be read is a row with a fault, a file that
cannot be read ends with one, and no more than a batch is held. Fetching is in `downloads` and `crawls`, counting in
`tallies`.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast
from urllib.parse import urlsplit

from animesion_scrapers import fields
from animesion_scrapers.errors import ScraperError, UnsafeAddressError
from animesion_scrapers.http.addresses import Routes

FORMATS = ("csv", "tsv", "jsonl", "parquet")
"""What can be read; all but Parquet also as `.gz`."""

LONGEST_URL = 8000
"""Characters; servers refuse what is longer."""

RECOGNISED: Mapping[str, tuple[str, ...]] = {
    "url": (
        "url", "imageurl", "fileurl", "imgurl", "photourl", "pictureurl", "mediaurl", "contenturl", "originalurl",
        "downloadurl", "imagelink", "link", "src", "uri",
    ),
    "label": ("label", "labels", "class", "classname", "category", "character", "species", "cultivar", "tag"),
    "md5": ("md5", "md5hash", "imagemd5"),
    "sha1": ("sha1", "sha1hash", "imagesha1"),
    "bytes": ("bytes", "filesize", "filebytes", "contentlength"),
    "licence": ("licence", "license", "rights", "licenceurl", "licenseurl"),
    "author": ("author", "creator", "artist", "photographer", "attribution", "rightsholder"),
    "group": ("group", "groupid", "postid", "observationid"),
    "split": ("split", "subset", "partition"),
}  # fmt: skip
"""Names by which a column is recognised, the first that is there: in lower case, letters and digits only."""

_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_BATCH = 4096
_LONGEST_LINE = 1 << 18
_LONGEST_RECORD = 64
"""Lines that one row with quotes may span; a quote that is never closed costs its own line and no other."""

_LONGEST_TEXT = LONGEST_URL + 1
_LONGEST_LIST = 1000
_BATCH_BYTES = 1 << 24
_STREAMED: Mapping[str, Any] = {"buffer_size": 1 << 20, "pre_buffer": False, "memory_map": False}
_MAPPINGS = 256
_PLAIN_URL = re.compile(r"(https?)://([a-z0-9_.-]{1,253})(?::[1-9]\d{0,3})?(?:[/?][!-~]*)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DEFAULT_ROUTES = Routes()


@dataclass(frozen=True, slots=True)
class UrlColumns:
    """Which column says what; one that is left empty is looked for by the names in `RECOGNISED`, key and box never are.

    In a text table without a header columns are called `1`, `2` and so on.
    """

    url: str = ""
    label: str = ""
    key: str = ""
    md5: str = ""
    sha1: str = ""
    bytes: str = ""
    licence: str = ""
    author: str = ""
    group: str = ""
    split: str = ""
    box: str = ""


class UrlRow(NamedTuple):
    """One row of a table. Unknown text is empty.

    Attributes:
        file: Name of the table, without its folder.
        line: Where the row begins: line of a text file, row of a Parquet file, from 1; 0 when the fault is the file's.
        fault: Why the row, or what is left of its file, cannot be read; then the rest is empty.
        url: As it stands there; `refusal` tells what is wrong with it.
        labels: The label, or those of a list.
        key: What the table calls the image.
        md5: 32 hexadecimal digits, or empty.
        sha1: 40 hexadecimal digits, or empty.
        bytes: Size as announced; 0 when unknown.
        licence: As it stands there.
        author: As it stands there.
        group: Rows of one group belong together.
        split: As it stands there.
        ignored: Meanings whose value is not of their form, such as `md5`.
        box: Left, top, right and bottom as shares of the image's sides; empty when there is none.
    """

    file: str
    line: int
    fault: str = ""
    url: str = ""
    labels: tuple[str, ...] = ()
    key: str = ""
    md5: str = ""
    sha1: str = ""
    bytes: int = 0
    licence: str = ""
    author: str = ""
    group: str = ""
    split: str = ""
    ignored: tuple[str, ...] = ()
    box: tuple[float, ...] = ()


class UrlTables:
    """One or more tables, read one after the other in the order of their names."""

    def __init__(self, path: str | Path, columns: UrlColumns | None = None, table_format: str = "") -> None:
        """Find the tables; nothing is read yet.

        Args:
            path: A table, a folder of tables (not of folders), or a pattern such as `urls/part-*.parquet`.
            columns: Which column says what.
            table_format: One of `FORMATS`, when file names do not tell.

        Raises:
            ScraperError: There is no table.
        """
        if table_format and table_format not in FORMATS:
            raise ScraperError(f"There is no table format {table_format!r}; known are {', '.join(FORMATS)}.")
        self._columns = columns or UrlColumns()
        self._format = table_format
        self.files, self.passed_over = self._find(str(path))
        self.recognised: dict[tuple[tuple[str, str], ...], int] = {}
        """Meaning and name of the columns of the tables read so far, and in how many; the first 256 such."""

    def batches(self) -> Iterator[list[UrlRow]]:
        """The rows of all tables, some thousand at a time."""
        for file in self.files:
            batch: list[UrlRow] = []
            try:
                for rows in _READERS[self._format_of(file)](file, self._mapping(file.name)):
                    batch += rows
                    if len(batch) >= _BATCH:
                        yield batch
                        batch = []
            except _UnreadableError as error:
                batch.append(UrlRow(file.name, error.line, str(error)))
            if batch:
                yield batch

    def _find(self, text: str) -> tuple[list[Path], int]:
        """The tables, and how many other files lie beside them."""
        path = Path(text).expanduser()
        passed_over = 0
        if path.is_dir():
            there = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
            found = [file for file in there if self._format_of(file)]
            passed_over = len(there) - len(found)
            if not found:
                raise ScraperError(f"{path} holds no table ({', '.join(_SUFFIXES)}; text also .gz).")
        elif path.is_file():
            found = [path]
        elif path.exists():
            raise ScraperError(f"{path} is neither a file nor a folder.")
        else:
            found = [Path(name) for name in glob.glob(str(path)) if Path(name).is_file()]
            if not found:
                raise ScraperError(f"There is no file, folder or match for {path}.")
        for file in found:
            if not self._format_of(file):
                raise ScraperError(
                    f"The name {file.name} does not tell its format: end it in {', '.join(_SUFFIXES)}, "
                    f"or say which of {', '.join(FORMATS)} it is."
                )
        return sorted(found, key=lambda file: file.as_posix().encode("utf-8", "surrogateescape")), passed_over

    def _format_of(self, file: Path) -> str:
        return self._format or _SUFFIXES.get(Path(file.name.removesuffix(".gz")).suffix.lower(), "")

    def _mapping(self, file: str) -> _Mapping:
        return _Mapping(file, asdict(self._columns), self._note_mapping)

    def _note_mapping(self, found: Mapping[str, str]) -> None:
        mapping = tuple(found.items())
        if mapping in self.recognised or len(self.recognised) < _MAPPINGS:
            self.recognised[mapping] = self.recognised.get(mapping, 0) + 1


def refusal(url: str) -> str:
    """Why a URL must not be fetched; empty when nothing speaks against it before its name is resolved."""
    match = _PLAIN_URL.fullmatch(url) if len(url) <= LONGEST_URL else None
    if match:
        return _host_refusal(match[1], match[2])
    if len(url) > LONGEST_URL:
        return f"the URL is longer than {LONGEST_URL:,} characters"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        malformed = bool(_CONTROL.search(url)) or len(host) > 253 or parts.port == 0 or not _storable(url)
    except ValueError:
        malformed, host, parts = True, "", urlsplit("")
    if malformed:
        return "the URL is malformed"
    if parts.username is not None or parts.password is not None:
        return "passwords are not sent from within a URL"
    return _host_refusal(parts.scheme, host)


def normalised(url: str) -> str:
    """A URL as it is asked for: scheme and host in lower case, without the fragment that no server sees."""
    if _PLAIN_URL.fullmatch(url) and "#" not in url:
        return url
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.lower(), fragment="").geturl()
    except ValueError:
        return url


def host_of(url: str) -> str:
    """The host of a URL in lower case; empty when it has none."""
    match = _PLAIN_URL.fullmatch(url)
    if match:
        return match[2]
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


@functools.lru_cache(maxsize=4096)
def _host_refusal(scheme: str, host: str) -> str:
    try:
        _DEFAULT_ROUTES.check(scheme, host)
    except UnsafeAddressError as error:
        return str(error)
    return ""


# -- columns ---------------------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """A file cannot be read, or not from a line on."""

    def __init__(self, why: str, line: int = 0) -> None:
        super().__init__(why)
        self.line = line


@dataclass
class _Mapping:
    """Finds the columns of one file and makes rows of their values."""

    file: str
    wanted: Mapping[str, str]
    note: Callable[[Mapping[str, str]], None]
    noted: set[tuple[str, ...]] = field(default_factory=set)

    def columns(self, names: Sequence[str]) -> dict[str, str]:
        """The name of each column that is wanted and there, by its meaning.

        Raises:
            _UnreadableError: One that the caller named is not there, or none holds URLs.
        """
        plain: dict[str, str] = {}
        for name in names:
            plain.setdefault(re.sub(r"[\W_]+", "", name.lower()), name)
        found: dict[str, str] = {}
        for meaning, named in self.wanted.items():
            if named:
                if named not in names:
                    raise _UnreadableError(f"there is no column {named!r} among {_listed(names)}")
                found[meaning] = named
                continue
            recognised = next((plain[name] for name in RECOGNISED.get(meaning, ()) if name in plain), "")
            if recognised:
                found[meaning] = recognised
        if "url" not in found:
            raise _UnreadableError(f"no column of URLs is known by its name among {_listed(names)}: name it")
        for meaning, name in found.items():
            if list(names).count(name) > 1:
                raise _UnreadableError(f"the column {name!r} for {meaning} is there twice")
        if tuple(names) not in self.noted and len(self.noted) < _MAPPINGS:
            self.noted.add(tuple(names))
            self.note(found)
        return found

    def row(self, line: int, values: Mapping[str, Any]) -> UrlRow:
        """A row from the value of each meaning."""
        texts: dict[str, Any] = {}
        for meaning, value in values.items():
            if meaning == "label" and isinstance(value, (list, tuple)):
                texts[meaning] = tuple(text for each in value[:100] if (text := _text(each)))
            elif meaning == "bytes":
                texts[meaning] = _whole(value)
            else:
                text = _text(value)
                if not text.isascii() and not _storable(text):
                    return UrlRow(self.file, line, f"not UTF-8 text in the column for {meaning}")
                texts[meaning] = text
        url = texts.get("url", "")
        if not url:
            return UrlRow(self.file, line, "no URL")
        labels = texts.get("label", ())
        if isinstance(labels, str):
            labels = (labels,) if labels else ()
        elif not all(map(_storable, labels)):
            return UrlRow(self.file, line, "not UTF-8 text in the column for label")
        get = texts.get
        md5, sha1, size = get("md5", ""), get("sha1", ""), get("bytes", 0)
        if md5 or sha1 or "bytes" in texts:
            checked = {
                "md5": fields.matching(fields.MD5, md5),
                "sha1": fields.matching(fields.SHA1, sha1),
                "bytes": size,
            }
            ignored = tuple(each for each, value in checked.items() if not value and _text(values.get(each)))
            md5, sha1 = str(checked["md5"]), str(checked["sha1"])
        else:
            ignored = ()
        box: tuple[float, ...] = ()
        if shares := get("box", ""):
            box = _box(shares)
            ignored = ignored if box else (*ignored, "box")
        return UrlRow(
            self.file, line, "", url, labels, get("key", ""), md5, sha1, size,
            get("licence", ""), get("author", ""), get("group", ""), get("split", ""), ignored, box,
        )  # fmt: skip


def _text(value: object) -> str:
    """A cell as text, cut where no URL is as long; what is no plain value is empty, pandas' 3.0 is 3."""
    if isinstance(value, str):
        return value.strip()[:_LONGEST_TEXT]
    if isinstance(value, bytes):
        return value[: 4 * _LONGEST_TEXT].decode("utf-8", "surrogateescape").strip()[:_LONGEST_TEXT]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    return str(value) if isinstance(value, float) or abs(value) < 2**64 else ""


def _whole(value: object) -> int:
    if isinstance(value, float) and value.is_integer() and 0 < value < 2**53:
        value = int(value)
    return fields.whole_from_text(value.strip() if isinstance(value, str) else value)


def _box(text: str) -> tuple[float, ...]:
    """Four shares of a side with spaces or commas between them, left before right and top before bottom; else empty."""
    try:
        values = tuple(map(float, text.replace(",", " ").split()[:5]))
    except ValueError:
        return ()
    right_way = len(values) == 4 and 0 <= values[0] < values[2] <= 1 and 0 <= values[1] < values[3] <= 1
    return values if right_way else ()


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown or "none"


# -- text ------------------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a text file with their numbers; some can be put back."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._number = 0
        self._back: list[tuple[int, str]] = []

    def take(self) -> tuple[int, str] | None:
        """Number and text of the next line, `None` at the end; bytes that are no UTF-8 are lone surrogates in it.

        A line that is longer than any row comes empty of text but for a NUL.
        """
        if self._back:
            return self._back.pop()
        data = next(self._lines, None)
        if data is None:
            return None
        self._number += 1
        if len(data) >= _LONGEST_LINE:
            return self._number, "\0"
        try:
            return self._number, data.decode()
        except UnicodeDecodeError:
            return self._number, data.decode("utf-8", "surrogateescape")

    def put_back(self, lines: Sequence[tuple[int, str]]) -> None:
        self._back += reversed(lines)

    @property
    def number(self) -> int:
        return self._number


@contextlib.contextmanager
def _text_lines(path: Path) -> Iterator[_Lines]:
    """The lines of a file, plain or gzipped; what is wrong with it becomes the file's fault."""
    lines: _Lines | None = None
    try:
        with cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            lines = _Lines(_physical(file))
            yield lines
    except (OSError, EOFError, zlib.error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _UnreadableError(
            f"cannot be read to its end ({why})", lines.number + 1 if lines and lines.number else 0
        ) from None


def _physical(file: IO[bytes]) -> Iterator[bytes]:
    first = True
    while line := file.readline(_LONGEST_LINE):
        if first:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise _UnreadableError("UTF-16 text: save the file as UTF-8", 1)
            line = line.removeprefix(b"\xef\xbb\xbf")
            first = False
        yield line
        if len(line) >= _LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass


def _read_separated(delimiter: str, path: Path, mapping: _Mapping) -> Iterator[list[UrlRow]]:
    with _text_lines(path) as lines:
        rows = _records(lines, delimiter)
        head = next(rows, None)
        if head is None:
            return
        line, names, fault = head
        if fault:
            raise _UnreadableError(f"the header is {fault}", line)
        names = [name.strip() for name in names]
        if any(name.lower().startswith(("http://", "https://")) for name in names):  # it has no header
            rows = _with(head, rows)
            holds_url = next(i for i, name in enumerate(names, 1) if name.lower().startswith(("http://", "https://")))
            names = [str(i) for i in range(1, len(names) + 1)]
            wanted = {**mapping.wanted, "url": mapping.wanted["url"] or str(holds_url)}
            mapping = _Mapping(mapping.file, wanted, mapping.note)
        found = mapping.columns(names)
        places = {meaning: names.index(name) for meaning, name in found.items()}
        for number, cells, fault in rows:
            if fault:
                yield [UrlRow(mapping.file, number, fault)]
            elif len(cells) != len(names):
                yield [UrlRow(mapping.file, number, f"{len(cells)} cells where {len(names)} were due")]
            else:
                yield [mapping.row(number, {meaning: cells[place] for meaning, place in places.items()})]


def _with(
    first: tuple[int, list[str], str], rest: Iterator[tuple[int, list[str], str]]
) -> Iterator[tuple[int, list[str], str]]:
    yield first
    yield from rest


def _records(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Line, cells and fault of each row that is not blank."""
    while taken := lines.take():
        number, text = taken
        if text == "\0":
            yield number, [], f"a line of more than {_LONGEST_LINE:,} bytes"
        elif '"' not in text:
            text = text.rstrip("\r\n")
            if text.strip():
                yield number, text.split(delimiter), ""
        else:
            more: list[tuple[int, str]] = []
            try:
                yield number, next(csv.reader(_fed(text, more, lines), delimiter=delimiter, strict=True)), ""
            except (csv.Error, StopIteration):
                lines.put_back(more)
                yield number, [], "not a row: its quotes do not match"


def _fed(text: str, more: list[tuple[int, str]], lines: _Lines) -> Iterator[str]:
    """The lines of one row; those after the first are noted, so that they can be put back."""
    yield text
    while len(more) < _LONGEST_RECORD and (taken := lines.take()):
        more.append(taken)
        yield taken[1]


def _read_json_lines(path: Path, mapping: _Mapping) -> Iterator[list[UrlRow]]:
    known: dict[tuple[str, ...], dict[str, str]] = {}
    with _text_lines(path) as lines:
        while taken := lines.take():
            number, text = taken
            if text == "\0":
                yield [UrlRow(mapping.file, number, f"a line of more than {_LONGEST_LINE:,} bytes")]
                continue
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                yield [UrlRow(mapping.file, number, "not a JSON object")]
                continue
            names = tuple(record)
            found = known.get(names)
            if found is None:
                try:
                    found = _columns_of_record(mapping, names)
                except _UnreadableError as error:
                    yield [UrlRow(mapping.file, number, str(error))]
                    continue
                if len(known) < _MAPPINGS:
                    known[names] = found
            yield [mapping.row(number, {meaning: record[name] for meaning, name in found.items()})]


def _columns_of_record(mapping: _Mapping, names: tuple[str, ...]) -> dict[str, str]:
    """The columns of one JSON object, which may lack any but the URL."""
    wanted = {meaning: name if name in names or meaning == "url" else "" for meaning, name in mapping.wanted.items()}
    absent = [meaning for meaning, name in mapping.wanted.items() if name and not wanted[meaning]]
    found = _Mapping(mapping.file, wanted, mapping.note, mapping.noted).columns(names)
    return {meaning: name for meaning, name in found.items() if meaning not in absent}


# -- Parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, mapping: _Mapping) -> Iterator[list[UrlRow]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    try:
        with pq.ParquetFile(path, **_STREAMED) as file:
            found = mapping.columns(file.schema_arrow.names)
            for meaning, name in found.items():
                kind = file.schema_arrow.field(name).type
                if pa.types.is_nested(kind) and not (meaning == "label" and _is_list(kind)):
                    raise _UnreadableError(f"the column {name!r} for {meaning} holds {str(kind)[:60]}")
            columns = list(dict.fromkeys(found.values()))
            for group in range(file.num_row_groups):
                size = _safe_batch(path, file.metadata, group, columns)
                for batch in file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                    values = [_values(batch.column(name)) for name in found.values()]
                    yield [
                        mapping.row(line + i, dict(zip(found, cells, strict=True)))
                        for i, cells in enumerate(zip(*values, strict=True), 1)
                    ]
                    line += len(batch)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        first = str(error).partition("\n")[0][:160] or type(error).__name__
        raise _UnreadableError(f"cannot be read to its end ({first})", line + 1 if line else 0) from None


def _safe_batch(path: Path, metadata: Any, group: int, columns: Sequence[str]) -> int:
    """Rows of a row group that may be read at once.

    A value in a dictionary is stored once and read as often as rows refer to it: a file of some kilobytes may become
    gigabytes. So the longest value of each dictionary is looked at before.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    described = metadata.row_group(group)
    texts = []
    most = _BATCH
    for i in range(described.num_columns):
        chunk = described.column(i)
        if chunk.path_in_schema.partition(".")[0] not in columns:
            continue
        repeated = chunk.num_values / max(described.num_rows, 1)
        if repeated > _LONGEST_LIST:
            raise _UnreadableError(f"row group {group + 1} holds lists of {repeated:,.0f} values in the mean")
        most = min(most, max(1, int(_BATCH / max(repeated, 1))))
        if chunk.physical_type == "BYTE_ARRAY":
            texts.append(chunk.path_in_schema)
    if not texts or not described.num_rows:
        return most
    with pq.ParquetFile(path, read_dictionary=texts, **_STREAMED) as file:
        first = next(file.iter_batches(1, row_groups=[group], columns=texts, use_threads=False), None)
    for column in first.columns if first is not None else ():
        values = column.flatten() if _is_list(column.type) else column
        lengths = pc.binary_length(values.dictionary) if hasattr(values, "dictionary") else None
        longest = (pc.max(lengths).as_py() or 0) if lengths is not None else 0
        most = min(most, max(1, _BATCH_BYTES // max(longest, 1)))
    return most


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not pa.types.is_nested(kind.value_type)


def _values(column: Any) -> list[Any]:
    """The cells of a column; text that is not UTF-8 comes as bytes."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return cast("list[Any]", column.to_pylist())
    except UnicodeDecodeError:
        if _is_list(column.type):
            binary = pa.list_(pa.binary()) if pa.types.is_list(column.type) else pa.large_list(pa.large_binary())
        else:
            binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return cast("list[Any]", column.cast(binary).to_pylist())


_READERS: Mapping[str, Callable[[Path, _Mapping], Iterator[list[UrlRow]]]] = {
    "csv": functools.partial(_read_separated, ","),
    "tsv": functools.partial(_read_separated, "\t"),
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
}
