"""The source for tables of URLs (CSV, TSV, JSON lines, Parquet), read in batches and crawled from any number of hosts.

Tables are parsed in `animesion_scrapers.url_tables`; here rows become items, each URL once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.schemas import Box, DropReason, Item
from animesion.sources import clean_text, file_key
from animesion.sources.crawled import CrawledSource, CrawlOptions

if TYPE_CHECKING:
    from animesion_scrapers import SiteInfo
    from animesion_scrapers.counts import DigestSet
    from animesion_scrapers.http.addresses import Routes
    from animesion_scrapers.url_tables import UrlRow, UrlTables

_EXAMPLES = 5
"""Rows that a note lists; the raw tables have all of them."""

_SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


class UrlsOptions(CrawlOptions):
    """Options of the `urls` source."""

    path: str = Field(description="a table, a folder of tables, or a pattern such as urls/part-*.parquet")
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet"] = Field(
        "auto", description="format of the tables; auto: by their names (.csv, .tsv, .jsonl, also .gz; .parquet)"
    )
    limit: int = Field(0, ge=0, description="most rows; 0 for all")
    url_column: str = Field("", description="column of the URLs; empty to recognise it by name, such as image_url")
    label_column: str = Field("", description="column of the labels, text or lists; empty as above, such as species")
    key_column: str = Field("", description="column of unique names of the images; empty to name them by their URLs")
    md5_column: str = Field("", description="column of MD5 digests; empty as above")
    sha1_column: str = Field("", description="column of SHA-1 digests; empty as above")
    bytes_column: str = Field("", description="column of file sizes in bytes; empty as above, such as file_size")
    licence_column: str = Field("", description="column of licences; empty as above, such as license")
    author_column: str = Field("", description="column of authors; empty as above, such as creator")
    group_column: str = Field("", description="column whose equal values stay in one split; empty as above")
    split_column: str = Field("", description="column of published splits; empty as above")
    box_column: str = Field(
        "",
        description="column of boxes for `crop.detector=boxes`: left, top, right, bottom as fractions of width and "
        "height; empty for none",
    )


class UrlsSource(CrawledSource):
    """Images at the URLs of tables."""

    Options: ClassVar[type[Section]] = UrlsOptions
    summary: ClassVar[str] = "tables of URLs (CSV, TSV, JSON lines, Parquet), fetched politely from any hosts"

    def base_url(self) -> str:
        """The path of the tables, for messages."""
        return str(self.options.path)

    def items(self) -> Iterator[Item]:
        """All rows, by file name and row; a repeated URL is skipped.

        Yields:
            Items, while the tables are read. An unreadable row is an item with the failure `bad record`.

        Raises:
            UsageError: There are no tables, or no row has a usable URL.
        """
        return self._list_rows(None)

    def items_after(self, last: Item) -> Iterator[Item]:
        """The rows after the last one of an earlier listing, and those of files whose names sort after its file.

        Raises:
            UsageError: The rows before that differ from the earlier listing.
        """
        return self._list_rows(last)

    def file_host(self, item: Item) -> str:
        """The host of an item's file."""
        from animesion_scrapers.url_tables import host_of

        return host_of(item.file_url)

    # -- inside --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _routes(self) -> Routes:
        from animesion_scrapers.http.addresses import Routes

        return Routes(allow_private=self.options.allow_private)

    def _info(self) -> SiteInfo:
        from animesion_scrapers import SiteInfo

        # no limits of the hosts are known, so each gets the default rate
        return SiteInfo(name="urls", summary=self.summary, url=str(self.options.path))

    def _tables(self) -> UrlTables:
        from animesion_scrapers import ScraperError
        from animesion_scrapers.url_tables import UrlColumns, UrlTables

        meanings = ("url", "label", "key", "md5", "sha1", "bytes", "licence", "author", "group", "split", "box")
        columns = UrlColumns(**{meaning: getattr(self.options, f"{meaning}_column") for meaning in meanings})
        try:
            return UrlTables(self.options.path, columns, self.options.format.removeprefix("auto"))
        except ScraperError as error:
            text = str(error).rstrip(".")
            raise UsageError(f"source.path: {text[0].lower()}{text[1:]}") from None

    def _list_rows(self, last: Item | None) -> Iterator[Item]:
        from animesion_scrapers.counts import DigestSet

        tables = self._tables()
        urls, keys = DigestSet(), DigestSet()
        summary = _Summary()
        position, yielded = -1, 0
        for batch in tables.batches():
            batch_keys = [self._key(row, place) for place, row in enumerate(batch, position + 1)]
            fresh = self._fresh(batch, batch_keys, urls, keys, summary)
            for row, key, new in zip(batch, batch_keys, fresh, strict=True):
                position += 1
                if last is not None and position <= last.order:
                    if position == last.order and key != last.key:
                        raise self._changed(last)
                    continue
                if not new:
                    continue
                yield self._item(row, key, position, summary)
                yielded += 1
                if yielded == self.options.limit:
                    self.notes += summary.sentences(tables, self.options)
                    return
        if last is not None and position < last.order:
            raise self._changed(last)
        if last is None and not summary.usable:
            raise UsageError(f"source.path: no row of {self.options.path} has a usable URL{summary.first_fault()}")
        self.notes += summary.sentences(tables, self.options)

    def _fresh(
        self, batch: Sequence[UrlRow], batch_keys: Sequence[str], urls: DigestSet, keys: DigestSet, summary: _Summary
    ) -> list[bool]:
        """Whether each row is the first with its URL and with its key."""
        from animesion_scrapers.counts import as_digests
        from animesion_scrapers.url_tables import normalise

        by_key = as_digests(int(key[-16:], 16) for key in batch_keys)
        if not self.options.key_column:
            fresh = keys.add(by_key)
            summary.repeated += int((~fresh).sum())
            return cast("list[bool]", fresh.tolist())
        by_url = as_digests(
            number if row.fault else int(_digest(normalise(row.url))[:16], 16)
            for row, number in zip(batch, by_key.tolist(), strict=True)
        )
        fresh = urls.add(by_url)
        summary.repeated += int((~fresh).sum())
        places = fresh.nonzero()[0]
        same_key = ~keys.add(by_key[places])
        summary.same_key += int(same_key.sum())
        fresh[places[same_key]] = False
        return cast("list[bool]", fresh.tolist())

    def _changed(self, last: Item) -> UsageError:
        return UsageError(
            f"source.path: the rows of {self.options.path} up to row {last.order + 1:,} have changed since they were "
            "listed; an update accepts only rows at the end and files whose names sort last: build into another folder"
        )

    def _key(self, row: UrlRow, position: int) -> str:
        if row.fault:  # tables in different folders may have the same name
            return file_key("urls-record", b"%d" % position, "")
        if row.key:
            return file_key("urls", f"key:{row.key}".encode(), row.key)
        from animesion_scrapers.url_tables import normalise

        url = normalise(row.url)
        name = url.partition("?")[0].rpartition("/")[2]
        return file_key("urls", url.encode(), name.rpartition(".")[0] or name)

    def _item(self, row: UrlRow, key: str, position: int, summary: _Summary) -> Item:
        from animesion_scrapers.url_tables import normalise, refusal_reason

        if row.fault:
            return Item(
                key=key,
                source="urls",
                source_id=clean_text(f"{row.file}:{row.line}", 300),
                locator="{}",
                order=position,
                failure=DropReason.BAD_RECORD,
                detail=summary.add_unreadable(row),
            )
        refused = refusal_reason(row.url, self._routes)
        summary.add_item(row, refused)
        url = clean_text(row.url, 1000)
        where = {} if refused else {"url": normalise(row.url)} | ({"sha1": row.sha1} if row.sha1 else {})
        return Item(
            key=key,
            source="urls",
            source_id=clean_text(row.key, 1000) or url,
            locator=json.dumps(where),
            order=position,
            labels=tuple(label for each in row.labels if (label := clean_text(each))),
            boxes=_boxes(row.box) if self.options.box_column else None,
            families=(f"group:{clean_text(row.group, 300)}",) if row.group else (),
            split=_SPLITS.get(row.split.lower(), ""),
            md5=row.md5,
            bytes=row.bytes,
            file_url=url,
            licence=clean_text(row.licence, 100),
            author=clean_text(row.author, 300),
            failure=DropReason.UNSAFE_ADDRESS if refused else "",
            detail=refused,
        )


