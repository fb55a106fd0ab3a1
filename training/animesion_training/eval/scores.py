"""What evaluation keeps of each image: a few numbers instead of thousands of logits, gathered batch by batch.

`Scores` takes the outputs of a model as they come, in any order and from any number of processes, and keeps 37 bytes
a sample. What they say about the model is computed in `metrics`, where it is also checked that each sample came
once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from animesion.errors import AnimesionError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

#: How many guesses an image has in the second accuracy; no more than there are classes.
TOP = 5


@dataclass(frozen=True)
class Scored:
    """Samples as scored; all arrays are (N,).

    Attributes:
        indices: places of the samples in their split.
        targets: their class ids.
        predictions: the class with the largest output, the lowest id among equals.
        in_top: whether the target is among the `k` largest outputs, equals ranked by id.
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
    """Scores of a split, gathered as batches come.

    Attributes:
        classes: C, of the model that is evaluated.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        # one table that doubles: small arrays kept batch by batch split the heap, which then grows by the logits
        self._table = np.empty(4096, dtype=_ROW)
        self._used = 0

    @property
    def k(self) -> int:
        """Guesses in the top-5 accuracy: 5, or C where there are fewer classes."""
        return min(TOP, self.classes)

    def __len__(self) -> int:
        return self._used

    @torch.no_grad()
    def add(self, outputs: Tensor, targets: Tensor, indices: Tensor, *, probabilities: bool = False) -> None:
        """Add a batch; computed on its device in float32.

        Args:
            outputs: (B, C), floating: logits, or probabilities when that is said. A target of probability 0 is taken
                for one of 1.2e-38, the smallest normal float32 number.
            targets: class ids 0..C - 1, integers (B,).
            indices: places of the samples in their split, integers (B,).
            probabilities: whether the outputs are probabilities, rows in 0..1 that sum to 1 within 1e-3.

        Raises:
            ValueError: shapes or values other than these.
            AnimesionError: outputs that are not finite: the model has diverged.
        """
        self._check(outputs, targets, indices)
        outputs, targets = outputs.float(), targets.to(outputs.device, torch.int64)
        if not torch.isfinite(outputs).all():
            worst = int((~torch.isfinite(outputs).all(1)).nonzero()[0])
            raise AnimesionError(
                f"the model gives outputs that are not finite for sample {int(indices[worst])}; "
                "evaluate an earlier checkpoint, or in float32"
            )
        if probabilities:
            if (outputs < 0).any() or ((outputs.sum(1) - 1).abs() > 1e-3).any():
                raise ValueError("probabilities must be 0..1 and sum to 1")
            chances, logs = outputs, outputs.clamp_min(torch.finfo(torch.float32).tiny).log()
        else:
            logs = torch.log_softmax(outputs, dim=1)
            chances = logs.exp()
        # ranked by the outputs themselves, as rounding makes equals of large logits; argmax takes the first of equals
        predictions = outputs.argmax(1)
        told = targets[:, None]
        own = outputs.gather(1, told)
        before = torch.arange(self.classes, device=outputs.device) < told
        ranks = ((outputs > own) | ((outputs == own) & before)).sum(1)
        confidence = chances.gather(1, predictions[:, None]).squeeze(1)
        chance = chances.gather(1, told).squeeze(1)
        brier = chances.square().sum(1) - 2 * chance + 1
        self.add_scored(
            Scored(
                indices=indices.cpu().numpy().astype(np.int64),
                targets=targets.cpu().numpy(),
                predictions=predictions.cpu().numpy(),
                in_top=(ranks < self.k).cpu().numpy(),
                confidences=confidence.clamp(0, 1).cpu().numpy(),
                nlls=-logs.gather(1, told).squeeze(1).clamp_min(torch.finfo(torch.float32).min).cpu().numpy(),
                briers=brier.clamp(0, 2).cpu().numpy(),
            )
        )

    def add_scored(self, rows: Scored) -> None:
        """Add samples that are scored already."""
        end = self._used + len(rows)
        if end > len(self._table):
            grown = np.empty(max(end, 2 * len(self._table)), dtype=_ROW)
            grown[: self._used] = self._table[: self._used]
            self._table = grown
        for name in _ROW.names or ():
            self._table[name][self._used : end] = getattr(rows, name)
        self._used = end

    def extend(self, others: Iterable[Scores]) -> None:
        """Add what other processes have scored.

        Raises:
            ValueError: they are about another number of classes.
        """
        for other in others:
            if other.classes != self.classes:
                raise ValueError(f"scores of {other.classes} classes cannot join those of {self.classes}")
            self.add_scored(other.collect())

    def collect(self) -> Scored:
        """All samples so far, in the order of their indices."""
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
