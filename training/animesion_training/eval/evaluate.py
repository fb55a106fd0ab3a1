"""Score a model on a split, compute its metrics and write the report.

Each sample is scored once over all processes. The metrics are defined in `metrics`, their formats in `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion.storage.workspace import write_atomic
from animesion_training.data import Batch, DataSplits
from animesion_training.data.tags import TagLabels
from animesion_training.distributed import DistributedContext
from animesion_training.eval import report
from animesion_training.eval.metrics import Evaluation, evaluate
from animesion_training.eval.reading import Reading, of_all
from animesion_training.eval.scores import Scores
from animesion_training.eval.tag_metrics import TagScores
from animesion_training.eval.tta import predict, predict_tags
from animesion_training.text.tokenizer import Texts
from animesion_training.weights import WeightsCard


def score(
    model: nn.Module,
    data: DataSplits,
    split: str,
    reading: Reading,
    context: DistributedContext,
    *,
    texts: Texts | None = None,
) -> Scores:
    """Score every sample of a split; the scores are complete in the first process only.

    `score_tags` does so for a tagger.

    Args:
        model: put into evaluation mode.
        data: the data of the split.
        split: its name.
        reading: how the split is read and passed through the network.
        context: rank and device.
        texts: the tags of the samples, for a network that reads them; None for images alone.

    Raises:
        AnimesionError: an image cannot be read, or outputs are not finite; all processes raise it.
    """

    def forward(images: Tensor, batch: Batch) -> Tensor:
        seen: Callable[[Tensor], Tensor] = model
        if texts is not None:
            seen = partial(model, text=texts.text(batch.indices.cpu().numpy()).to(context.device))
        return predict(seen, images, reading.img_size, reading.tta)

    def scored() -> Scores:
        scores = Scores(data.num_classes)
        for outputs, batch in reading.outputs(forward, data, split, context):
            scores.add(outputs, batch.labels, batch.indices)
        scores.collect()
        return scores

    model.eval()
    parts = of_all(context, scored)
    if context.world_size == 1 or not context.is_main:
        return parts[context.rank]
    whole = Scores(data.num_classes)
    whole.extend(parts)
    return whole


def score_tags(
    model: nn.Module, data: DataSplits, split: str, reading: Reading, context: DistributedContext
) -> TagScores:
    """Score the tags of every sample of a split, as `score` does for classes; `data` has tags.

    Raises:
        AnimesionError: an image cannot be read, or outputs are not finite; all processes raise it.
    """

    def forward(images: Tensor, batch: Batch) -> Tensor:
        return predict_tags(model, images, reading.img_size, reading.tta)

    def scored() -> TagScores:
        scores = TagScores(len(tags_of(data)))
        for outputs, batch in reading.outputs(forward, data, split, context):
            scores.add(outputs, batch.indices)
        return scores

    model.eval()
    parts = of_all(context, scored)
    if context.world_size == 1 or not context.is_main:
        return parts[context.rank]
    whole = TagScores(len(tags_of(data)))
    whole.extend(parts)
    return whole


def tags_of(data: DataSplits) -> TagLabels:
    """The tags of opened data.

    Raises:
        ValueError: it was opened without.
    """
    if data.tags is None:
        raise ValueError("the data was opened without tags")
    return data.tags


def compute_metrics(
    scores: Scores, data: DataSplits, split: str, train_counts: Any = None, *, complete: bool = True
) -> Evaluation:
    """Compute every metric of a scored split.

    Args:
        scores: from `score`, in the first process.
        data: the data of the split.
        split: its name.
        train_counts: training images of each class, (C,), for the bands.
        complete: whether every sample of the split must have been scored.
    """
    expected = len(data.select(split)) if complete else None
    return evaluate(scores, names=data.classes, train_counts=train_counts, expected=expected)


def train_counts(data: DataSplits, split: str = "train") -> Any:
    """Count the images of each class in the training split, (C,); None when the data has no such split."""
    if split not in data.splits:
        return None
    return np.bincount(data.splits[split].labels, minlength=data.num_classes)


def check_classes(card: WeightsCard, data: DataSplits, what: str) -> None:
    """Check that the data has the classes of the model, in the same order.

    Args:
        card: of the model; if it has no class names, only their number is compared.
        data: the data.
        what: the model, for the message.

    Raises:
        UsageError: the classes differ; the message names the first difference.
    """
    expected = card.classes
    if not expected and card.num_classes != data.num_classes:
        raise UsageError(
            f"{data.path} has {data.num_classes} classes, and {what} was trained for {card.num_classes}: use the data "
            "that it was trained on"
        )
    if not expected or tuple(data.classes) == tuple(expected):
        return
    if len(data.classes) != len(expected):
        difference = f"{len(data.classes)} classes and not {len(expected)}"
        missing = sorted(set(expected) - set(data.classes))[:3]
        difference += f", without {', '.join(missing)}" if missing else ""
    else:
        i = next(i for i, (one, other) in enumerate(zip(expected, data.classes, strict=True)) if one != other)
        difference = f"'{data.classes[i]}' as class {i} and not '{expected[i]}'"
    raise UsageError(f"the classes of {data.path} are not those of {what}: it has {difference}")


def untrained(train_counts: Sequence[int] | npt.NDArray[np.int64] | None, data: DataSplits, split: str) -> float | None:
    """Compute the share of the images of a split whose classes have no training images.

    Args:
        train_counts: training images of each class, (C,); None if unknown.
        data: the data, with the same classes.
        split: its name.

    Returns:
        0..1; None if the counts are unknown or of other classes.
    """
    labels = data.select(split).labels
    if train_counts is None or len(train_counts) != data.num_classes:
        return None
    return float((np.asarray(train_counts)[labels] == 0).mean())


def check_trained(card: WeightsCard, data: DataSplits, split: str) -> None:
    """Check that a classifier knows at least one class of a split.

    Raises:
        UsageError: no class of the split has training images.
    """
    if untrained(_counts(card), data, split) == 1:
        raise UsageError(
            f"none of the classes in the split '{split}' of {data.path} were trained on, so the classifier names none "
            "of them: compare embeddings with --task retrieval, verification or open-set"
        )


def trained_notes(card: WeightsCard, data: DataSplits, split: str, fit_split: str) -> list[str]:
    """Return notes on embeddings of classes that the network was trained on, which are further apart than others.

    Args:
        card: of the weights.
        data: the data.
        split: that is evaluated.
        fit_split: that a threshold is fitted on; empty for none.
    """
    names = {name for name, n in zip(card.classes, _counts(card) or (), strict=False) if n > 0}
    if not names:
        return []
    seen = np.array([name in names for name in data.classes], dtype=np.bool_)
    shares = {each: float(seen[data.select(each).labels].mean()) for each in filter(None, (split, fit_split))}
    notes = []
    if shares[split] > 0:
        notes.append(f"{shares[split]:.0%} of the images in {split} are of classes that the network was trained on")
    if fit_split and shares[fit_split] > 0 and shares[split] == 0:
        notes.append(
            f"the threshold is fitted on {fit_split}, where {shares[fit_split]:.0%} of the images are of classes that "
            f"the network was trained on, and those of {split} are not: it does not fit them well"
        )
    return notes


def _counts(card: WeightsCard) -> list[int] | None:
    """Training images of each class, if the card, which is untrusted, has them."""
    counts = card.facts.get("train_counts")
    return counts if isinstance(counts, list) and all(type(n) is int for n in counts) else None


def write_report(
    folder: Path, evaluation: Evaluation, facts: dict[str, Any], scores: Scores, data: DataSplits, split: str
) -> None:
    """Write `evaluation.json`, `per_class.csv`, `confusions.csv` and `mistakes.csv` into a folder."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "per_class.csv", report.per_class_csv(evaluation).encode())
    write_atomic(folder / "confusions.csv", report.confusions_csv(evaluation).encode())
    mistakes = report.mistakes_csv(scores, data.select(split).keys, data.classes)
    # a key can be a file name, which is not always UTF-8
    write_atomic(folder / "mistakes.csv", mistakes.encode("utf-8", "backslashreplace"))
    # last: a study that was killed before counts the run as unfinished
    document = {**facts, **report.as_json(evaluation)}
    write_atomic(folder / "evaluation.json", (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
