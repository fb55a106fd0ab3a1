"""Types that all destinations share: the files to publish, the interface of a destination, the result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from animesion.progress import Progress
from animesion.storage.checksums import CHECKSUMS

#: Files that are sent last, in this order, so that readers do not take a partial copy for a dataset.
LAST = ("README.md", "dataset.json", CHECKSUMS)

#: Shard names as builds write them; readers glob them with patterns such as `data/train-*.tar`.
SHARD = re.compile(r"data/(?:train|val|test)-\d{5}\.tar")


#: Whom a Hub repository admits: `card.gate.access` of a recipe.
Gate = Literal["off", "auto", "manual"]


@dataclass(frozen=True)
class File:
    """One file to publish.

    Attributes:
        name: path relative to the destination, with slashes.
        path: local path.
        bytes: size in bytes.
        sha256: digest of the local content.
    """

    name: str
    path: Path
    bytes: int
    sha256: str


class Destination(Protocol):
    """A place that stores published files."""

    #: the address without secrets, safe to print
    url: str

    def refusal(self, tag: str, changes: bool) -> str:
        """Why the destination refuses the publication, one sentence; empty if it does not. Changes nothing there.

        Args:
            tag: tag for the revision, empty for none.
            changes: whether files are to be sent or removed.
        """

    def prepare(self) -> None:
        """Create the destination if it does not exist."""

    def present(self, files: Sequence[File]) -> set[str]:
        """Names of the files that the destination already has with the same bytes."""

    def stale(self, files: Sequence[File]) -> list[str]:
        """Names of the destination's shards that are not among the files; `send` removes them."""

    def send(self, files: Sequence[File], stale: Sequence[str], message: str, progress: Progress) -> None:
        """Send files in order, so that the last ones become visible last, and remove stale shards.

        Args:
            files: the files to send.
            stale: names of shards to remove.
            message: one line for the history of the destination, if it has one.
            progress: receives the status.
        """

    def faults(self, files: Sequence[File]) -> list[str]:
        """One sentence for each file that the destination lacks or has with another size or SHA-256."""

    def tag(self, name: str) -> None:
        """Tag the published revision."""


@dataclass
class Publication:
    """Result of a publication, or the plan of a dry run.

    Attributes:
        url: the destination.
        files: all files of the dataset, in the order in which they are sent.
        present: names of the files that the destination already had.
        stale: names of old shards that are removed.
        forced: number of ignored faults, by check.
        tag: tag of the revision, empty for none.
        omitted: number of samples without a URL, where URLs are published.
    """

    url: str
    files: list[File]
    present: set[str]
    stale: list[str]
    forced: dict[str, int] = field(default_factory=dict)
    tag: str = ""
    omitted: int = 0

    @property
    def sent(self) -> list[File]:
        """The files that the destination did not have."""
        return [file for file in self.files if file.name not in self.present]
