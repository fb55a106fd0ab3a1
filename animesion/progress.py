"""Progress events of long operations; the command line has subclasses that display them."""

from __future__ import annotations


class Progress:
    """Progress events of a build; this class ignores all of them."""

    def started(self, stage: str, total: int | None) -> None:
        """A stage starts, with `total` images, or None if it does not count images."""

    def advanced(self, count: int) -> None:
        """The stage finished `count` more images."""

    def status(self, text: str) -> None:
        """The state of the stage changed; an empty text clears it."""

    def noted(self, text: str) -> None:
        """What was understood of the input, or why work is done again, in a sentence."""

    def finished(self, stage: str) -> None:
        """The stage ended."""