class _Summary:
    """Counts for the notes, with the first examples."""

    def __init__(self) -> None:
        self.usable = self.repeated = self.same_key = 0
        self._faults: list[str] = []
        self._refused: list[str] = []
        self._counts: Counter[str] = Counter()

    def add_unreadable(self, row: UrlRow) -> str:
        """Count a row with a fault and return its place and fault."""
        where = f"{clean_text(row.file, 100)}, line {row.line}" if row.line else clean_text(row.file, 100)
        text = f"{where}: {clean_text(row.fault, 300)}"
        self._counts["unreadable"] += 1
        if len(self._faults) < _EXAMPLES:
            self._faults.append(text)
        return text

    def add_item(self, row: UrlRow, refused: str) -> None:
        """Count a row with an item."""
        if refused:
            self._counts["refused"] += 1
            if len(self._refused) < _EXAMPLES:
                self._refused.append(f"{clean_text(row.file, 100)}, line {row.line}: {refused}")
        else:
            self.usable += 1
        self._counts["labelled"] += bool(row.labels)
        self._counts["split"] += bool(row.split) and row.split.lower() not in _SPLITS
        self._counts.update(row.ignored)

    def first_fault(self) -> str:
        """The first fault in brackets, as the end of a sentence; empty if there is none."""
        return f" ({first})" if (first := next(iter([*self._faults, *self._refused]), "")) else ""

    def sentences(self, tables: UrlTables, options: UrlsOptions) -> list[str]:
        """The notes."""
        counts = self._counts
        notes = [_recognised(tables, options)]
        if tables.skipped_files:
            notes.append(f"{tables.skipped_files:,} other file(s) of the folder are skipped")
        if counts["unreadable"]:
            notes.append(
                f"{counts['unreadable']:,} row(s) cannot be read and count as bad records: {_some(self._faults)}"
            )
        if counts["refused"]:
            notes.append(f"{counts['refused']:,} URL(s) must not be fetched: {_some(self._refused)}")
        if self.repeated:
            notes.append(f"{self.repeated:,} row(s) repeat a URL and are skipped")
        if self.same_key:
            notes.append(f"{self.same_key:,} row(s) repeat a key with another URL and are skipped")
        if self.usable and not counts["labelled"]:
            notes.append("no row has a label: set source.label_column to their column")
        if counts["split"]:
            notes.append(f"{counts['split']:,} row(s) have a split other than {', '.join(_SPLITS)}")
        for meaning, form in (
            ("md5", "32 hexadecimal digits"),
            ("sha1", "40 hexadecimal digits"),
            ("bytes", "a size"),
            ("box", "a box"),
        ):
            if counts[meaning]:
                notes.append(f"{counts[meaning]:,} value(s) of the column for {meaning} are not {form} and are ignored")
        return [note for note in notes if note]


def _boxes(shares: tuple[float, ...]) -> tuple[Box, ...]:
    if not shares:
        return ()
    left, top, right, bottom = shares
    return (Box(left, top, right, bottom, 1.0),)


def _some(examples: Sequence[str]) -> str:
    return "; ".join(examples)


def _recognised(tables: UrlTables, options: UrlsOptions) -> str:
    """The note about columns that were recognised by name."""
    if not tables.recognised:
        return ""
    most = max(tables.recognised, key=lambda mapping: tables.recognised[mapping])
    by_name = [
        f"{meaning} from '{clean_text(name, 60)}'"
        for meaning, name in most
        if not getattr(options, f"{meaning}_column")
    ]
    others = len(tables.recognised) - 1
    return (
        f"columns recognised by name: {', '.join(by_name)}{f'; {others} table(s) have other columns' * bool(others)}"
        if by_name
        else ""
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
