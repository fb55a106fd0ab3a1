"""Progress display on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from animesion import progress

_SECONDS_BETWEEN_LINES = 10.0


class _Bars(progress.Progress):
    """One bar per stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def started(self, stage: str, total: int | None) -> None:
        self._task = self._bars.add_task(stage, total=total, status="")

    def advanced(self, count: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)

    def status(self, text: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, status=text)

    def noted(self, text: str) -> None:
        self._bars.console.print(f"source: {text}", highlight=False, markup=False)

    def finished(self, stage: str) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._task]
            total = task.total or 1
            self._bars.update(self._task, total=total, completed=total, status="")
            self._bars.stop_task(self._task)


class _Speed(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "")


class _Lines(progress.Progress):
    """A line at the end of each stage, and one every `_SECONDS_BETWEEN_LINES` while it runs."""

    def __init__(self) -> None:
        self._stage, self._total, self._done, self._status = "", 0, 0, ""
        self._started = self._printed = 0.0

    def started(self, stage: str, total: int | None) -> None:
        self._stage, self._total, self._done, self._status = stage, total or 0, 0, ""
        self._started = self._printed = time.monotonic()

    def advanced(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            print(f"{self._stage}: {self._state()}", file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        self._status = text

    def noted(self, text: str) -> None:
        print(f"source: {text}", file=sys.stderr, flush=True)

    def finished(self, stage: str) -> None:
        images = f"{self._total:,} images, " if self._total else ""
        print(f"{stage}: {images}{time.monotonic() - self._started:.1f} s", file=sys.stderr, flush=True)

    def _state(self) -> str:
        """Images done, images per second, time left and the status text."""
        parts = [f"{self._done:,} of {self._total:,}" if self._total else f"{self._done:,}"]
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        if self._total and rate:
            left = timedelta(seconds=round((self._total - self._done) / rate))
            parts.append(f"{rate:,.1f}/s, {left} left")
        return "; ".join([*parts, *([self._status] if self._status else [])])


@contextlib.contextmanager
def for_terminal() -> Iterator[progress.Progress]:
    """The progress display for stderr: bars if it is a terminal, lines otherwise."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        _Speed(),
        TextColumn("[dim]{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars)
