"""Batches on the device, and the position behind each, also where the next one is copied ahead."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from animesion_training.data import Stream
from animesion_training.engine.feed import feed
from tests import ranks


def stream() -> Stream:
    return Stream(ranks.drawn(10), "train", 3, 16, workers=0, seed=4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_resumes_behind_the_batch_that_was_computed(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    events: list[str] = []
    if device == "cuda":  # the order of the calls, with tensors that stay where they are

        def note(event: str) -> contextlib.AbstractContextManager[None]:
            events.append(event)
            return contextlib.nullcontext()

        side = SimpleNamespace(record_event=lambda: note("record"))
        main = SimpleNamespace(wait_event=lambda event: note("wait"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: note("copy"))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    seen: list[list[int]] = []
    positions: list[dict[str, Any]] = []
    for batch, position in feed(stream(), torch.device(device)):
        events.append("compute")
        seen.append(batch.indices.tolist())
        positions.append(position)
    assert [len(indices) for indices in seen] == [3, 3, 3, 1]
    assert sorted(i for indices in seen for i in indices) == list(range(10))
    for done, position in enumerate(positions, 1):
        resumed = stream()
        resumed.load_state_dict(position)
        assert [batch.indices.tolist() for batch in resumed] == seen[done:]
    if device == "cuda":
        # every batch but the first is copied before the one before it is computed
        one = ["record", "copy", "wait", "compute"]
        assert events == ["record", "copy", *one * 3, "record", "wait", "compute"]
