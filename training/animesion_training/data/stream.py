"""Stream a split: threads decode its samples in the scheduled order.

Workers are threads, because the decoders release the interpreter lock and a batch is decoded in place and yielded
without a copy. Worker processes with the same decoder need more CPU time per image, to move batches between processes
(`tests/benchmarks/loader_throughput.py` measures both).
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from animesion.errors import UsageError
from animesion.executors import cores
from animesion.images.codec import RejectedImageError
from animesion_training.data import schedule, seeds
from animesion_training.data.decode import (
    Content,
    Pixels,
    RandomResizedCrop,
    Resize,
    Transform,
    decode_into,
    plain_jpeg,
)
from animesion_training.data.device_decode import check_decoder, decode_on_device
from animesion_training.data.positions import Batch, Failure, Scheduled, Share
from animesion_training.data.samples import DataSplits, Samples
from animesion_training.data.schedule import Last
from animesion_training.data.seeds import IntArray
from animesion_training.distributed import local_processes

_MOST_WORKERS = 16
_MOST_FAILURES = 100
#: Blocks that are downloaded before they are used, at least.
_LEAST_AHEAD = 64


class Stream(Scheduled):
    """Iterate over batches of a split, decoded on the fly; see `Scheduled` for order, ranks and resuming.

    The same seed gives identical batches for any number of workers.

    Args:
        data: the data, from `open_data`.
        split: name of the split.
        batch_size: samples of a batch, over all ranks.
        size: side of the images in pixels.
        train: whether to shuffle, sample and crop at random.
        transform: crop and size; by default `RandomResizedCrop` in training and `Resize` otherwise.
        sampling: `instance`, `class-balanced`, `square-root` or `progressive`.
        epochs: length of the run, for progressive sampling.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
        workers: decoding threads; 0 decodes in the calling thread, as worker processes of a `DataLoader` always do;
            `auto` is `default_workers`.
        prefetch: batches decoded ahead.
        on_error: `raise`, or `skip` samples that cannot be read, which makes their batches smaller or empty, and count
            them.
        window: blocks that are shuffled together, 0 for all; by default 0 for local data and 1 for remote data, where
            each rank then downloads its part of the blocks.
        pin_memory: whether batches are in page-locked memory, for a faster copy to the GPU; by default with CUDA.
        last: in training, `keep` the samples after the last full batch as a smaller one, `join` them to the batch
            before, or `drop` them.
        decoder: the GPU that decodes JPEGs, with slightly other pixels; None for the threads. Batches are then there.
        pairs: in training, batches of two samples or more, and for every sample its mirror image in the global batch
            on the same rank.
        together: in training, samples of a class that are together in a batch, see `schedule.class_runs`.
        partners: in training, whether each sample is followed by another one of its class, see `Scheduled`.
        neighbours: in training, whether every other sample of a batch is on the same rank as the next one.
        versions: in training, number of augmentations of a sample that epochs use in turn, see `Scheduled`.

    Raises:
        UsageError: an unknown split or sampling, a missing or truncated shard, or an argument out of range; while
            iterating, unless skipped, a sample that cannot be read.
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
        last: Last = "keep",
        pairs: bool = False,
        together: int = 1,
        partners: bool = False,
        neighbours: bool = False,
        versions: int = 0,
        decoder: torch.device | None = None,
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
            window=window,
            last=last,
            pairs=pairs,
            together=together,
            partners=partners,
            neighbours=neighbours,
            versions=versions,
        )
        self.transform = transform or (RandomResizedCrop(size) if train else Resize(size))
        if self.transform.size != size or size < 1:
            raise UsageError(
                f"the transform returns {self.transform.size} pixels, but size is {size}: use the same size"
            )
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
        self.workers = default_workers() if workers == "auto" else workers
        if self.workers < 0 or prefetch < 0:
            raise UsageError(f"workers ({workers}) and prefetch ({prefetch}) must be 0 or more")
        self.prefetch = prefetch
        self.on_error = on_error
        self.decoder = decoder
        if decoder is not None:
            check_decoder(decoder)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._pool: ThreadPoolExecutor | None = None
        self._pool_owner = 0
        if on_error == "raise":
            samples.check()

    def _batches(self) -> Generator[Batch]:
        # OpenCV's own threads would compete with the workers
        cv2.setNumThreads(1)
        # worker processes of a DataLoader cannot use the GPU; the loader pins what they send. Their new threads could
        # wait for ever for a lock of OpenCV that was held when they were forked
        own_process = get_worker_info() is None
        pin_memory = self.pin_memory and own_process
        fetches = self._fetches()
        fetch = next(fetches, None)

        def pending_batches() -> Iterator[_Pending]:
            nonlocal fetch
            for share in self._shares():
                # blocks that are due by the end of this batch
                while fetch is not None and fetch[0] < share.end:
                    self.samples.source.prefetch([fetch[1]])
                    fetch = next(fetches, None)
                yield _Pending(self.samples, self.transform, share, pin_memory, self.on_error, self.decoder)

        if self.workers == 0 or not own_process:
            for pending in pending_batches():
                yield from self._finish(pending, [pending.decode(0, len(pending.pixels))])
            return
        ahead: deque[tuple[_Pending, list[Future[list[Failure]]]]] = deque()
        following = pending_batches()
        pool = self._running_pool()
        try:
            while True:
                while len(ahead) <= self.prefetch and (pending := next(following, None)) is not None:  # type: ignore[assignment]
                    parts = self._parts(pending.share)
                    ahead.append((pending, [pool.submit(pending.decode, *part) for part in parts]))
                if not ahead:
                    break
                pending, futures = ahead.popleft()
                yield from self._finish(pending, [future.result() for future in futures])
        except BaseException:  # also GeneratorExit, when the loop over the stream ends early
            self.close()
            raise

    def _running_pool(self) -> ThreadPoolExecutor:
        # kept over epochs: new threads start with cold memory, which costs 6% of a short epoch
        # threads do not survive the fork of a worker process
        if self._pool is None or self._pool_owner != os.getpid():
            self._pool, self._pool_owner = ThreadPoolExecutor(self.workers, "animesion-decode"), os.getpid()
            self._end_pool = weakref.finalize(self, self._pool.shutdown, wait=True, cancel_futures=True)
        return self._pool

    def close(self) -> None:
        """Stop the threads; iterating starts new ones. Interrupted epochs and garbage collection do this too."""
        if self._pool is not None and self._pool_owner == os.getpid():
            self._end_pool()
        self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_end_pool"} | {"_pool": None}

    def _fetches(self) -> Iterator[tuple[int, int]]:
        """Yield (position in the epoch at which its download starts, block) for remote data, in the order of use.

        The blocks of the next epoch's first batches follow, if there is one.
        """
        if not self.samples.remote:
            return
        blocks, needed = self._first_uses(self._epoch, self._consumed)
        # as many as a batch uses at a time: all of them can end together
        ahead = max(_LEAST_AHEAD, int(np.searchsorted(needed, self._consumed + self.batch_size)))
        if self.train and self._epoch + 1 < self.epochs:
            more, then = self._first_uses(self._epoch + 1, 0)
            blocks = np.concatenate((blocks, more[:ahead]))
            needed = np.concatenate((needed, then[:ahead] + self.draws))
        due = np.concatenate((np.zeros(min(ahead, len(needed)), dtype=np.int64), needed[:-ahead]))
        yield from zip(due.tolist(), blocks.tolist(), strict=True)

    def _first_uses(self, epoch: int, consumed: int) -> tuple[IntArray, IntArray]:
        """Return this rank's blocks of the rest of an epoch, (M,), and the position of the first use of each, (M,)."""
        ends = self._ends(consumed)
        places = [
            schedule.share(start, end, self.rank, self.world_size, pairs=self.pairs, partners=self.neighbours)
            for start, end in zip([consumed, *ends.tolist()], ends.tolist(), strict=False)
        ]
        positions = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
        blocks, first = np.unique(self.samples.blocks[self.order(epoch)[positions]], return_index=True)
        turns = np.argsort(first)
        return blocks[turns], positions[first[turns]]

    def _parts(self, share: Share) -> list[tuple[int, int]]:
        """Divide a batch into slices for the threads, small enough that all threads finish at about the same time."""
        count = len(share.indices)
        step = max(1, min(16, -(-count // (2 * self.workers))))  # at least two slices per thread
        return [(start, min(start + step, count)) for start in range(0, count, step)]

    def _finish(self, pending: _Pending, results: Sequence[list[Failure]]) -> Generator[Batch]:
        failed = [failure for result in results for failure in result] + pending.decode_waiting()
        if failed and self.on_error == "raise":
            raise UsageError(failed[0].message)
        self.skipped += len(failed)
        self.failures += failed[: _MOST_FAILURES - len(self.failures)]
        batch = pending.batch()
        # before the yield, so that a checkpoint taken in the loop body counts this batch
        self._consumed = pending.share.end
        if len(batch.labels) or self.train:  # in training every rank has every batch, even if it is empty
            yield batch


class _Pending:
    """A batch that is being decoded in place; each thread writes its own rows."""

    def __init__(
        self,
        samples: Samples,
        transform: Transform,
        share: Share,
        pin_memory: bool,
        on_error: str,
        decoder: torch.device | None = None,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.share = share
        self.pin_memory = pin_memory
        # with `skip`, a shard may be cut while it is read, which only copies survive: see `Descriptor.view`
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
        self.decoder = decoder
        #: Row, sample, content and size of the JPEGs that are decoded on the device.
        self.waiting: list[tuple[int, int, Content, tuple[int, int]]] = []

    def decode(self, start: int, end: int) -> list[Failure]:
        """Decode rows from start to end; return the failures."""
        samples, transform, checked, failures = self.samples, self.transform, self.checked, []
        part = self.share.indices[start:end]
        # lists, because what Python does for an image is slow: its data were driven out of the caches by the one before
        columns = [each[part].tolist() for each in (samples.files, samples.offsets, samples.sizes, samples.plain)]
        numbers = self.numbers[start:end].tolist()
        rows = zip(self.pixels[start:end], part.tolist(), *columns, numbers, strict=True)
        for row, (out, index, file, offset, size, (width, height), u) in enumerate(rows, start):
            try:
                content = samples.read_at(index, file, offset, size, checked=checked)
                plain = (width, height) if width else plain_jpeg(content)
                if plain is not None and self.decoder is not None:
                    self.waiting.append((row, index, content, plain))
                else:
                    decode_into(out, content, transform, u, plain)
            except UsageError as error:
                failures.append(Failure(index, str(error)))
            except RejectedImageError as error:
                failures.append(_undecodable(samples, index, error))
            else:
                if not width and plain is not None and samples.digests is not None:
                    samples.plain[index] = plain
                continue
            self.missing.append(row)
        return failures

    def decode_waiting(self) -> list[Failure]:
        """Decode the rows that the threads have only read on the device; return the failures."""
        if self.decoder is None:
            return []
        failures: list[Failure] = []
        rows = [row for row, *_ in self.waiting]
        views = [self.transform.view(*size, self.numbers[row].tolist()) for row, _, _, size in self.waiting]
        try:
            decoded = decode_on_device([each[2] for each in self.waiting], views, self.transform.size, self.decoder)
        except RuntimeError:  # it does not say which file is at fault, and is less tolerant than the general decoder
            for row, index, content, size in self.waiting:
                try:
                    decode_into(self.pixels[row], content, self.transform, self.numbers[row].tolist(), size)
                except RejectedImageError as error:
                    failures.append(_undecodable(self.samples, index, error))
                    self.missing.append(row)
            self.images = self.images.to(self.decoder, non_blocking=True)
            return failures
        self.images = self.images.to(self.decoder, non_blocking=True)
        self.images[torch.tensor(rows, dtype=torch.int64, device=self.decoder)] = decoded
        return failures

    def batch(self) -> Batch:
        """Return the batch without the failed rows."""
        images: Tensor = self.images
        indices, places = self.share.indices, self.share.places
        hashes = self.share.seeds.view(np.int64)
        if self.missing:
            kept = np.setdiff1d(np.arange(len(indices)), self.missing)
            rows = torch.from_numpy(kept).to(images.device)
            images, indices, hashes = images[rows], indices[kept], hashes[kept]
            places = places[kept]
            images = images.pin_memory() if self.pin_memory and images.device.type == "cpu" else images
        numbers = (torch.from_numpy(row.copy()) for row in (self.samples.labels[indices], indices, hashes, places))
        # copies from memory that is not page-locked wait for the device
        labels, kept_indices, kept_seeds, kept_places = (
            each.pin_memory() if self.pin_memory else each for each in numbers
        )
        return Batch(images.permute(0, 3, 1, 2), labels, kept_indices, kept_seeds, kept_places, self.share.total)


def _undecodable(samples: Samples, index: int, error: RejectedImageError) -> Failure:
    return Failure(index, f"{samples.place(index)} does not decode ({error}): delete or replace the file")


def default_workers() -> int:
    """Return one thread per core that this process may use, shared with the other local ranks; at most 16."""
    return max(1, min(_MOST_WORKERS, cores() // local_processes()))
