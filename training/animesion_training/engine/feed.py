"""Batches on the device, each with its texts if there are any, and the position of the stream behind it.

On a GPU, the next batch is copied on a stream of its own while the current one is computed. The position is that of the
batch that is computed, not of the one that is copied ahead, so a checkpoint loses no batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from animesion_training.data import Batch
from animesion_training.data.positions import Scheduled
from animesion_training.text.tokenizer import Texts


class Fed(NamedTuple):
    """A batch on the device, and the state of the stream behind it."""

    batch: Batch
    position: dict[str, Any]


def feed(stream: Scheduled, device: torch.device, texts: Texts | None = None) -> Iterator[Fed]:
    """Yield the batches of the rest of an epoch on the device.

    Args:
        stream: of the batches.
        device: where they are needed.
        texts: of the samples of the split, for a network that reads them.
    """
    if device.type == "cuda":
        yield from _copied_ahead(stream, device, texts)
        return
    for batch in stream:
        yield Fed(_to(_with_text(batch, texts), device), stream.state_dict())


def _with_text(batch: Batch, texts: Texts | None) -> Batch:
    """The batch with the texts of its samples, whose order its seeds decide."""
    if texts is None:
        return batch
    rows, sample_seeds = (each.cpu().numpy() for each in (batch.indices, batch.seeds))
    text = texts.text(rows, sample_seeds)
    # copies from memory that is not page-locked wait for the device
    return batch._replace(text=text.pin_memory() if batch.labels.is_pinned() else text)


def _copied_ahead(stream: Scheduled, device: torch.device, texts: Texts | None) -> Iterator[Fed]:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: Fed | None = None
    for batch in stream:
        # recorded before the copy of this batch, so waiting for it does not wait for this copy
        done = side.record_event()
        with torch.cuda.stream(side):
            following = Fed(_to(_with_text(batch, texts), device), stream.state_dict())
        if waiting is not None:
            yield _handed_over(waiting, done, device)
        waiting = following
    if waiting is not None:
        yield _handed_over(waiting, side.record_event(), device)


def _handed_over(fed: Fed, done: torch.cuda.Event, device: torch.device) -> Fed:
    """Make the computing stream wait for the copy, and keep its memory until that stream is through with it."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(done)
    for each in fed.batch:
        if isinstance(each, torch.Tensor):
            each.record_stream(computing)
    return fed


def _to(batch: Batch, device: torch.device) -> Batch:
    moved: dict[str, Any] = {
        name: each.to(device, non_blocking=True)
        for name, each in batch._asdict().items()
        if isinstance(each, torch.Tensor)
    }
    return batch._replace(**moved)
