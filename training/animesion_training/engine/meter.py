"""Losses of a run: they stay on the device until they are read together, and are checked then.

Reading waits for the device. It happens at logged steps, before anything is saved, and every two seconds where steps
take longer, so that a request to stop is noticed. All processes read after the same steps, because when to read
depends only on the number of the step and on what was reduced over the processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from animesion.errors import AnimesionError
from animesion_training.engine.update import StepReport

_LONGEST = 2.0  # seconds between readings


class DivergedError(AnimesionError):
    """The loss or the weights became NaN or infinite, or the loss jumped; the last checkpoint is from before that."""


class Reading(NamedTuple):
    """What was read of a step.

    Attributes:
        images: of the global batch.
        loss: mean over them; NaN if none could be read.
        terms: means of the terms by name.
    """

    images: int
    loss: float
    terms: dict[str, float]


class Meter:
    """Keeps the reports of steps, and reads and checks them.

    Args:
        spike: factor above the running mean at which the loss has jumped; 0 disables the check.
        log_steps: steps after which the losses are read at the latest.
        advice: returns the end of an error message: where to resume from.

    Attributes:
        stop: whether any process was asked to stop.
        last: the newest reading.
        running_loss: running mean of the loss.
        loss_sum: sum of the losses of all images of this epoch.
        images: number of these images.
        pace: seconds per step between the last two readings.
    """

    def __init__(self, spike: float, log_steps: int, advice: Callable[[], str]) -> None:
        self.stop = False
        self.last = Reading(0, math.nan, {})
        self.running_loss = 0.0
        self.loss_sum, self.images = 0.0, 0
        self.pace = 0.0
        self._spike, self._log_steps, self._advice = spike, log_steps, advice
        self._reports: list[tuple[int, StepReport]] = []
        self._due = 1  # number of reports after which to read
        self._read_at = time.perf_counter()

    def add(self, step: int, report: StepReport) -> bool:
        """Keep the report of a step, counted from 1; return whether it is time to read."""
        self._reports.append((step, report))
        return len(self._reports) >= self._due or step % self._log_steps == 0

    def read(self) -> None:
        """Read all reports, in one transfer.

        Raises:
            DivergedError: a loss is not finite, or has jumped.
        """
        if not self._reports:
            return
        reports, self._reports = self._reports, []
        # the terms are unknown until the first image could be read: rows of different lengths
        width = max(len(report.numbers) for _, report in reports)
        padded = [functional.pad(report.numbers, (0, width - len(report.numbers))) for _, report in reports]
        rows = torch.stack(padded).tolist()
        now = time.perf_counter()
        self.pace, self._read_at = (now - self._read_at) / len(rows), now
        seconds = rows[-1][2]  # those of the first process: the same everywhere
        self._due = max(1, int(_LONGEST / seconds)) if seconds else 1
        self.stop = self.stop or any(row[1] for row in rows)
        for (step, report), row in zip(reports, rows, strict=True):
            images = int(row[0])
            if images:
                self._check(step, images, dict(zip(report.names, row[3:], strict=False)))

    def start_epoch(self, loss_sum: float = 0.0, images: int = 0) -> None:
        """Start the sums of an epoch, or continue those of a checkpoint."""
        self.loss_sum, self.images = loss_sum, images

    def restart_clock(self) -> None:
        """Leave out the time since the last reading, such as that of an evaluation."""
        self._read_at = time.perf_counter()

    def _check(self, step: int, images: int, sums: dict[str, float]) -> None:
        terms = {name: value / images for name, value in sums.items()}
        loss = sum(terms.values())
        if not math.isfinite(loss):
            bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
            where = f" (its term {bad})" if len(terms) > 1 else ""
            raise DivergedError(
                f"the loss{where} is {loss} at step {step}: lower optimizer.lr or clip; {self._advice()}"
            )
        if self._spike and step > 100 and loss > self._spike * self.running_loss:
            raise DivergedError(
                f"the loss jumped to {loss:.3g} at step {step}, from about {self.running_loss:.3g}: lower "
                f"optimizer.lr or clip; {self._advice()}"
            )
        self.running_loss = 0.98 * (self.running_loss or loss) + 0.02 * loss
        self.loss_sum, self.images = self.loss_sum + loss * images, self.images + images
        self.last = Reading(images, loss, terms)
