"""The source for tables of URLs (CSV, TSV, lists, JSON, Parquet), read in batches and crawled from any number of hosts.

Tables are parsed in `animesion_scrapers.url_tables`; here rows become items, each URL once with the labels of all its
rows.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

import numpy as np
from pydantic import Field, model_validator

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.schemas import Box, DropReason, Item
from animesion.sources import clean_text, families, file_key
from animesion.sources.crawled import CrawledSource, CrawlOptions
from animesion.sources.url_notes import UrlSummary
from animesion.splits import SPLIT_NAMES

if TYPE_CHECKING:
    from animesion_scrapers import SiteInfo
    from animesion_scrapers.counts import DigestSet
    from animesion_scrapers.http.addresses import Routes
    from animesion_scrapers.url_tables import UrlRow, UrlTables

_MASK = 2**64 - 1

_MOST_MERGED = 250_000
"""URLs with differing rows; their labels, groups and splits are held in memory, about 400 bytes each."""


_MEANINGS = ("url", "label", "key", "md5", "sha1", "bytes", "licence", "author", "group", "split", "box")


class UrlsOptions(CrawlOptions):
    """Options of the `urls` source."""

    @model_validator(mode="after")
    def _names_no_pages(self) -> Self:
        if self.pages:
            raise ValueError("pages: URL tables name no pages of their images, so source.pages must stay false")
        return self

    path: str = Field(description="a table, a folder of tables, or a pattern such as urls/part-*.parquet")
    format: Literal["auto", "csv", "tsv", "txt", "json", "jsonl", "parquet"] = Field(
        "auto",
        description="format of the tables; auto: by their names (.csv, .tsv, .txt, .json, .jsonl, also .gz; .parquet)",
    )
    encoding: str = Field("", description="encoding of text tables, such as cp932; empty to recognise it")
    limit: int = Field(0, ge=0, description="most rows; 0 for all")
    url_column: str = Field("", description="column of the URLs; empty to recognise it by name, such as image_url")
    label_column: str = Field("", description="column of the labels, text or lists; empty as above, such as species")
    label: str = Field(
        "", description="label of rows that have none; {file} stands for the name of their table without its ending"
    )
    key_column: str = Field("", description="column of unique names of the images; empty to name them by their URLs")
    md5_column: str = Field("", description="column of MD5 digests; empty as above")
    sha1_column: str = Field("", description="column of SHA-1 digests; empty as above")
    bytes_column: str = Field("", description="column of file sizes in bytes; empty as above, such as file_size")
    licence_column: str = Field("", description="column of licences; empty as above, such as license")
    author_column: str = Field("", description="column of authors; empty as above, such as creator")
    group_column: str = Field("", description="column whose equal values stay in one split; empty as above")
    split_column: str = Field("", description="column of published splits; empty as above")
    family: families.Family = "auto"
    box_column: str = Field(
        "",
        description="column of boxes for `crop.detector=boxes`: left, top, right, bottom as fractions of width and "
        "height; empty for none",
    )


class UrlsSource(CrawledSource):
    """Images at the URLs of tables."""

    Options: ClassVar[type[Section]] = UrlsOptions
    summary: ClassVar[str] = "tables of URLs (CSV, TSV, lists, JSON, Parquet), fetched politely from any hosts"

    def base_url(self) -> str:
        """The path of the tables, for messages."""
        return str(self.options.path)

    def items(self) -> Iterator[Item]:
        """All rows, by file name and row. A repeated URL is one item with the labels and groups of all its rows.

        Yields:
            Items, while the tables are read. An unreadable row is an item with the failure `bad record`.

        Raises:
            UsageError: There are no tables, no row has a usable URL, or a list of URLs was given no label.
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

        columns = UrlColumns(**{meaning: getattr(self.options, f"{meaning}_column") for meaning in _MEANINGS})
        try:
            return UrlTables(
                self.options.path, columns, self.options.format.removeprefix("auto"), self.options.encoding
            )
        except ScraperError as error:
            text = str(error).rstrip(".")
            raise UsageError(f"source.path: {text[0].lower()}{text[1:]}") from None

    def _list_rows(self, last: Item | None) -> Iterator[Item]:
        from animesion_scrapers.counts import DigestSet

        tables = self._tables()
        merged = self._merged(tables)
        urls, keys = DigestSet(), DigestSet()
        summary = UrlSummary()
        position, yielded = -1, 0
        for batch in self._batches(tables):
            batch_keys = [self._key(row, place) for place, row in enumerate(batch, position + 1)]
            batch_urls = _url_hashes(batch, position + 1)
            fresh = self._fresh(batch_urls, batch_keys, urls, keys, summary)
            for row, key, url, new in zip(batch, batch_keys, batch_urls, fresh, strict=True):
                position += 1
                if last is not None and position <= last.order:
                    if position == last.order and key != last.key:
                        raise self._changed(last)
                    continue
                same_url = merged.get(url)
                if not new:
                    # the item of this URL is in the earlier listing, with the labels that it had then
                    summary.late += last is not None and same_url is not None
                    continue
                yield self._item(row, key, position, same_url, summary)
                yielded += 1
                if yielded == self.options.limit:
                    self._finish(tables, summary)
                    return
        if last is not None and position < last.order:
            raise self._changed(last)
        if last is None and not summary.usable:
            raise UsageError(f"source.path: no row of {self.options.path} has a usable URL{summary.first_fault()}")
        self._finish(tables, summary)

    def _finish(self, tables: UrlTables, summary: UrlSummary) -> None:
        """Add the notes.

        Raises:
            UsageError: There are only lists of URLs, and no label.
        """
        if summary.usable and not summary.labelled and all(tables.format_of(file) == "txt" for file in tables.files):
            raise UsageError(
                f"source.path: {self.options.path} lists URLs without labels: set source.label=NAME, or "
                "source.label={file} for one list per class, or give a table with a column of labels"
            )
        named = [meaning for meaning in _MEANINGS if getattr(self.options, f"{meaning}_column")]
        self.notes += summary.sentences(tables, named)

    def _merged(self, tables: UrlTables) -> dict[int, _SameUrl]:
        """The labels, groups and splits of each URL whose rows differ in them, by the hash of the URL.

        The tables are read once before the listing, and a second time if there are such URLs: an item cannot be changed
        once it is listed.

        Raises:
            UsageError: There are more than `_MOST_MERGED`.
        """
        from animesion_scrapers.counts import DigestSet, as_digests

        urls, facts = DigestSet(), DigestSet()
        found: dict[int, _SameUrl] = {}
        position = 0
        for batch in self._facts(tables):
            hashes = _url_hashes(batch, position)
            position += len(batch)
            by_fact = as_digests(
                hash((url, self._labels(row), row.group, _split(row))) & _MASK
                for url, row in zip(hashes, batch, strict=True)
            )
            differing = facts.add(by_fact) & ~urls.add(as_digests(hashes))
            for place in differing.nonzero()[0].tolist():
                found.setdefault(hashes[place], _SameUrl())
            if len(found) > _MOST_MERGED:
                raise UsageError(
                    f"source.path: more than {_MOST_MERGED:,} URLs of {self.options.path} have rows with other labels, "
                    "groups or splits: give each URL one row, with a list of its labels"
                )
            if 0 < self.options.limit <= len(urls):
                break
        stop, position = position, 0
        for batch in self._facts(tables) if found else ():
            for url, row in zip(_url_hashes(batch, position), batch, strict=True):
                if same_url := found.get(url):
                    same_url.add(self._labels(row), row.group, _split(row))
            position += len(batch)
            if position >= stop:
                break
        return found

    def _facts(self, tables: UrlTables) -> Iterator[list[UrlRow]]:
        """The rows with no more than the columns that can differ between the rows of one URL."""
        return self._batches(tables, "url", "label", "group", "split")

    def _batches(self, tables: UrlTables, *only: str) -> Iterator[list[UrlRow]]:
        from animesion_scrapers import ScraperError

        try:
            yield from tables.batches(*only)
        except ScraperError as error:
            text = str(error).rstrip(".")
            raise UsageError(f"source.path: {text.replace('set the encoding', 'set source.encoding')}") from None

    def _fresh(
        self,
        batch_urls: Sequence[int],
        batch_keys: Sequence[str],
        urls: DigestSet,
        keys: DigestSet,
        summary: UrlSummary,
    ) -> list[bool]:
        """Whether each row is the first with its URL and with its key."""
        from animesion_scrapers.counts import as_digests

        fresh = urls.add(as_digests(batch_urls))
        summary.repeated += int((~fresh).sum())
        if self.options.key_column:  # else the URL is the key
            places: list[int] = fresh.nonzero()[0].tolist()
            same_key = ~keys.add(as_digests(int(batch_keys[place][-16:], 16) for place in places))
            summary.same_key += int(same_key.sum())
            fresh[np.array(places, np.intp)[same_key]] = False
        return cast("list[bool]", fresh.tolist())

    def _labels(self, row: UrlRow) -> tuple[str, ...]:
        """The labels of a row, or that of the options."""
        labels = tuple(dict.fromkeys(label for each in row.labels if (label := clean_text(each))))
        if labels or not self.options.label:
            return labels
        name = row.file.removesuffix(".gz")
        return (clean_text(self.options.label.replace("{file}", name.rpartition(".")[0] or name)),)

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

    def _item(
        self,
        row: UrlRow,
        key: str,
        position: int,
        same_url: _SameUrl | None,
        summary: UrlSummary,
    ) -> Item:
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
        url = clean_text(row.url, 1000)
        labels = tuple(same_url.labels) if same_url else self._labels(row)
        groups = same_url.groups if same_url else [row.group] if row.group else ()
        summary.add_item(row, labels, refused)
        if same_url:
            summary.add_merged(url, same_url.labels, same_url.splits)
        family = self.options.family
        # `auto` reads the URL or key when all names are known: `animesion.pipeline.curate`
        named = () if family == "auto" else families.matched(families.named(row.key or row.url, "")[0], family)
        where = {} if refused else {"url": normalise(row.url)} | ({"sha1": row.sha1} if row.sha1 else {})
        return Item(
            key=key,
            source="urls",
            source_id=clean_text(row.key, 1000) or url,
            locator=json.dumps(where),
            order=position,
            labels=labels,
            boxes=_boxes(row.box) if self.options.box_column else None,
            families=(*(f"group:{clean_text(group, 300)}" for group in groups), *named),
            split=_split(row),
            md5=row.md5,
            bytes=row.bytes,
            file_url=url,
            licence=clean_text(row.licence, 100),
            author=clean_text(row.author, 300),
            failure=DropReason.UNSAFE_ADDRESS if refused else "",
            detail=refused,
        )


