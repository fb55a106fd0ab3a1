"""The stream: samples of a split, decoded by a pool of threads, in the scheduled order.

Threads are the only kind of worker: the decoders release the interpreter lock, a batch is decoded in place and handed
over without a copy. Worker processes with the same decoder cost more processor time an image, for moving batches
between processes (`tests/benchmarks/loader_throughput.py` prints both).
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion.executors import cores
from animesion.images.codec import RejectedImageError
from animesion_training.data import seeds
from animesion_training.data.decode import Pixels, RandomResizedCrop, Resize, Transform, decode_into
from animesion_training.data.positions import Batch, Scheduled, Share
from animesion_training.data.samples import DataSplits, Samples
from animesion_training.data.seeds import IntArray

_MOST_WORKERS = 16
_REMEMBERED = 100


class Failure(NamedTuple):
    """A sample that was skipped, and why."""

    sample: int
    message: str


class Stream(Scheduled):
    """Batches of a split, decoded on the fly; see `Scheduled` for order, ranks and resuming.

    The same seed gives the same batches, to the bit, for any number of workers.

    Args:
        data: what `open_data` gives.
        split: name of the split.
        batch_size: samples of a batch of one rank.
        size: side of the images in pixels.
        train: shuffle, sample and crop at random.
        transform: what part of each image; by default `RandomResizedCrop` in training and `Resize` otherwise.
        sampling: `instance`, `class-balanced`, `square-root` or `progressive`.
        epochs: of the run; progressive sampling goes by it.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
        workers: decoding threads; 0 decodes in the calling thread; `auto` is a thread for each core that this process
            may use, shared with the other ranks on the machine, 16 at most.
        prefetch: batches decoded ahead.
        on_error: `raise`, or `skip` a sample that cannot be read: its batch gets smaller, and it is counted.
        window: shards that are read at a time; by default all when local, 8 when remote.
        pin_memory: page-locked batches, for a faster copy to the GPU; by default where there is CUDA.

    Attributes:
        skipped: samples skipped since the stream was made.
        failures: the first 100 of them.

    Raises:
        UsageError: no such split or sampling, a shard is missing or cut, an argument is out of range; while iterating
            (unless skipped) a sample that cannot be read, naming its key and shard.
    """

    def __init__(
        self,
        data: DataSplits,
        split: str,
        batch_size: int,
        size: int,
        *,
        train: bool = True,
        transform: Transform | None = None,
        sampling: str = "instance",
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int | Literal["auto"] = "auto",
        prefetch: int = 2,
        on_error: Literal["raise", "skip"] = "raise",
        window: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        samples = data.select(split)
        super().__init__(
            samples,
            data.num_classes,
            batch_size=batch_size,
            train=train,
            sampling=sampling,
            epochs=epochs,
            seed=seed,
            rank=rank,
            world_size=world_size,
            window=(8 if samples.remote else 0) if window is None else window,
        )
        self.transform = transform or (RandomResizedCrop(size) if train else Resize(size))
        if self.transform.size != size or size < 1:
            raise UsageError(f"the transform gives {self.transform.size} pixels where {size} were asked; use one size")
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        self.workers = default_workers() if workers == "auto" else workers
        if self.workers < 0 or prefetch < 0:
            raise UsageError(f"workers ({workers}) and prefetch ({prefetch}) are 0 or more")
        self.prefetch = prefetch
        self.on_error = on_error
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.skipped = 0
        self.failures: list[Failure] = []
        self._pool: ThreadPoolExecutor | None = None
        if on_error == "raise":
            samples.check()

    def _batches(self) -> Generator[Batch]:
        # OpenCV's own threads would fight with ours
        cv2.setNumThreads(1)
        if self.workers == 0:
            for share in self._shares():
                pending = _Pending(self.samples, self.transform, share, self.pin_memory, self.on_error)
                yield from self._handed(pending, [pending.decode(0, len(pending.pixels))])
            return
        ahead: deque[tuple[_Pending, list[Future[list[Failure]]]]] = deque()
        shares, fetches = self._shares(), self._fetches()
        fetch = next(fetches, None)
        pool = self._running_pool()
        try:
            while True:
                while len(ahead) <= self.prefetch and (following := next(shares, None)) is not None:
                    pending = _Pending(self.samples, self.transform, following, self.pin_memory, self.on_error)
                    while fetch is not None and fetch[0] < following.end:
                        self.samples.source.ahead([fetch[1]])
                        fetch = next(fetches, None)
                    ahead.append((pending, [pool.submit(pending.decode, *part) for part in self._parts(following)]))
                if not ahead:
                    break
                pending, futures = ahead.popleft()
                yield from self._handed(pending, [future.result() for future in futures])
        except BaseException:
            self.close()
            raise

    def _running_pool(self) -> ThreadPoolExecutor:
        # kept from epoch to epoch: new threads start with cold memory, 6% of a short epoch
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, "animesion-decode")
            self._end_pool = weakref.finalize(self, self._pool.shutdown, wait=True, cancel_futures=True)
        return self._pool

    def close(self) -> None:
        """End the threads, as breaking off an epoch or dropping the stream does; iterating starts new ones."""
        if self._pool is not None:
            self._end_pool()
            self._pool = None

    def _fetches(self) -> Iterator[tuple[int, int]]:
        """Remote shards in the order of need, each with the place in the epoch at which to begin fetching it."""
        if not self.samples.remote:
            return
        files, first = np.unique(self.samples.files[self.order()[self._consumed :]], return_index=True)
        turns = np.argsort(first)
        needed = (first[turns] + self._consumed).tolist()
        ahead = max(2, self.window)
        for turn, file in enumerate(files[turns].tolist()):
            yield (needed[turn - ahead] if turn >= ahead else 0), file

    def _parts(self, share: Share) -> list[tuple[int, int]]:
        """Stretches of a batch that one thread decodes: small enough that all threads end together."""
        count = len(share.indices)
        step = max(1, min(16, -(-count // (2 * self.workers))))
        return [(start, min(start + step, count)) for start in range(0, count, step)]

    def _handed(self, pending: _Pending, results: Sequence[list[Failure]]) -> Generator[Batch]:
        failed = [failure for result in results for failure in result]
        if failed and self.on_error == "raise":
            raise UsageError(failed[0].message)
        self.skipped += len(failed)
        self.failures += failed[: _REMEMBERED - len(self.failures)]
        batch = pending.batch()
        if not len(batch.labels) and self.train:
            raise UsageError(f"not one of the {len(failed)} samples of a batch can be read; first, {failed[0].message}")
        self._consumed = pending.share.end
        if len(batch.labels):
            yield batch


class _Pending:
    """A batch being decoded, in place; different threads write different rows."""

    def __init__(self, samples: Samples, transform: Transform, share: Share, pin_memory: bool, on_error: str) -> None:
        self.samples = samples
        self.transform = transform
        self.share = share
        # where damage is to be skipped, shards may change under us at any time, and reading must survive it
        self.checked = on_error == "raise"
        if self.checked:
            samples.check(share.indices)
        side, count = transform.size, len(share.indices)
        if pin_memory:
            self.images = torch.empty((count, side, side, 3), dtype=torch.uint8, pin_memory=True)
            self.pixels: Pixels = self.images.numpy()
        else:  # numpy asks for large pages, which halves the cost of fresh memory
            self.pixels = np.empty((count, side, side, 3), dtype=np.uint8)
            self.images = torch.from_numpy(self.pixels)
        self.numbers = seeds.uniforms(share.seeds, transform.numbers, seeds.CROP)
        self.missing: list[int] = []

    def decode(self, start: int, end: int) -> list[Failure]:
        """Decode some rows; gives those that failed."""
        failures = []
        numbers = self.numbers[start:end].tolist()
        for row, index, u in zip(range(start, end), self.share.indices[start:end].tolist(), numbers, strict=True):
            try:
                decode_into(self.pixels[row], self.samples.read(index, checked=self.checked), self.transform, u)
            except UsageError as error:
                failures.append(Failure(index, str(error)))
            except RejectedImageError as error:
                message = f"{self.samples.place(index)} does not decode ({error}); delete it or put a sound file there"
                failures.append(Failure(index, message))
            else:
                continue
            self.missing.append(row)
        return failures

    def batch(self) -> Batch:
        """The batch, less what failed."""
        images: Tensor = self.images
        indices: IntArray = self.share.indices
        hashes = self.share.seeds.view(np.int64)
        if self.missing:
            kept = np.setdiff1d(np.arange(len(indices)), self.missing)
            images, indices, hashes = images[torch.from_numpy(kept)], indices[kept], hashes[kept]
        labels = self.samples.labels[indices]
        return Batch(
            images.permute(0, 3, 1, 2),
            torch.from_numpy(labels),
            torch.from_numpy(indices.copy()),
            torch.from_numpy(hashes.copy()),
        )


def default_workers() -> int:
    """A thread for each core that this process may use, shared with the other ranks on the machine; 16 at most."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(_MOST_WORKERS, cores() // max(1, int(local) if local.isdecimal() else 1)))
