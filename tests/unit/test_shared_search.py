"""The search for pairs in worker processes finds what one process finds, and what comparing every pair finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from animesion.dedup import joins, near
from animesion.errors import UsageError
from animesion.executors import Executor, make
from animesion.executors.shared import Shared, StoredArray, values


@pytest.fixture(scope="module")
def workers() -> Iterator[Executor]:
    with make("local", 2) as executor:
        yield executor


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few hashes are enough for workers, and for several ranges of keys."""
    for module in (near, joins):
        monkeypatch.setattr(module, "SHARED_FROM", 0)
    monkeypatch.setattr(near, "JOB_HASHES", 700)
    monkeypatch.setattr(joins, "JOB_WINDOWS", 50)


def skewed(n: int, seed: int) -> near.HashArray:
    """Hashes of which a third have the same low half, and a third are within nine bits of another one."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    hashes[: n // 3] &= np.uint64(0xFFFFFFFF00000000)
    for i in range(0, n, 3):
        flips = rng.choice(64, rng.integers(0, 10), replace=False)
        hashes[i] = hashes[rng.integers(0, n)] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    return rng.permutation(hashes)


def every_pair(hashes: near.HashArray, radius: int) -> list[list[int]]:
    close = np.bitwise_count(hashes[:, None] ^ hashes) <= radius
    found: list[list[int]] = np.argwhere(np.triu(close, 1)).tolist()
    return found


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("radius", [0, 2, 4, 8])
def test_workers_find_all_near_pairs(workers: Executor, tmp_path: Path, radius: int) -> None:
    hashes = skewed(5000, radius)
    due = every_pair(hashes, radius)
    assert len(due) > 100
    assert near.near_pairs(hashes, radius, Shared(workers, tmp_path)).tolist() == due
    assert near.near_pairs(hashes, radius).tolist() == due
    assert not list(tmp_path.iterdir())  # the hashes were stored for the workers only


@pytest.mark.parametrize("agreeing", range(1, 7))
def test_each_pair_is_of_one_job(agreeing: int) -> None:
    hashes = skewed(400, agreeing)
    jobs = near.near_jobs(hashes, hashes, 8, agreeing, 100)
    assert len({job.keys for job in jobs}) > 1
    codes = np.sort(np.concatenate([job.run() for job in jobs])).tolist()
    assert codes == [400 * i + j for i, j in every_pair(hashes, 8)]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("portable", [False, True])
def test_workers_find_all_windows(
    workers: Executor, tmp_path: Path, portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    hashes[100:400] = hashes[0]  # a crowd, which is compared with its neighbours only
    windows = rng.integers(0, 2**64, (400, 7), dtype=np.uint64)
    windows[50:90, 3] = hashes[10:50] ^ np.uint64(0b1011)
    windows[200, 2] = windows[200, 5] = hashes[205] ^ np.uint64(1)
    if portable:
        monkeypatch.setattr(joins, "compiled", None)
    pairs, nearest = joins.window_pairs(hashes, windows, 8, Shared(workers, tmp_path))
    found = {(i, j): w for (i, j), w in zip(pairs.tolist(), nearest.tolist(), strict=True)}
    planted = {(i, i + 40): 3 for i in range(10, 50)}
    # the first of the crowd is compared with all, the others with the 64 before and after
    crowd = {(i, 200): 2 for i in (0, *range(136, 265)) if i != 200}
    assert found == planted | crowd
    alone = joins.window_pairs(hashes, windows, 8)
    assert np.array_equal(pairs, alone[0])
    assert np.array_equal(nearest, alone[1])


def test_stored_arrays_are_read_as_they_were(workers: Executor, tmp_path: Path) -> None:
    arrays: list[npt.NDArray[np.generic]] = [
        np.arange(12, dtype=np.uint16).reshape(3, 4),
        np.empty((0, 5), dtype=np.float32),
        np.arange(10)[::3],
    ]
    shared = Shared(workers, tmp_path)
    with shared.stored(*arrays) as stored:
        for given, kept in zip(arrays, stored, strict=True):
            assert isinstance(kept, StoredArray)
            read = values(kept)
            assert (read.dtype, read.shape, read.tolist()) == (given.dtype, given.shape, given.tolist())
    with pytest.raises(UsageError, match="stop"), shared.stored(*arrays):
        raise UsageError("stop")
    assert not list(tmp_path.iterdir())
