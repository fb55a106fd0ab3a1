"""Per-sample scores of an evaluation: a few numbers instead of thousands of logits, accumulated batch by batch.

`Scores` accepts the outputs of a model in any order and from any number of processes, and stores 37 bytes per sample.
`metrics` checks that each sample was scored once, and computes the metrics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from animesion.errors import AnimesionError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

#: Number of guesses in the top-5 accuracy, unless there are fewer classes.
TOP = 5


@dataclass(frozen=True)
class Scored:
    """Scored samples; all arrays are (N,).

    Attributes:
        indices: positions of the samples in their split.
        targets: class ids.
        predictions: class with the largest output; the lowest id among equals.
        in_top: whether the target is among the `k` largest outputs; equals are ranked by id.
        confidences: probability of the prediction, 0..1.
        nlls: negative log-likelihood of the target, in nats.
        briers: squared distance of the probabilities from the truth, summed over the classes, 0..2.
    """

    indices: IntArray
    targets: IntArray
    predictions: IntArray
    in_top: BoolArray
    confidences: FloatArray
    nlls: FloatArray
    briers: FloatArray

    def __len__(self) -> int:
        return len(self.indices)


_ROW = np.dtype(
    [
        ("indices", np.int64),
        ("targets", np.int64),
        ("predictions", np.int64),
        ("in_top", np.bool_),
        ("confidences", np.float32),
        ("nlls", np.float32),
        ("briers", np.float32),
    ]
)


class Scores:
    """Accumulated scores of a split.

    What is computed on a GPU stays there until it is asked for, and is then copied at once: adding waits for nothing.

    Attributes:
        classes: C, number of classes of the model.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        # one table that doubles: many small arrays between the logits would fragment the heap
        self._table = np.empty(4096, dtype=_ROW)
        self._used = 0
        self._waiting: list[Tensor] = []  # (8, B) of each batch, see `_take`

    @property
    def k(self) -> int:
        """Number of guesses in the top-5 accuracy: 5, or C for fewer classes."""
        return min(TOP, self.classes)

    def __len__(self) -> int:
        return self._used + sum(rows.shape[1] for rows in self._waiting)

    def __getstate__(self) -> dict[str, Any]:
        self._take()
        return vars(self)

    @torch.no_grad()
    def add(self, outputs: Tensor, targets: Tensor, indices: Tensor, *, probabilities: bool = False) -> None:
        """Add a batch; computes on its device in float32.

        Args:
            outputs: (B, C), floating: logits or probabilities. Probabilities of 0 are raised to 1.2e-38, the smallest
                normal float32 number.
            targets: class ids 0..C - 1, integers (B,).
            indices: positions of the samples in their split, integers (B,).
            probabilities: whether outputs are probabilities: rows in 0..1 that sum to 1 within 1e-3.

        Raises:
            ValueError: shapes or values other than these.
            AnimesionError: outputs that are not finite; of a GPU, when the scores are collected.
        """
        self._check(outputs, targets, indices)
        outputs, targets = outputs.float(), targets.to(outputs.device, torch.int64, non_blocking=True)
        finite = torch.isfinite(outputs).all(1)
        if probabilities:
            if (outputs < 0).any() or ((outputs.sum(1) - 1).abs() > 1e-3).any():
                raise ValueError("probabilities must be 0..1 and sum to 1")
            shares, logs = outputs, outputs.clamp_min(torch.finfo(torch.float32).tiny).log()
        else:
            logs = torch.log_softmax(outputs, dim=1)
            shares = logs.exp()
        # ranked by outputs, because probabilities of large logits are equal after rounding; argmax returns the first
        predictions = outputs.argmax(1)
        columns = targets[:, None]  # (B, 1)
        own = outputs.gather(1, columns)
        before = torch.arange(self.classes, device=outputs.device) < columns
        ranks = ((outputs > own) | ((outputs == own) & before)).sum(1)
        confidence = shares.gather(1, predictions[:, None]).squeeze(1)
        own_share = shares.gather(1, columns).squeeze(1)
        # sum of (p - q)^2 with q one-hot
        brier = shares.square().sum(1) - 2 * own_share + 1
        integers = (indices.to(outputs.device, non_blocking=True), targets, predictions, ranks < self.k, finite)
        floats = torch.stack(
            (
                confidence.clamp(0, 1),
                -logs.gather(1, columns).squeeze(1).clamp_min(torch.finfo(torch.float32).min),
                brier.clamp(0, 2),
            )
        )
        # the bits of floats as integers: one table, and one copy
        self._waiting.append(
            torch.cat((torch.stack([row.long() for row in integers]), floats.view(torch.int32).long()))
        )
        if outputs.device.type == "cpu":
            self._take()

    def _take(self) -> None:
        """Copy what waits on the device into the table."""
        if not self._waiting:
            return
        rows, self._waiting = torch.cat(self._waiting, 1).cpu().numpy(), []
        indices, targets, predictions, in_top, finite = rows[:5]
        if not finite.all():
            raise AnimesionError(
                f"the model's outputs are not finite for sample {indices[int(finite.argmin())]}: "
                "evaluate earlier weights, or use --precision fp32"
            )
        confidences, nlls, briers = rows[5:].astype(np.int32).view(np.float32)
        self.add_scored(Scored(indices, targets, predictions, in_top.astype(np.bool_), confidences, nlls, briers))

    def add_scored(self, rows: Scored) -> None:
        """Add scored samples."""
        self._take()
        end = self._used + len(rows)
        if end > len(self._table):
            grown = np.empty(max(end, 2 * len(self._table)), dtype=_ROW)
            grown[: self._used] = self._table[: self._used]
            self._table = grown
        for name in _ROW.names or ():
            self._table[name][self._used : end] = getattr(rows, name)
        self._used = end

    def extend(self, others: Iterable[Scores]) -> None:
        """Add the scores of other processes.

        Raises:
            ValueError: scores of another number of classes.
        """
        for other in others:
            if other.classes != self.classes:
                raise ValueError(f"scores of {other.classes} classes cannot join those of {self.classes}")
            self.add_scored(other.collect())

    def collect(self) -> Scored:
        """Return all samples so far, sorted by index.

        Raises:
            AnimesionError: outputs of a batch were not finite.
        """
        self._take()
        rows = self._table[: self._used]
        rows = rows[np.argsort(rows["indices"], kind="stable")]
        return Scored(**{name: np.ascontiguousarray(rows[name]) for name in _ROW.names or ()})

    def _check(self, outputs: Tensor, targets: Tensor, indices: Tensor) -> None:
        if outputs.ndim != 2 or outputs.shape[1] != self.classes or not outputs.is_floating_point():
            raise ValueError(
                f"outputs must be floating (B, {self.classes}), not {outputs.dtype} {tuple(outputs.shape)}"
            )
        for name, values in (("targets", targets), ("indices", indices)):
            if values.shape != outputs.shape[:1] or values.is_floating_point():
                raise ValueError(f"{name} must be integers ({len(outputs)},), not {values.dtype} {tuple(values.shape)}")
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < self.classes:
            raise ValueError(f"targets must be class ids 0..{self.classes - 1}")
