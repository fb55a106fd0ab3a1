"""Progress display on stderr: bars on a terminal, plain lines elsewhere, at least one every ten seconds.

`for_terminal` shows the stages of a long command. `one_task` and `counted` show a loop of a shorter one, and leave
nothing behind if it ends within ten seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from animesion import progress

_SECONDS_BETWEEN_LINES = 10.0
#: Seconds whose mean is the rate.
_WINDOW = 30.0
#: Seconds after the first result from which on the wait for it no longer counts.
_WARM = 4.0

_T = TypeVar("_T")


class Rate:
    """Results per second of late, so that an estimate neither keeps the start of the workers nor jumps."""

    def __init__(self, now: float) -> None:
        """Start at a time in seconds."""
        self._first: float | None = None
        self._past = deque([(now, 0)])

    def add(self, now: float, done: int) -> None:
        """Note that `done` results are there."""
        if self._first is None:
            self._first = now
        elif self._past[0][0] < self._first and now - self._first >= _WARM:
            self._past.popleft()  # the start: what came with the first result came after a wait
        last = self._past[-1]
        if len(self._past) < 2 or now - last[0] >= 0.5:  # memory is bounded however often this is called
            self._past.append((now, done))
        while len(self._past) > 2 and self._past[1][0] <= now - _WINDOW:
            self._past.popleft()

    def per_second(self, now: float, done: int) -> float:
        """The rate of now; 0 if it is not known."""
        then, before = self._past[0]
        return (done - before) / (now - then) if now > then else 0.0


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
        self._bars.console.print(text, highlight=False, markup=False)

    def finished(self, stage: str) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._task]
            total = task.total or 1
            self._bars.update(self._task, total=total, completed=total, status="")
            self._bars.stop_task(self._task)


class _Left(ProgressColumn):
    """Results per second and time left."""

    def __init__(self) -> None:
        super().__init__()
        self._rates: dict[TaskID, Rate] = {}

    def render(self, task: Task) -> Text:
        now, done = time.monotonic(), int(task.completed)
        if task.finished:
            elapsed = timedelta(seconds=round(task.finished_time or 0))
            return Text(f"{elapsed}" + (f"  {task.finished_speed:,.1f}/s" if task.finished_speed else ""))
        rate = self._rates.setdefault(task.id, Rate(now - (task.elapsed or 0)))
        if done:
            rate.add(now, done)
        speed = rate.per_second(now, done)
        left = _left(task.total, done, speed)
        return Text("  ".join([*([left] if left else []), *([f"{speed:,.1f}/s"] if speed else [])]))


class _Lines(progress.Progress):
    """A line at the end of each stage, and one every `_SECONDS_BETWEEN_LINES` while it runs, even if nothing moves.

    Args:
        brief: leave out the line at the end of a stage that printed none before.
    """

    def __init__(self, *, brief: bool = False) -> None:
        self._brief = brief
        self._stage, self._total, self._done, self._status = "", 0, 0, ""
        self._started = self._printed = time.monotonic()
        self._rate = Rate(self._started)
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def started(self, stage: str, total: int | None) -> None:
        with self._lock:
            self._stage, self._total, self._done, self._status = stage, total or 0, 0, ""
            self._started = self._printed = time.monotonic()
            self._rate = Rate(self._started)

    def advanced(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._rate.add(time.monotonic(), self._done)
        self.beat()

    def status(self, text: str) -> None:
        self._status = text

    def noted(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finished(self, stage: str) -> None:
        with self._lock:
            shown = not self._brief or self._printed > self._started
            self._stage = ""
        if shown:
            images = f"{self._total:,} images, " if self._total else ""
            print(f"{stage}: {images}{time.monotonic() - self._started:.1f} s", file=sys.stderr, flush=True)

    def beat(self) -> None:
        """Print a line if the last one is old."""
        with self._lock:
            now = time.monotonic()
            if not self._stage or now - self._printed < _SECONDS_BETWEEN_LINES:
                return
            self._printed = now
            print(f"{self._stage}: {self._state(now)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beat in a thread of its own."""

        def beat() -> None:
            while not self._ended.wait(1.0):
                self.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _state(self, now: float) -> str:
        """Results done, their rate, time left and the status text; the time spent if nothing is counted."""
        parts = [f"{self._done:,} of {self._total:,}" if self._total else f"{self._done:,}"]
        if not self._total and not self._done:
            parts = [f"{now - self._started:.0f} s so far"]
        rate = self._rate.per_second(now, self._done)
        if left := _left(self._total, self._done, rate):
            parts.append(f"{rate:,.1f}/s, {left} left")
        return "; ".join([*parts, *([self._status] if self._status else [])])


def _left(total: float | None, done: int, rate: float) -> str:
    """Hours, minutes and seconds left; empty if that is not known."""
    return str(timedelta(seconds=round(max(0, total - done) / rate))) if total and rate > 0 else ""


@contextlib.contextmanager
def for_terminal(*, brief: bool = False) -> Iterator[progress.Progress]:
    """The progress display for stderr: bars if it is a terminal, lines otherwise.

    Args:
        brief: leave nothing behind of stages that end within ten seconds.
    """
    if not sys.stderr.isatty():
        lines = _Lines(brief=brief)
        with lines.beating():
            yield lines
        return
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Left(),
        TextColumn("[dim]{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=brief) as bars:
        yield _Bars(bars)


@contextlib.contextmanager
def for_main_process() -> Iterator[progress.Progress]:
    """The display of a command that torchrun may start several times: nothing but in the first process."""
    if os.environ.get("RANK", "0") != "0":
        yield progress.Progress()
        return
    with for_terminal(brief=True) as shown:
        yield shown


@contextlib.contextmanager
def one_task(name: str, total: int | None = None, *, prints: bool = False) -> Iterator[progress.Progress]:
    """The display of a command with one long loop.

    Args:
        name: of the loop.
        total: number of results, if it is known.
        prints: the command prints each result, so that a terminal needs no bar.
    """
    if prints and sys.stdout.isatty():
        yield progress.Progress()
        return
    with for_main_process() as shown:
        shown.started(name, total)
        yield shown
        shown.finished(name)


def counted(results: Iterable[_T], name: str, total: int | None = None, *, prints: bool = False) -> Iterator[_T]:
    """Pass results on, and show how many there were; see `one_task`."""
    with one_task(name, total, prints=prints) as shown:
        for result in results:
            yield result
            shown.advanced(1)
