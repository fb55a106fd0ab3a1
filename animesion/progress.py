"""What long operations report while they run; the command line has displays that show it."""

from __future__ import annotations


class Progress:
    """What a build tells while it runs; this one keeps silent, the command line has one that shows it."""

    def started(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` images, or None when it does not count images."""

    def advanced(self, count: int) -> None:
        """So many images of the stage are done."""

    def status(self, text: str) -> None:
        """How the stage goes, in words; empty when there is nothing to say."""

    def finished(self, stage: str) -> None:
        """The stage is done."""
