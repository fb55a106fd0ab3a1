"""The streams as datasets of torch's and torchdata's loaders."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

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


def test_worker_processes_have_no_threads_of_their_own() -> None:
    class Threads(IterableDataset[list[str]]):
        def __iter__(self) -> Iterator[list[str]]:
            for _ in stream(workers=2):
                yield [each.name for each in threading.enumerate() if each.name.startswith("animesion-decode")]

    batches = len(indices(stream()))
    loader: Any = DataLoader(Threads(), batch_size=None, num_workers=1, timeout=120)
    assert list(loader) == [[]] * batches
    assert any(list(Threads()))  # in the own process there are


def test_a_process_forked_after_opencv_ran_threads_can_use_it() -> None:
    """Without the preparation of `decode`, some of 60 forks wait for ever."""
    script = """
        import os, signal, time
        import animesion_training.data.decode
        import cv2
        import numpy as np
        image = np.zeros((1200, 1200, 3), np.uint8)
        stuck = 0
        for _ in range(60):
            cv2.setNumThreads(2)
            cv2.resize(image, (600, 600), interpolation=cv2.INTER_AREA)
            time.sleep(0.02)  # its threads wait for work
            child = os.fork()
            if child == 0:
                signal.alarm(5)
                cv2.setNumThreads(1)
                cv2.resize(image, (600, 600), interpolation=cv2.INTER_AREA)
                os._exit(0)
            stuck += os.waitpid(child, 0)[1] != 0
            assert cv2.getNumThreads() == 2
            if stuck:
                break
        print(stuck)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "0", done.stderr


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
