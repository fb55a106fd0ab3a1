"""Which of several trained networks will teach best, before a student is trained.

The measure is how far a teacher's first logit is above its second, Ratio 1-2 (Rios et al., arXiv 2605.15689): the less
over-confident the teacher, the better its students. The numbers are `distillation.TeacherStatistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from animesion.errors import UsageError
from animesion_training.analysis.teacher_statistics import TeacherStatistics
from animesion_training.data import Augment, DataSplits, Resize, Stream
from animesion_training.distributed import DistributedContext
from animesion_training.eval import evaluate
from animesion_training.precision import autocast
from animesion_training.weights import load_model


@dataclass(frozen=True)
class Candidate:
    """What a pass over a split says of a possible teacher.

    Attributes:
        path: its weights.
        name: of the network.
        top_1: accuracy, 0 to 1.
        statistics: by the names of `TeacherStatistics.results`.
    """

    path: Path
    name: str
    top_1: float
    statistics: dict[str, float | None]

    @property
    def ratio(self) -> float:
        """Ratio 1-2 of the logits; infinite where it is defined for no sample, so that it ranks last."""
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
    """Candidates, the best teacher by Ratio 1-2 first.

    Args:
        weights: files of `save_model`, with the data's classes.
        data: what they are to teach on.
        split: what they are measured on: the training split, as in the paper, or another.
        context: where to compute; a single process.
        batch_size: images at a time.
        precision: `fp32`, `bf16` or `fp16`.
        advance: told how many images were done.

    Raises:
        UsageError: an unusable file, other classes than the data's, or a single class.
    """
    return sorted(
        (_measured(path, data, split, context, batch_size, precision, advance) for path in weights),
        key=lambda candidate: candidate.ratio,
    )


def _measured(
    path: Path,
    data: DataSplits,
    split: str,
    context: DistributedContext,
    batch_size: int,
    precision: str,
    advance: Callable[[int], None],
) -> Candidate:
    model, card = load_model(path)
    evaluate.check_classes(card.classes, data, str(path))
    if not isinstance(card.img_size, int):
        raise UsageError(f"{path} takes images of {card.img_size}; only squares are made")
    model = model.to(context.device)
    normalise = Augment.plain(evaluate.as_rgb(card.mean), evaluate.as_rgb(card.std))
    transform = Resize(card.img_size, card.crop_pct)
    stream = Stream(data, split, batch_size, card.img_size, train=False, transform=transform)
    statistics, right = TeacherStatistics(), 0
    with torch.inference_mode():
        for batch in stream:
            images = normalise(batch.images.to(context.device), batch.seeds.to(context.device))
            with autocast(precision, context.device):
                logits = model(images.contiguous()).float()
            statistics.update(logits)
            right += int((logits.argmax(1) == batch.labels.to(context.device)).sum())
            advance(len(batch.labels))
    stream.close()
    return Candidate(path, card.name, right / statistics.samples, statistics.results())
