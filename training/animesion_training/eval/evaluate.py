"""Run a model over a split, each sample once over all processes; what comes out is judged in `metrics`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from animesion.errors import UsageError
from animesion.storage.workspace import write_atomic
from animesion_training.data import Augment, DataSplits, Resize, Stream
from animesion_training.engine.distributed import DistributedContext
from animesion_training.eval import report
from animesion_training.eval.metrics import Evaluation, evaluate
from animesion_training.eval.scores import Scores

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def computed_in(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast to `bf16` or `fp16`; nothing for `fp32`."""
    if precision == "fp32":
        yield
    else:
        with torch.autocast(device.type, _PRECISIONS[precision]):
            yield


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
    advance: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Scores of every sample of a split, complete in the first process.

    Args:
        model: in any mode; it is put into evaluation mode.
        data: where the split is.
        split: its name.
        normalise: from uint8 to what the model takes, without chance.
        context: this process.
        img_size: side of the input in pixels; images are resized to a square.
        crop_pct: share of that square's side that is looked at; see `Resize`.
        batch_size: samples a batch of one process.
        precision: `fp32`, `bf16` or `fp16`.
        channels_last: memory format of the input.
        workers: decoding threads; None for one a core.
        on_error: `raise`, or `skip` what cannot be read.
        advance: told how many samples were done.
    """
    stream = Stream(
        data,
        split,
        batch_size,
        img_size,
        train=False,
        transform=Resize(img_size, crop_pct),
        rank=context.rank,
        world_size=context.world_size,
        workers="auto" if workers is None else workers,
        on_error="skip" if on_error == "skip" else "raise",
    )
    model.eval()
    scores = Scores(data.num_classes)
    with torch.inference_mode():
        for batch in stream:
            images = normalise(batch.images.to(context.device, non_blocking=True), batch.seeds.to(context.device))
            if not channels_last:
                images = images.contiguous()
            with computed_in(precision, context.device):
                logits = model(images)
            scores.add(logits.float(), batch.labels, batch.indices)
            advance(len(batch.labels))
    if context.world_size > 1:
        parts = context.gathered(scores)
        if context.is_main:
            scores = Scores(data.num_classes)
            scores.extend(parts)
    return scores


def three(values: tuple[float, ...]) -> tuple[float, float, float]:
    """Mean or deviation of the three channels.

    Raises:
        UsageError: the model takes another number of channels.
    """
    if len(values) != 3:
        raise UsageError(f"the model takes {len(values)} channels; images have 3")
    return values[0], values[1], values[2]


def judged(
    scores: Scores, data: DataSplits, split: str, train_counts: Any = None, *, complete: bool = True
) -> Evaluation:
    """Every metric of a scored split.

    Args:
        scores: from `score`, in the first process.
        data: what was scored.
        split: its name.
        train_counts: training images of each class, for the bands.
        complete: whether every sample of the split must have been scored.
    """
    expected = len(data.select(split)) if complete else None
    return evaluate(scores, names=data.classes, train_counts=train_counts, expected=expected)


def train_counts(data: DataSplits, split: str = "train") -> Any:
    """Images of each class in the training split, shape (classes,); None when the data has no such split."""
    if split not in data.splits:
        return None
    return np.bincount(data.splits[split].labels, minlength=data.num_classes)


def check_classes(expected: tuple[str, ...], data: DataSplits, what: str) -> None:
    """Refuse data whose class map is not the model's.

    Raises:
        UsageError: it names the first difference.
    """
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


def write_report(
    folder: Path, evaluation: Evaluation, facts: dict[str, Any], scores: Scores, data: DataSplits, split: str
) -> None:
    """Write `evaluation.json`, `per_class.csv`, `confusions.csv` and `mistakes.csv` into a folder."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    document = {**facts, **report.as_json(evaluation)}
    write_atomic(folder / "evaluation.json", (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(folder / "per_class.csv", report.per_class_csv(evaluation).encode())
    write_atomic(folder / "confusions.csv", report.confusions_csv(evaluation).encode())
    mistakes = report.mistakes_csv(scores, data.select(split).keys, data.classes)
    # a file's name, which a key can be, is not always UTF-8
    write_atomic(folder / "mistakes.csv", mistakes.encode("utf-8", "backslashreplace"))
