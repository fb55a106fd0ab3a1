"""Progress of a training run on stderr: bars on a terminal; elsewhere a line per epoch, and one every ten seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from itertools import starmap

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from animesion_training.engine.watcher import Watcher

#: Seconds between lines where there is no terminal.
_INTERVAL = 10.0


class Screen(Watcher):
    """Shows the progress of each epoch and evaluation, in the first process only."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._epoch, self._step, self._steps = "", 0, 0
        self._shown = time.monotonic()
        self.silent = os.environ.get("RANK", "0") != "0"

    def message(self, text: str) -> None:
        """Print a message."""
        self._line(text)

    def started(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Start the bar of an epoch."""
        self._epoch, self._step, self._steps = f"epoch {epoch}/{epochs}", done, steps
        self._start(self._epoch, steps, done)

    def stepped(self, loss: float, rate: float, speed: float) -> None:
        """Advance the bar, or print a line every ten seconds."""
        self._step += 1
        self._advance(self._epoch, self._step, self._steps, f"loss {loss:.3f}  {speed:,.0f} images/s", "step")

    def scored(self, split: str, done: int, total: int) -> None:
        """Advance the bar of an evaluation, or print a line every ten seconds."""
        if self._task is None or self._epoch:
            self._epoch = ""
            self._start(split, total, 0)
        self._advance(split, done, total, "", "image")
        if done >= total:
            self._end()

    def ended(self, epoch: int, numbers: dict[str, float]) -> None:
        """Remove the bar and print the metrics of the epoch."""
        self._end()
        self._line(f"epoch {epoch}: {', '.join(starmap(_metric, numbers.items()))}")

    def _start(self, name: str, total: int, done: int) -> None:
        self._end()
        if self._bars:
            self._task = self._bars.add_task(name, total=total, completed=done, note="")

    def _advance(self, name: str, done: int, total: int, note: str, unit: str) -> None:
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._shown >= _INTERVAL:
            self._line(f"{name}: {unit} {done:,} of {total:,}{', ' if note else ''}{note.replace('  ', ', ')}")

    def _end(self) -> None:
        if self._bars and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _line(self, text: str) -> None:
        self._shown = time.monotonic()
        if self.silent:
            return
        if self._bars:
            self._bars.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def screen() -> Iterator[Screen]:
    """Open the display for stderr: bars on a terminal, lines otherwise."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield Screen(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield Screen(bars)


def _metric(name: str, value: float) -> str:
    """A metric as people read it: shares in percent, losses and rates as they are."""
    words = name.replace("_", " ").replace("top ", "top-")
    is_share = name.startswith("val_") and name != "val_nll"
    return f"{words} {value:.2%}" if is_share else f"{words} {value:.4g}"
