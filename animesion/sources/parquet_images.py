"""The source for Parquet files with embedded images, as Hugging Face datasets are published.

Columns are chosen in `animesion.sources.parquet_columns`. Images are read row group by row group, a few rows at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import AnimesionError, UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, families, file_key
from animesion.sources.file_sets import FileSet, ordered_splits, split_of
from animesion.sources.stored import Listed, PathOrUrl
from animesion.splits import SPLIT_NAMES
from animesion.wording import amount

if TYPE_CHECKING:
    import pyarrow.parquet as pq

    from animesion.sources.parquet_columns import Columns

#: Rows that are listed at once, and images that are in memory at once.
_LISTED_ROWS, _READ_ROWS = 4096, 8

#: Most bytes of a file's footer; that of a million row groups is smaller.
_LARGEST_FOOTER = 128 << 20

#: Most bytes of labels and paths in a row group, uncompressed; they are in memory at once.
_LARGEST_LABELS = 256 << 20

#: Bytes that are read ahead from a bucket.
_BLOCK = 4 << 20

#: What differs between files of one set: numbers, and the hashes that the Hub put into names.
_NUMBER = re.compile(r"(?<![0-9a-z])[0-9a-f]{16}(?![0-9a-z])|\d+")


class ParquetOptions(Section):
    """Options of the `parquet` source."""

    path: PathOrUrl = Field(
        description="Parquet file, folder of them at any depth, or pattern such as data/train-*.parquet; may be s3://, "
        "gs:// or hf://datasets/owner/name"
    )
    image_column: str = Field("", description="column of the images; empty to find it")
    label_column: str = Field("", description="column of the labels; empty to find it")
    family: families.Family = "auto"
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped")


@dataclass(frozen=True, slots=True)
class _Row:
    """One row: the position of its file, the row in it, the file name of the image, its labels and its split."""

    file: int
    row: int
    name: str
    labels: tuple[str, ...]
    class_id: int
    fault: str
    split: str = ""


class ParquetSource:
    """Images in Parquet files."""

    Options = ParquetOptions
    summary: ClassVar[str] = "Parquet files with embedded images (Hugging Face datasets); published splits kept"
    remote: ClassVar[bool] = False

    def __init__(self, options: ParquetOptions) -> None:
        self.options = options
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """An empty context."""
        return contextlib.nullcontext()

    def items(self) -> Iterator[Item]:
        """One item per row, by file name and row."""
        from animesion.sources import parquet_columns

        files = FileSet(self.options.path, "source.path", ".parquet")
        listed = files.files()
        if files.is_folder:
            _check_one_dataset([each.name for each in listed], self.options.path)
        columns = None
        for each in listed:  # test files of the Hub may lack the labels that train files have
            with _opened(files, each.name) as parquet:
                found = parquet_columns.choose(parquet, files.path_of(each.name), self.options, files)
            columns = columns or found
            if found.label:
                columns = found
                break
        assert columns is not None
        if not columns.label:
            raise UsageError(columns.refusal)
        rows: list[_Row] = []
        starts: list[list[int]] = []
        for number, each in enumerate(listed):
            with _opened(files, each.name) as parquet:
                starts.append(_starts(parquet, files.path_of(each.name)))
                rows += self._rows(parquet, columns, number, files.path_of(each.name))
        of_file = [split_of(each.name) for each in listed]
        splits = _splits(rows, of_file, columns.split, self.options.path)
        self.notes += _sentences(columns, rows, of_file, splits)
        yield from self._items(rows, listed, starts, splits, columns)

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The embedded bytes; a row group is read once for the items of it, from the start, a few rows at a time."""
        files = FileSet(self.options.path, "source.path", ".parquet")
        places: list[dict[str, Any]] = [json.loads(item.locator) for item in items]
        for name, in_file in itertools.groupby(places, key=lambda place: str(place["file"])):
            try:
                with _opened(files, name) as parquet:
                    for group, in_group in itertools.groupby(in_file, key=lambda place: int(place["group"])):
                        wanted = list(in_group)
                        column = str(wanted[0]["column"])
                        yield from self._read_group(parquet, group, column, [int(place["row"]) for place in wanted])
            except FileNotFoundError:
                for _ in in_file:
                    yield Payload(reason=DropReason.MISSING_FILE, detail=clean_text(name))

    def stamp(self) -> str:
        """A digest of the names, sizes and times of the files, and of the README.md that may name their classes."""
        from animesion.sources import parquet_columns

        try:
            files = FileSet(self.options.path, "source.path", ".parquet")
        except AnimesionError:  # the listing says what is wrong
            return ""
        return files.stamp(parquet_columns.SIDE_FILES)

    def _rows(self, parquet: pq.ParquetFile, columns: Columns, number: int, where: str) -> Iterator[_Row]:
        """The rows of a file; images are not read."""
        import pyarrow as pa

        present = set(parquet.schema_arrow.names)
        if columns.image not in present:
            raise UsageError(
                f"{where} has no column {columns.image!r}, which other files of {self.options.path} have: give one "
                "kind of file with source.path"
            )
        label = columns.label if columns.label in present else ""
        if label:
            columns.check_same_names(parquet, where)
        split = columns.split if columns.split in present else ""
        wanted = [name for name in (label, split, columns.path_of(parquet)) if name]
        _check_sizes(parquet, wanted, where)
        row = 0
        if not wanted:
            for row in range(parquet.metadata.num_rows):
                yield _Row(number, row, "", (), -1, "")
            return
        try:
            for batch in parquet.iter_batches(_LISTED_ROWS, columns=wanted, use_threads=False):
                names = batch.column(columns.image).field("path").to_pylist() if columns.path_of(parquet) else None
                labels = batch.column(label).to_pylist() if label else None
                splits = batch.column(split).to_pylist() if split else None
                for index in range(batch.num_rows):
                    name = names[index] if names else None
                    texts, class_id, fault = columns.labels_of(labels[index] if labels else None)
                    stated = clean_text((splits[index] if splits else None) or "", 40)
                    yield _Row(number, row, clean_text(name or "", 1000), texts, class_id, fault, stated)
                    row += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UsageError(f"{where} is damaged after row {row:,} ({_short(error)}): get it again") from None

    def _items(
        self,
        rows: Sequence[_Row],
        listed: Sequence[Listed],
        starts: Sequence[Sequence[int]],
        splits: Sequence[str],
        columns: Columns,
    ) -> Iterator[Item]:
        names = [PurePosixPath(row.name.replace("\\", "/")).name for row in rows]
        stems = [PurePosixPath(name).stem for name in names]
        known = families.tokens(stems, [row.labels[0] if row.labels else "" for row in rows], self.options.family)
        facts = zip(rows, names, stems, known, splits, strict=True)
        for order, (row, name, stem, family, split) in enumerate(facts):
            file = listed[row.file]
            group = bisect_right(starts[row.file], row.row) - 1
            place = {
                "file": file.name,
                "group": group,
                "row": row.row - starts[row.file][group],
                "column": columns.image,
                "stamp": f"{file.bytes}-{file.stamp}",
            }
            yield Item(
                key=file_key("parquet", f"{file.name}:{row.row}".encode("utf-8", "surrogateescape"), stem or "row"),
                source="parquet",
                source_id=clean_text(f"{file.name}:{row.row}{f'/{name}' if name else ''}", 1000),
                locator=json.dumps(place),
                order=order,
                labels=row.labels,
                families=family,
                split=split,
                class_order=row.class_id,
                failure=DropReason.BAD_RECORD if row.fault else "",
                detail=row.fault,
            )

    def _read_group(self, parquet: pq.ParquetFile, group: int, column: str, wanted: Sequence[int]) -> Iterator[Payload]:
        """Images of a row group at positions in it."""
        import pyarrow as pa

        done = 0
        try:
            images = _images(parquet, group, column)
            position = -1
            for row in wanted:
                if row <= position:  # rows are in ascending order, unless the caller chose otherwise
                    images, position = _images(parquet, group, column), -1
                content = next(itertools.islice(images, row - position - 1, None), None)
                position = row
                yield self._payload(content)
                done += 1
        except (pa.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
            for _ in wanted[done:]:
                yield Payload(reason=DropReason.FETCH_FAILED, detail=f"the Parquet file is damaged: {_short(error)}")

    def _payload(self, content: bytes | None) -> Payload:
        if content is None:
            return Payload(reason=DropReason.MISSING_FILE, detail="the row has a path and no bytes")
        if len(content) > self.options.max_bytes:
            return Payload(reason=DropReason.TOO_MANY_BYTES)
        return Payload(content)


def _check_one_dataset(names: Sequence[str], path: str) -> None:
    """Check that the files are not those of several configurations, each in a folder of its own.

    Raises:
        UsageError: files of a split that differ in their numbers only are in several folders. Folders named after a
            split, partitions such as `year=2020`, and numbered parts such as `000` do not count.
    """
    # split and name without numbers -> parts of the folder without numbers -> the folder
    folders: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in names:
        *above, base = name.split("/")
        parts = [part for part in above if part.lower() not in SPLIT_NAMES and "=" not in part and not part.isdecimal()]
        alike = folders[split_of(name), _NUMBER.sub("#", base)]
        alike.setdefault("/".join(_NUMBER.sub("#", part) for part in parts), "/".join(above))
    several = max(folders.values(), key=len)
    if len(several) > 1:
        shown = " and ".join(clean_text(each or ".", 100) for each in sorted(several.values())[:2])
        depths = sorted({name.count("/") for name in names})
        patterns = ["*/" * depth + "*.parquet" for depth in depths]
        pattern = patterns[0] if len(patterns) == 1 else f"{{{','.join(patterns)}}}"
        raise UsageError(
            f"source.path: {path} has files of the same name in {len(several):,} folders, such as {shown}: if these "
            "are configurations with classes of their own, give one of the folders; if they are parts of one dataset, "
            f"give a pattern of all files, '{path.rstrip('/')}/{pattern}'"
        )


@contextlib.contextmanager
def _opened(files: FileSet, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose footer has been checked for its size, and is read once.

    Raises:
        UsageError: it is no readable Parquet file.
        FileNotFoundError: it does not exist.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = files.path_of(name)
    with files.open(name, _BLOCK) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        end = file.read(8)
        footer = int.from_bytes(end[:4], "little")
        if len(end) < 8 or end[4:] != b"PAR1" or footer + 12 > size:
            problem = "is encrypted" if end[4:] == b"PARE" else "is no Parquet file, or was cut short"
            raise UsageError(f"source.path: {where} {problem}: get it again or move it away")
        if footer > _LARGEST_FOOTER:
            raise UsageError(f"source.path: {where} has a footer of {footer:,} bytes, too large to be read: check it")
        file.seek(0)
        try:
            # buffered: pages of a column are read one after another instead of a column of a row group as a whole
            parquet = pq.ParquetFile(
                pa.PythonFile(file, mode="r"),
                buffer_size=1 << 20,
                pre_buffer=False,
                thrift_string_size_limit=_LARGEST_FOOTER,
                thrift_container_size_limit=1_000_000,
            )
            _ = parquet.schema_arrow
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise UsageError(
                f"source.path: {where} cannot be read as Parquet ({_short(error)}): get it again"
            ) from None
        with contextlib.closing(parquet):
            yield parquet


def _starts(parquet: pq.ParquetFile, where: str) -> list[int]:
    """First row of each row group."""
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
    if any(size < 0 for size in sizes) or sum(sizes) != parquet.metadata.num_rows:
        raise UsageError(f"source.path: {where} states numbers of rows that contradict one another: get it again")
    return [0, *itertools.accumulate(sizes[:-1])]


def _check_sizes(parquet: pq.ParquetFile, columns: Sequence[str], where: str) -> None:
    """Check that columns of labels and paths fit into memory: a column may be compressed ten thousand times.

    Raises:
        UsageError: a row group of them is too large.
    """
    metadata = parquet.metadata
    paths = [parquet.schema.column(index).path for index in range(metadata.num_columns)]
    chosen = [i for i, path in enumerate(paths) if any(path == name or path.startswith(f"{name}.") for name in columns)]
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        if sum(row_group.column(index).total_uncompressed_size for index in chosen) > _LARGEST_LABELS:
            raise UsageError(
                f"source.path: the columns {', '.join(columns)} of {where} have more than {_LARGEST_LABELS:,} bytes in "
                "a row group, too many for labels: set source.label_column to another"
            )


def _images(parquet: pq.ParquetFile, group: int, column: str) -> Iterator[bytes | None]:
    """The images of a row group, decoded a few rows at a time; None for a row without bytes."""
    import pyarrow as pa

    if not 0 <= group < parquet.metadata.num_row_groups:
        raise IndexError("it has fewer row groups than were listed")
    nested = pa.types.is_struct(parquet.schema_arrow.field(column).type)
    name = f"{column}.bytes" if nested else column
    for batch in parquet.iter_batches(_READ_ROWS, row_groups=[group], columns=[name], use_threads=False):
        values = batch.column(column)
        for value in values:
            content = value.as_py()
            yield (content or {}).get("bytes") if nested else content


def _splits(rows: Sequence[_Row], of_file: Sequence[str], column: str, path: str) -> list[str]:
    """The split of each row: that of its column of splits, or else of its file.

    Raises:
        UsageError: some values of the column are known splits and others not, which would be lost.
    """
    stated = {row.split for row in rows} - {""}
    unknown = sorted(value for value in stated if value.lower() not in SPLIT_NAMES)
    if unknown and len(unknown) < len(stated):
        raise UsageError(
            f"source.path: the column {column!r} of {path} has the split {unknown[0]!r}, which is no name of train, "
            "val or test: correct it"
        )
    if unknown:
        return [of_file[row.file] for row in rows]
    return [SPLIT_NAMES[row.split.lower()] if row.split else of_file[row.file] for row in rows]


def _sentences(columns: Columns, rows: Sequence[_Row], of_file: Sequence[str], splits: Sequence[str]) -> list[str]:
    """The notes: what was understood, and what was not."""
    classes = len({label for row in rows for label in row.labels})
    found = ordered_splits(set(splits))
    kind = " (ClassLabel)" if columns.names else ""
    words = [
        f"{classes:,} {'class' if classes == 1 else 'classes'}{kind}"
        f"{f' in splits {chr(47).join(found)}' if found else ''}, image column {columns.image}, label column "
        f"{columns.label}",
        f"{len(of_file):,} {'file' if len(of_file) == 1 else 'files'}, {len(rows):,} rows",
    ]
    without = of_file.count("")
    if found and without and "" in splits:
        words.append(f"{without:,} files are named after no split")
    unlabelled = sum(not row.labels and not row.fault for row in rows)
    if unlabelled:
        words.append(f"{unlabelled:,} rows have no label")
    notes = [f"{'; '.join(words)} (source.image_column and source.label_column choose others)"]
    faults = Counter(row.fault for row in rows if row.fault)
    if faults:
        example = next(iter(faults))
        wrong = amount(faults.total(), "row has", "rows have")
        notes.append(f"{wrong} a label that is none of the class names, such as {example}")
    return notes


def _short(error: Exception) -> str:
    return clean_text(str(error), 120) or type(error).__name__
