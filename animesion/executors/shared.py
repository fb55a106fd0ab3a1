"""Arrays that all workers of an executor read from one file, so that a job carries a path and not the values."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from animesion.executors.base import Executor, Job


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
        path: the file, which has the values in C order and nothing else.
        dtype: type of the values, as `numpy.dtype` takes it.
        shape: of the array.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shared:
    """An executor, and a folder that its workers see under the same path.

    Attributes:
        executor: runs the jobs.
        folder: an existing folder with room for the arrays.
    """

    executor: Executor
    folder: Path

    @contextlib.contextmanager
    def stored(self, *arrays: npt.NDArray[Any]) -> Iterator[list[StoredArray]]:
        """Write arrays to files, which are deleted on exit."""
        with tempfile.TemporaryDirectory(prefix=".tmp-arrays-", dir=self.folder.resolve()) as folder:
            found = []
            for number, array in enumerate(arrays):
                path = Path(folder) / str(number)
                with path.open("wb") as file:
                    # not `tofile`, whose error on a full disk does not say so
                    file.write(np.ascontiguousarray(array).data)
                found.append(StoredArray(path, array.dtype.str, array.shape))
            yield found

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Run some jobs; returns their results in the order of the jobs."""
        found: dict[int, Any] = {}
        self.executor.run(jobs, lambda job, result: found.__setitem__(id(job), result))
        return [found[id(job)] for job in jobs]


def values(given: StoredArray | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array; a stored one is mapped into memory, and only the pages that are read take any."""
    if not isinstance(given, StoredArray):
        return given
    if 0 in given.shape:  # a file without bytes cannot be mapped
        return np.empty(given.shape, given.dtype)
    return np.memmap(given.path, given.dtype, "r", shape=given.shape)
