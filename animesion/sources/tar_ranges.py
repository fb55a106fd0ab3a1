"""Where tars and their indexes are: on disk, in a bucket, or behind a web server that answers range requests."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

from animesion.errors import AnimesionError, UsageError
from animesion.schemas import DropReason, Payload
from animesion.sources import clean_text
from animesion.sources.file_sets import FileSet, expand_braces

if TYPE_CHECKING:
    from animesion_scrapers import Download, Downloaded, RateLimiter

_LARGEST_INDEX = 64 << 20

#: Most bytes of one piece.
_LARGEST_PIECE = 1 << 30

#: Drop reasons whose texts are those of the downloader.
_REASONS = {reason.value for reason in DropReason}


def is_http(url: str) -> bool:
    """Whether an address is one of the web."""
    return re.match(r"(?i)https?://", url) is not None


class Mirror:
    """Tars and their indexes.

    Args:
        index: folder, file or pattern of the indexes.
        tars: folder or URL of the tars; empty if they are next to their indexes.
        contact: for the User-Agent of requests.
        requests_per_second: highest rate per host.
        connect_to: address and port to connect to instead of a host.
        allow_private: hosts on a LAN or loopback that may be asked, each as `host:port`.

    Raises:
        UsageError: nothing exists at the path, or web addresses are given without a pattern or a contact.
    """

    def __init__(
        self,
        index: str,
        tars: str,
        *,
        contact: str,
        requests_per_second: float,
        connect_to: Mapping[str, tuple[str, int]],
        allow_private: Sequence[str] = (),
    ) -> None:
        self._index, self._tars = index, tars.rstrip("/")
        self._contact, self._connect_to, self._private = contact, connect_to, allow_private
        self._rate = requests_per_second
        self._limiter: RateLimiter | None = None
        self._sets: dict[str, FileSet] = {}
        for each in (index, tars):
            if is_http(each) and not contact:
                raise UsageError(
                    f"source.contact: an e-mail address or URL is needed for {each}, so that the host can reach you"
                )
        if is_http(index) and not index.endswith(".json"):
            raise UsageError(
                f"source.index: {index} is no index: a web server lists no files, so name the indexes with a pattern "
                f"such as {index.rstrip('/')}/{{0000..0999}}.json"
            )

    def indexes(self) -> Iterator[tuple[str, bytes, int]]:
        """The name of each tar, the content of its index, and the tar's size in bytes, -1 if unknown.

        Raises:
            UsageError: an index or its tar is missing, or too large.
            AnimesionError: a server cannot be reached, or sends whole files.
        """
        files: FileSet | None = None
        if is_http(self._index):
            names, contents = self._over_http()
        else:
            files = FileSet(self._index, "source.index", ".json")
            names = [each.name for each in files.files()]
            contents = (_content(files, name) for name in names)
        sizes = {} if is_http(self._base) else self._sizes()
        with contextlib.closing(contents):  # ends its requests if the caller stops
            for number, (name, content) in enumerate(zip(names, contents, strict=True)):
                tar = f"{name.removesuffix('.json')}.tar"
                if is_http(self._base):
                    if not number:
                        self._probe(tar)
                elif tar not in sizes and files is not None and files.is_folder and b'"files"' not in content:
                    continue  # another JSON file, such as one about the dataset
                elif tar not in sizes:
                    raise UsageError(f"source.tars: {self.where(tar)} not found, whose index is in {self._index}")
                yield tar, content, sizes.get(tar, -1)

    def where(self, tar: str) -> str:
        """Path or URL of a tar."""
        return f"{self._base}/{tar}"

    def pieces(self, tar: str, spans: Sequence[tuple[int, int]]) -> Iterator[Payload]:
        """The bytes of pieces of a tar, given by offset and size; fewer at its end.

        Raises:
            AnimesionError: the server sends whole files instead of pieces.
        """
        if is_http(self._base):
            yield from self._requested(tar, spans)
            return
        files = self._tar_set()
        done = 0
        try:
            for content in files.pieces(tar, spans):
                yield Payload(content)
                done += 1
        except FileNotFoundError:
            for _ in spans[done:]:
                yield Payload(reason=DropReason.MISSING_FILE, detail=clean_text(tar))

    @cached_property
    def _base(self) -> str:
        """Folder or URL of the tars."""
        if self._tars:
            return self._tars
        if is_http(self._index):
            return self._http_base()
        return FileSet(self._index, "source.index", ".json").base.rstrip("/")

    def _http_base(self) -> str:
        """The part of the URL of the indexes before the first pattern."""
        return self._index.partition("{")[0].rpartition("/")[0]

    def _tar_set(self) -> FileSet:
        base = self._base
        if base not in self._sets:
            self._sets[base] = FileSet(base, "source.tars", ".tar")
        return self._sets[base]

    def _sizes(self) -> dict[str, int]:
        return {each.name: each.bytes for each in self._tar_set().files()}

    # -- over HTTP ---------------------------------------------------------------------------------------------------

    def _over_http(self) -> tuple[list[str], Generator[bytes, None, None]]:
        base = self._http_base()
        names = expand_braces(self._index.removeprefix(f"{base}/"), "source.index")

        def contents() -> Generator[bytes, None, None]:
            from animesion_scrapers import Download

            requests = [Download(name, f"{base}/{name}") for name in names]
            with contextlib.closing(self._download(requests, _LARGEST_INDEX)) as answers:
                for got in answers:
                    if got.status != "ok":
                        raise AnimesionError(
                            f"source.index: {got.url} could not be fetched: {got.detail or got.status}"
                        )
                    yield got.content

        return names, contents()

    def _probe(self, tar: str) -> None:
        """Request one byte, before thousands of files are listed for nothing."""
        [payload] = self._requested(tar, [(0, 1)])
        if payload.reason:
            raise AnimesionError(
                f"source.tars: {self.where(tar)} could not be read: {payload.detail or payload.reason}"
            )

    def _requested(self, tar: str, spans: Sequence[tuple[int, int]]) -> Iterator[Payload]:
        from animesion_scrapers import Download
        from animesion_scrapers.http.responses import NO_RANGES

        requests = [
            Download(str(number), self.where(tar), span=span) for number, span in enumerate(spans) if span[1] > 0
        ]
        answers = self._download(requests, min(_LARGEST_PIECE, max((size for _, size in spans), default=1)))
        with contextlib.closing(answers):
            for _, size in spans:
                if not size:
                    yield Payload()
                    continue
                got = next(answers)
                if got.detail == NO_RANGES:
                    raise AnimesionError(
                        f"{self.where(tar)}: {NO_RANGES}; nothing of it was read: copy the tars to a folder or a "
                        "bucket and give that"
                    )
                if got.status == "ok":
                    yield Payload(got.content)
                elif got.final:
                    reason = got.status if got.status in _REASONS else DropReason.FETCH_FAILED
                    yield Payload(reason=reason, detail=clean_text(got.detail))
                else:  # images must not vanish because a server is down
                    raise AnimesionError(
                        f"{self.where(tar)} could not be read ({got.detail or got.status}): run the same command "
                        "again, it resumes"
                    )

    def _download(self, requests: Sequence[Download], most: int) -> Generator[Downloaded, None, None]:
        from animesion_scrapers import RateLimiter, ScraperError, download_all

        self._limiter = self._limiter or RateLimiter(self._rate)
        try:
            yield from download_all(  # closing this generator ends the downloads
                requests,
                user_agent=f"animesion/{version('animesion')} ({self._contact})",
                limiter=self._limiter,
                connect_to=self._connect_to,
                allow_private=self._private,
                max_bytes=max(1, most),
            )
        except ScraperError as error:
            raise UsageError(f"source.index: {str(error).rstrip('.')}") from None


def _content(files: FileSet, name: str) -> bytes:
    with files.open(name, 1 << 20) as file:
        content = file.read(_LARGEST_INDEX + 1)
    if len(content) > _LARGEST_INDEX:
        raise UsageError(
            f"source.index: {files.path_of(name)} has more than {_LARGEST_INDEX:,} bytes, too many for an index "
            "of a tar"
        )
    return content
