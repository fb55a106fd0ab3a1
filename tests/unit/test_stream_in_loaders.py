"""The streams as datasets of torch's and torchdata's loaders."""

from __future__ import annotations

import io
import pickle
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from animesion_training.data import Batch, Stream
from tests.ranks import drawn

DATA = drawn(23)


def stream(epoch: int = 0, **settings: Any) -> Stream:
    made = Stream(DATA, "train", 4, 16, seed=3, **{"workers": 0, "sampling": "square-root", **settings})
    made.set_epoch(epoch)
    return made


def indices(batches: Any) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


@pytest.mark.parametrize(("processes", "threads"), [(0, 2), (2, 0), (2, 1)])
def test_worker_processes_return_the_batches_of_the_stream(processes: int, threads: int) -> None:
    mine = stream(workers=threads)
    if processes and threads:
        next(iter(mine))  # its threads do not survive the fork
        mine = pickle.loads(pickle.dumps(mine))
        mine.set_epoch(1)
        mine.set_epoch(0)
    # a fork may copy a lock that a thread holds: fail instead of waiting for ever
    loader: Any = DataLoader(mine, batch_size=None, num_workers=processes, timeout=120 if processes else 0)
    batches = list(loader)
    assert all(isinstance(batch, Batch) for batch in batches)
    assert indices(batches) == indices(stream())
    mine.set_epoch(1)
    expected = list(stream(1))
    for ours, theirs in zip(loader, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert ours.seeds.tolist() == theirs.seeds.tolist()


@pytest.mark.filterwarnings("ignore")  # of torchdata, about torch and the number of cores
@pytest.mark.parametrize(("processes", "threads"), [(0, 2), (2, 0)])
@pytest.mark.parametrize("done", [1, 3, 5])
def test_torchdata_resumes_the_stream(processes: int, threads: int, done: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return stateful.StatefulDataLoader(stream(workers=threads), batch_size=None, num_workers=processes)

    expected, first = indices(stream()), loader()
    seen = indices(islice(first, done))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = loader()
    second.load_state_dict(torch.load(file, weights_only=False))
    assert seen + indices(second) == expected
    second.dataset.set_epoch(1)
    assert indices(second) == indices(stream(1))
