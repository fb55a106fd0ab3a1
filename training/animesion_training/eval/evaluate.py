"""Score a model on a split, compute its metrics and write the report.

Each sample is scored once over all processes. The metrics are defined in `metrics`, their formats in `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from animesion.errors import AnimesionError, UsageError
from animesion.storage.workspace import write_atomic
from animesion_training.data import Augment, Batch, DataSplits, Resize, Stream
from animesion_training.data.tags import TagLabels
from animesion_training.distributed import DistributedContext
from animesion_training.eval import report
from animesion_training.eval.metrics import Evaluation, evaluate
from animesion_training.eval.scores import Scores
from animesion_training.eval.tag_metrics import TagScores
from animesion_training.eval.tta import TTA, decoded_size, predict, predict_tags
from animesion_training.precision import autocast
from animesion_training.text.tokenizer import Texts
from animesion_training.weights import WeightsCard

S = TypeVar("S")


def score(
    model: nn.Module,
    data: DataSplits,
    split: str,
    normalise: Augment,
    context: DistributedContext,
    *,
    img_size: int,
    crop_pct: float = 1.0,
    batch_size: int = 128,
    precision: str = "fp32",
    channels_last: bool = False,
    workers: int | None = None,
    on_error: str = "raise",
    tta: TTA = "none",
    texts: Texts | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Score every sample of a split; the scores are complete in the first process only.

    `score_tags` does so for a tagger.

    Args:
        model: put into evaluation mode.
        data: the data of the split.
        split: its name.
        normalise: deterministic, from uint8 to the input of the model.
        context: rank and device.
        img_size: side of the input in pixels; images are resized to a square.
        crop_pct: share of that square's side that the crop covers; see `Resize`.
        batch_size: samples per batch and process.
        precision: `fp32`, `bf16` or `fp16`.
        channels_last: memory format of the input.
        workers: decoding threads; None for one per core.
        on_error: `raise`, or `skip` samples that cannot be read.
        tta: views of each image whose predictions are averaged, see `tta.predict`.
        texts: the tags of the samples, for a network that reads them; None for images alone.
        advance: called with the number of samples of each batch.

    Raises:
        AnimesionError: an image cannot be read, or outputs are not finite; all processes raise it.
    """
    scores = Scores(data.num_classes)

    def add(outputs: Tensor, batch: Batch) -> None:
        scores.add(outputs, batch.labels, batch.indices)

    reading = _Reading(img_size, crop_pct, batch_size, precision, channels_last, workers, on_error, tta, advance, texts)
    parts = _scored(model, data, split, normalise, context, reading, predict, scores, add, scores.collect)
    if parts is not None:  # the other processes keep their own part
        scores = Scores(data.num_classes)
        scores.extend(parts)
    return scores


def score_tags(
    model: nn.Module,
    data: DataSplits,
    split: str,
    normalise: Augment,
    context: DistributedContext,
    *,
    img_size: int,
    crop_pct: float = 1.0,
    batch_size: int = 128,
    precision: str = "fp32",
    channels_last: bool = False,
    workers: int | None = None,
    on_error: str = "raise",
    tta: TTA = "none",
    advance: Callable[[int], None] = lambda count: None,
) -> TagScores:
    """Score the tags of every sample of a split, as `score` does for classes; `data` has tags.

    Raises:
        AnimesionError: an image cannot be read, or outputs are not finite; all processes raise it.
    """
    scores = TagScores(len(tags_of(data)))

    def add(outputs: Tensor, batch: Batch) -> None:
        scores.add(outputs, batch.indices)

    reading = _Reading(img_size, crop_pct, batch_size, precision, channels_last, workers, on_error, tta, advance)
    parts = _scored(model, data, split, normalise, context, reading, predict_tags, scores, add, lambda: None)
    if parts is not None:
        scores = TagScores(len(tags_of(data)))
        scores.extend(parts)
    return scores


def tags_of(data: DataSplits) -> TagLabels:
    """The tags of opened data.

    Raises:
        ValueError: it was opened without.
    """
    if data.tags is None:
        raise ValueError("the data was opened without tags")
    return data.tags


class _Reading(NamedTuple):
    """How a split is read and passed through a network; see `score`."""

    img_size: int
    crop_pct: float
    batch_size: int
    precision: str
    channels_last: bool
    workers: int | None
    on_error: str
    tta: TTA
    advance: Callable[[int], None]
    texts: Texts | None = None


def _scored(
    model: nn.Module,
    data: DataSplits,
    split: str,
    normalise: Augment,
    context: DistributedContext,
    reading: _Reading,
    forward: Callable[[Callable[[Tensor], Tensor], Tensor, int, TTA], Tensor],
    scores: S,
    add: Callable[[Tensor, Batch], None],
    finish: Callable[[], object],
) -> list[S] | None:
    """Pass a split through a network.

    Args:
        model: see `score`, and so for the following ones.
        data: the data.
        split: its name.
        normalise: from uint8 to the input of the model.
        context: of this process.
        reading: how the split is read.
        forward: `predict` or `predict_tags`.
        scores: that `add` adds to.
        add: called with what `forward` returns for each batch.
        finish: called at the end; may raise as `add` does.

    Returns:
        In the first of several processes, the scores of all of them; None in the others, and if there is one.
    """
    side, crop_pct = decoded_size(reading.tta, reading.img_size, reading.crop_pct)
    stream = Stream(
        data,
        split,
        reading.batch_size * context.world_size,
        side,
        train=False,
        transform=Resize(side, crop_pct),
        rank=context.rank,
        world_size=context.world_size,
        workers="auto" if reading.workers is None else reading.workers,
        on_error="skip" if reading.on_error == "skip" else "raise",
    )
    model.eval()
    problem = ""
    try:
        with torch.inference_mode():
            for batch in stream:
                images = normalise(
                    batch.images.to(context.device, non_blocking=True),
                    batch.seeds.to(context.device, non_blocking=True),
                )
                if not reading.channels_last:
                    images = images.contiguous()
                seen: Callable[[Tensor], Tensor] = model
                if reading.texts is not None:
                    text = reading.texts.text(batch.indices.cpu().numpy())
                    seen = partial(model, text=text.to(context.device))
                with autocast(reading.precision, context.device):
                    outputs = forward(seen, images, reading.img_size, reading.tta)
                add(outputs, batch)
                reading.advance(len(batch.labels))
        finish()
    except AnimesionError as error:
        if context.world_size == 1:
            raise
        problem = str(error)  # told to the others, which would wait for this process
    if context.world_size == 1:
        return None
    gathered = context.all_gather((None if problem else scores, problem))
    if problem := next((each for _, each in gathered if each), ""):
        raise AnimesionError(problem)
    return [part for part, _ in gathered if part is not None] if context.is_main else None


def as_rgb(values: tuple[float, ...]) -> tuple[float, float, float]:
    """Check that a mean or deviation is of three channels, and return it with that type.

    Raises:
        UsageError: another number of channels.
    """
    if len(values) != 3:
        raise UsageError(f"the model takes {len(values)} channels; images have 3")
    return values[0], values[1], values[2]


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