class _SameUrl:
    """Labels, groups and splits of the rows of one URL, in the order of the rows; at most 100 of each."""

    __slots__ = ("groups", "labels", "splits")

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.groups: list[str] = []
        self.splits: list[str] = []

    def add(self, labels: Sequence[str], group: str, split: str) -> None:
        """Add what a row has."""
        for known, values in ((self.labels, labels), (self.groups, (group,)), (self.splits, (split,))):
            known += [sys.intern(value) for value in values if value and value not in known and len(known) < 100]


def _boxes(shares: tuple[float, ...]) -> tuple[Box, ...]:
    if not shares:
        return ()
    left, top, right, bottom = shares
    return (Box(left, top, right, bottom, 1.0),)


def _split(row: UrlRow) -> str:
    return SPLIT_NAMES.get(row.split.lower(), "")


def _url_hashes(batch: Sequence[UrlRow], first: int) -> list[int]:
    """Hashes in [0, 2**64) that are equal for URLs of one file; that of a row with a fault is of its own.

    They hold within one process. Percent-encoded and plain characters are the same request.

    Args:
        batch: Rows.
        first: Position of the first row in all tables.
    """
    from animesion_scrapers.url_tables import canonical

    return [
        hash(place if row.fault else canonical(row.url)) & _MASK for place, row in enumerate(batch, first)
    ]  # fmt: skip
