"""Progress of a training run on stderr: a bar per epoch on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from animesion_training.engine.watcher import Watcher


class Screen(Watcher):
    """Shows the progress of each epoch, in the first process only."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self.silent = os.environ.get("RANK", "0") != "0"

    def message(self, text: str) -> None:
        """Print a message."""
        self._line(text)

    def started(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Start the bar of an epoch."""
        if self._bars:
            self._task = self._bars.add_task(f"epoch {epoch}/{epochs}", total=steps, completed=done, note="")

    def stepped(self, loss: float, rate: float, speed: float) -> None:
        """Advance the bar."""
        if self._bars and self._task is not None:
            self._bars.update(self._task, advance=1, note=f"loss {loss:.3f}  {speed:,.0f} images/s")

    def ended(self, epoch: int, numbers: dict[str, float]) -> None:
        """Remove the bar and print the metrics of the epoch."""
        if self._bars and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        metrics = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        self._line(f"epoch {epoch}: {metrics}")

    def _line(self, text: str) -> None:
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
