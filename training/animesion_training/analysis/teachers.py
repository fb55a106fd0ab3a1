"""Rank trained networks as teachers for distillation, without training a student.

The measure is Ratio 1-2, the ratio of the first logit to the second (Rios et al., arXiv 2605.15689): less
over-confident teachers have better students. `teacher_statistics` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from animesion_training.analysis.teacher_statistics import TeacherStatistics
from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.eval import evaluate
from animesion_training.eval.reading import Reading
from animesion_training.weights import load_model


@dataclass(frozen=True)
class Candidate:
    """A candidate teacher, measured on a split.

    Attributes:
        path: weights file.
        name: name of the network.
        top_1: accuracy, 0 to 1.
        statistics: statistics by name, from `TeacherStatistics.results`.
    """

    path: Path
    name: str
    top_1: float
    statistics: dict[str, float | None]

    @property
    def ratio(self) -> float:
        """Ratio 1-2 of the logits; infinite where it is undefined for all samples, so that it ranks last."""
        value = self.statistics["ratio_1_2_normal"]
        return float("inf") if value is None else value


def rank(
    weights: Sequence[Path],
    data: DataSplits,
    split: str,
    context: DistributedContext,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    advance: Callable[[int], None] = lambda count: None,
) -> list[Candidate]:
    """Rank candidates by Ratio 1-2, the best teacher first.

    Args:
        weights: files written by `save_model`, with the classes of the data.
        data: data of the distillation.
        split: split to measure on: the training split, as in the paper, or another.
        context: device to compute on; a single process.
        batch_size: images per batch.
        precision: `fp32`, `bf16` or `fp16`.
        advance: called with the number of images of each batch.

    Raises:
        UsageError: an unusable file, classes other than those of the data, or a single class.
    """
    return sorted(
        (_measure(path, data, split, context, batch_size, precision, advance) for path in weights),
        key=lambda candidate: candidate.ratio,
    )


def _measure(
    path: Path,
    data: DataSplits,
    split: str,
    context: DistributedContext,
    batch_size: int,
    precision: str,
    advance: Callable[[int], None],
) -> Candidate:
    model, card = load_model(path)
    evaluate.check_classes(card, data, str(path))
    reading = Reading.of(card, path, batch_size=batch_size, precision=precision, advance=advance)
    model = model.to(context.device)
    statistics, correct = TeacherStatistics(), 0
    with torch.inference_mode():
        for logits, batch in reading.outputs(lambda images, batch: model(images).float(), data, split, context):
            statistics.update(logits)
            correct += int((logits.argmax(1) == batch.labels.to(context.device)).sum())
    return Candidate(path, card.name, correct / statistics.samples, statistics.results())
