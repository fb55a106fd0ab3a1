"""Cache datasets that fit into memory: decode once, then crop batches from a resident tensor on the device.

Schedule, positions and state are those of `Stream`, so a run can be resumed with the other of the two. Images are
stretched to squares, and the crops undo that. The squares are 1.15 times as large as the training size by default: a
crop of the whole image loses nothing, a small crop is slightly softer than one from the file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion.images.codec import RejectedImageError
from animesion_training.data import seeds, shared_memory
from animesion_training.data.augment import random_boxes, resample_boxes
from animesion_training.data.decode import (
    Pixels,
    RandomResizedCrop,
    Resize,
    ResizeCenterCrop,
    ResizeRandomCrop,
    Transform,
    decode_into,
)
from animesion_training.data.positions import Batch, Scheduled
from animesion_training.data.samples import DataSplits, Samples
from animesion_training.data.schedule import Last
from animesion_training.data.stream import default_workers
from animesion_training.distributed import DistributedContext, local_processes

_OVERSIZE = 1.15
_PROBED = 256
_PLACE = 105


@dataclass(frozen=True, eq=False)
class Resident:
    """The decoded images of a split.

    Attributes:
        images: shape (N, side, side, 3), uint8.
        aspects: width / height of the original images, shape (N,), float32.
        labels: class ids, shape (N,), int64.
        samples: the samples that were decoded.
        num_classes: classes in the map.
    """

    images: Tensor
    aspects: Tensor
    labels: Tensor
    samples: Samples
    num_classes: int


def stored_side(samples: Samples, size: int) -> int:
    """Choose the side of the cached squares.

    It is 1.15 times the training size, but at most the longest side among 256 probed images, and at least the training
    size.

    Raises:
        UsageError: one of the images cannot be read.
    """
    longest = 0
    probe = np.empty((1, 1, 3), dtype=np.uint8)
    for i in np.unique(np.linspace(0, len(samples) - 1, min(_PROBED, len(samples)), dtype=np.int64)).tolist():
        longest = max(longest, *_decode(samples, i, probe, Resize(1)))
    return max(size, min(math.ceil(size * _OVERSIZE), longest))


def cache_samples(
    data: DataSplits,
    split: str,
    size: int,
    *,
    where: Literal["ram", "device"] = "ram",
    device: torch.device | str = "cpu",
    side: int | None = None,
    most_bytes: int | None = None,
    workers: int | Literal["auto"] = "auto",
    notify: Callable[[str], None] = print,
    context: DistributedContext | None = None,
) -> Resident:
    """Decode a split into memory.

    In RAM, the processes of a machine share one copy, and each decodes a part of it.

    Args:
        data: the data, from `open_data`.
        split: name of the split.
        size: side of the images in batches, in pixels.
        where: `ram`, or `device` to store the images on the device.
        device: the training device.
        side: side of the cached squares; by default `stored_side`.
        most_bytes: upper limit; by default half of the free memory.
        workers: decoding threads.
        notify: called with a message that states the size, before memory is allocated.
        context: of this process, where several train together; all of them must call this function.

    Raises:
        UsageError: the split does not fit, or an image cannot be read.
    """
    samples = data.select(split)
    target = torch.device(device) if where == "device" else torch.device("cpu")
    sharing = context if where == "ram" and context and min(context.world_size, local_processes()) > 1 else None
    with _failing_together(sharing):
        samples.check()
        side = side or stored_side(samples, size)
        memory = "RAM" if target.type == "cpu" else str(target)
        needed = len(samples) * side * side * 3
        bound = _free_bytes(target) // 2 if most_bytes is None else most_bytes
        facts = f"{len(samples):,} images of {side} px take {needed / 1e9:.2f} GB"
        if needed > bound:
            raise UsageError(
                f"cannot cache the split '{split}': {facts} of {memory} and {bound / 1e9:.2f} GB "
                "are allowed; stream it (without --cache), or raise the limit"
            )
        once = f", once for the {local_processes()} processes of a machine" if sharing else ""
        notify(f"caching the split '{split}': {facts} of {memory}{once}")
    shape = (len(samples), side, side, 3)
    if sharing is None:
        images = torch.empty(shape, dtype=torch.uint8, device=target)
        aspects = torch.empty(len(samples), dtype=torch.float32)
        rows = range(len(samples))
    else:
        images, aspects = shared_memory.tensors(sharing, (shape, torch.uint8), (shape[:1], torch.float32))
        # all have mapped the memory when they leave the block, and have filled it when they leave the next one
        rows = shared_memory.part(len(samples))
    with _failing_together(sharing):
        _fill(images, aspects, samples, rows, default_workers() if workers == "auto" else workers)
    labels = torch.from_numpy(samples.labels.copy())
    return Resident(images, aspects.to(target), labels.to(target), samples, data.num_classes)


def _fill(images: Tensor, aspects: Tensor, samples: Samples, rows: range, workers: int) -> None:
    """Decode some rows of a split."""
    side, step = images.shape[1], 512
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(max(1, workers), "animesion-decode") as pool:
        for start in range(rows.start, rows.stop, step):
            # a device is filled from a small buffer: the whole split need not fit into RAM
            end = min(start + step, rows.stop)
            part = images[start:end]
            buffer = part if part.device.type == "cpu" else torch.empty(part.shape, dtype=torch.uint8)
            pixels: Pixels = buffer.numpy()
            sizes = pool.map(
                lambda row, pixels=pixels, start=start: _decode(samples, start + row, pixels[row], Resize(side)),
                range(len(part)),
            )
            aspects[start:end] = torch.tensor([width / height for width, height in sizes])
            if buffer is not part:
                part.copy_(buffer)


@contextlib.contextmanager
def _failing_together(context: DistributedContext | None) -> Iterator[None]:
    """Let all processes raise what one of them raises: otherwise the others wait for it forever."""
    if context is None:
        yield
        return
    problem = None
    try:
        yield
    except UsageError as error:
        problem = str(error)
    if problem := next(filter(None, context.all_gather(problem)), None):
        raise UsageError(problem)


class CachedStream(Scheduled):
    """Iterate over batches of a cached split, on the training device; see `Scheduled` for order, ranks and resuming.

    Args:
        resident: the decoded split, from `cache_samples`.
        batch_size: samples of a batch, over all ranks.
        size: side of the images in pixels.
        device: the training device, where batches are made.
        train: whether to shuffle, sample and crop at random.
        transform: as for `Stream`; computed on the device, antialiased.
        sampling: as for `Stream`.
        epochs: length of the run, for progressive sampling.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
        window: as for `Stream`.
        last: as for `Stream`.
        pairs: as for `Stream`.
        together: as for `Stream`.
        partners: as for `Stream`.
        neighbours: as for `Stream`.
        versions: as for `Stream`.

    Raises:
        UsageError: an argument is out of range, or an unknown sampling.
    """

    def __init__(
        self,
        resident: Resident,
        batch_size: int,
        size: int,
        *,
        device: torch.device | str = "cpu",
        train: bool = True,
        transform: Transform | None = None,
        sampling: str = "instance",
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int | None = None,
        last: Last = "keep",
        pairs: bool = False,
        together: int = 1,
        partners: bool = False,
        neighbours: bool = False,
        versions: int = 0,
    ) -> None:
        super().__init__(
            resident.samples,
            resident.num_classes,
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
        self.resident = resident
        self.device = torch.device(device)
        self.transform = transform or (RandomResizedCrop(size) if train else Resize(size))
        if self.transform.size != size:
            raise UsageError(
                f"the transform returns {self.transform.size} pixels, but size is {size}: use the same size"
            )
        if not isinstance(self.transform, (RandomResizedCrop, Resize, ResizeCenterCrop, ResizeRandomCrop)):
            raise UsageError(f"--cache does not support {type(self.transform).__name__}: stream instead")

    def _batches(self) -> Generator[Batch]:
        home = self.resident.images.device  # rows are selected where the cache is, and the batch is moved
        for share in self._shares():
            rows = torch.from_numpy(share.indices.copy()).to(home, non_blocking=True)
            # torch has no uint64 arithmetic: the bits of the hashes as int64
            sample_seeds = torch.from_numpy(share.seeds.view(np.int64).copy()).to(self.device, non_blocking=True)
            stored = self.resident.images.index_select(0, rows).to(self.device, non_blocking=True)
            aspects = self.resident.aspects.index_select(0, rows).to(self.device, non_blocking=True)
            images = view_on_device(self.transform, stored, aspects, sample_seeds)
            labels = self.resident.labels.index_select(0, rows).to(self.device, non_blocking=True)
            places = torch.from_numpy(share.places.copy()).to(self.device, non_blocking=True)
            self._consumed = share.end
            yield Batch(images, labels, rows.to(self.device, non_blocking=True), sample_seeds, places, share.total)


def view_on_device(transform: Transform, images: Tensor, aspects: Tensor, sample_seeds: Tensor) -> Tensor:
    """Apply a transform to a batch of images that are stored as squares.

    Args:
        transform: one of `decode`.
        images: shape (B, side, side, 3), uint8.
        aspects: width / height of the original images, shape (B,).
        sample_seeds: shape (B,), int64.

    Returns:
        Shape (B, 3, S, S), uint8, channels-last in memory.
    """
    size, batch, side = transform.size, len(images), images.shape[1]
    if isinstance(transform, RandomResizedCrop):
        boxes = random_boxes(sample_seeds, aspects, transform.scale, transform.ratio)
    elif isinstance(transform, ResizeRandomCrop):
        places = (seeds.tensor_uniforms(sample_seeds, 2, _PLACE) * (transform.margin + 1)).floor()
        whole = size + transform.margin
        share = torch.full((batch, 2), size / whole, device=images.device)
        boxes = torch.cat((places / whole, share), 1)  # left, top, width, height as shares, (B, 4)
    elif isinstance(transform, ResizeCenterCrop):
        # the centre square of the original image, undoing the stretch: its sides as shares of width and height
        share = torch.stack((1 / aspects, aspects), 1).clamp(max=1) * transform.share
        boxes = torch.cat(((1 - share) / 2, share), 1)
    elif side == size:
        return images.permute(0, 3, 1, 2)
    else:
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], device=images.device).expand(batch, 4)
    return resample_boxes(images, boxes, size).add_(0.5).clamp_(0, 255).to(torch.uint8)


def _decode(samples: Samples, i: int, out: Pixels, transform: Transform) -> tuple[int, int]:
    try:
        return decode_into(out, samples.read(i), transform, ())
    except RejectedImageError as error:
        raise UsageError(f"{samples.place(i)} does not decode ({error}): delete or replace the file") from None


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as facts:
            return next(int(line.split()[1]) * 1024 for line in facts if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        raise UsageError("cannot determine the free memory: pass most_bytes") from None
