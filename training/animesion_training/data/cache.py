"""For sets that fit into memory: decode once, then cut batches out of a resident tensor, augmented on the device.

The schedule, the positions and the state are those of `Stream`: a run may change between the two and continue. Images
are kept as squares (stretched; their aspect is remembered and undone by the crops), at 1.15 times the training size by
default, so that a crop of the whole image loses nothing and a small crop is a little softer than from the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion.images.codec import RejectedImageError
from animesion_training.data import seeds
from animesion_training.data.augment import random_boxes, resampled
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
from animesion_training.data.stream import default_workers

_STORED = 1.15
_PEEKED = 256
_PLACE = 105


@dataclass(frozen=True, eq=False)
class Resident:
    """The decoded images of a split.

    Attributes:
        images: shape (N, side, side, 3), uint8.
        aspects: width / height of the images before they were made square, shape (N,), float32.
        labels: class ids, shape (N,), int64.
        samples: what was decoded.
        num_classes: classes in the map.
    """

    images: Tensor
    aspects: Tensor
    labels: Tensor
    samples: Samples
    num_classes: int


def stored_side(samples: Samples, size: int) -> int:
    """The side at which images are kept.

    It is 1.15 times the training size, but not above the longest side of any of 256 images looked at, nor below the
    training size.

    Raises:
        UsageError: one of the images cannot be read.
    """
    longest = 0
    probe = np.empty((1, 1, 3), dtype=np.uint8)
    for i in np.unique(np.linspace(0, len(samples) - 1, min(_PEEKED, len(samples)), dtype=np.int64)).tolist():
        longest = max(longest, *_decoded(samples, i, probe, Resize(1)))
    return max(size, min(math.ceil(size * _STORED), longest))


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
) -> Resident:
    """Decode a split once.

    Args:
        data: what `open_data` gives.
        split: name of the split.
        size: side of the images that batches will have, in pixels.
        where: `ram`, or `device` to keep the images on the device.
        device: the training device.
        side: side at which images are kept; by default `stored_side`.
        most_bytes: refuse to take more; by default half of what is free there.
        workers: decoding threads.
        notify: called with a sentence with the size before memory is taken.

    Raises:
        UsageError: it does not fit, or an image cannot be read.
    """
    samples = data.select(split)
    samples.check()
    side = side or stored_side(samples, size)
    target = torch.device(device) if where == "device" else torch.device("cpu")
    memory = "RAM" if target.type == "cpu" else str(target)
    needed = len(samples) * side * side * 3
    bound = _free_bytes(target) // 2 if most_bytes is None else most_bytes
    facts = f"{len(samples):,} images of {side} px take {needed / 1e9:.2f} GB"
    if needed > bound:
        raise UsageError(
            f"cannot cache the split '{split}': {facts} of {memory} and {bound / 1e9:.2f} GB "
            "are allowed; stream it (no --cache), or raise the bound"
        )
    notify(f"caching the split '{split}': {facts} of {memory}")
    images = torch.empty((len(samples), side, side, 3), dtype=torch.uint8, device=target)
    aspects = torch.empty(len(samples), dtype=torch.float32)
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(max(1, default_workers() if workers == "auto" else workers), "animesion-decode") as pool:
        step = 512
        for start in range(0, len(samples), step):
            # on a device by way of a small buffer: the whole set need not fit into RAM
            part = images[start : start + step]
            buffer = part if target.type == "cpu" else torch.empty(part.shape, dtype=torch.uint8)
            pixels: Pixels = buffer.numpy()
            sizes = pool.map(
                lambda row, pixels=pixels, start=start: _decoded(samples, start + row, pixels[row], Resize(side)),
                range(len(part)),
            )
            aspects[start : start + step] = torch.tensor([width / height for width, height in sizes])
            if buffer is not part:
                part.copy_(buffer)
    labels = torch.from_numpy(samples.labels.copy())
    return Resident(images, aspects.to(target), labels.to(target), samples, data.num_classes)


class CachedStream(Scheduled):
    """Batches of a resident split, on the training device; see `Scheduled` for order, ranks and resuming.

    Args:
        resident: what `cache_samples` gives.
        batch_size: samples of a batch of one rank.
        size: side of the images in pixels.
        device: the training device; batches come out there.
        train: shuffle, sample and crop at random.
        transform: as for `Stream`; done on the device, antialiased.
        sampling: as for `Stream`.
        epochs: of the run; progressive sampling goes by it.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
        window: the window of the stream whose position is to be continued, if it had one.

    Raises:
        UsageError: an argument is out of range, or there is no such sampling.
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
        window: int = 0,
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
        )
        self.resident = resident
        self.device = torch.device(device)
        self.transform = transform or (RandomResizedCrop(size) if train else Resize(size))
        if self.transform.size != size:
            raise UsageError(f"the transform gives {self.transform.size} pixels where {size} were asked; use one size")
        if not isinstance(self.transform, (RandomResizedCrop, Resize, ResizeCenterCrop, ResizeRandomCrop)):
            raise UsageError(f"{type(self.transform).__name__} is not known to --cache; stream instead")

    def _batches(self) -> Generator[Batch]:
        home = self.resident.images.device
        for share in self._shares():
            rows = torch.from_numpy(share.indices.copy()).to(home, non_blocking=True)
            sample_seeds = torch.from_numpy(share.seeds.view(np.int64).copy()).to(self.device, non_blocking=True)
            stored = self.resident.images.index_select(0, rows).to(self.device, non_blocking=True)
            aspects = self.resident.aspects.index_select(0, rows).to(self.device, non_blocking=True)
            images = view_on_device(self.transform, stored, aspects, sample_seeds)
            labels = self.resident.labels.index_select(0, rows).to(self.device, non_blocking=True)
            self._consumed = share.end
            yield Batch(images, labels, rows.to(self.device, non_blocking=True), sample_seeds)


def view_on_device(transform: Transform, images: Tensor, aspects: Tensor, sample_seeds: Tensor) -> Tensor:
    """A transform for a batch of square-stored images.

    Args:
        transform: one of `decode`'s.
        images: shape (B, side, side, 3), uint8.
        aspects: true width / height, shape (B,).
        sample_seeds: shape (B,), int64.

    Returns:
        Shape (B, 3, S, S), uint8, channels-last in memory.
    """
    size, batch, side = transform.size, len(images), images.shape[1]
    if isinstance(transform, RandomResizedCrop):
        boxes = random_boxes(sample_seeds, aspects, transform.scale, transform.ratio)
    elif isinstance(transform, ResizeRandomCrop):
        places = (seeds.tensor_uniforms(sample_seeds, 2, _PLACE) * (transform.margin + 1)).floor()
        share = torch.full((batch, 2), size / (size + transform.margin), device=images.device)
        boxes = torch.cat((places / (size + transform.margin), share), 1)
    elif isinstance(transform, ResizeCenterCrop):
        share = torch.stack((1 / aspects, aspects), 1).clamp(max=1) * transform.share
        boxes = torch.cat(((1 - share) / 2, share), 1)
    elif side == size:
        return images.permute(0, 3, 1, 2)
    else:
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], device=images.device).expand(batch, 4)
    return resampled(images, boxes, size).add_(0.5).clamp_(0, 255).to(torch.uint8)


def _decoded(samples: Samples, i: int, out: Pixels, transform: Transform) -> tuple[int, int]:
    try:
        return decode_into(out, samples.read(i), transform, ())
    except RejectedImageError as error:
        raise UsageError(f"{samples.place(i)} does not decode ({error}); delete it or put a sound file there") from None


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as facts:
            return next(int(line.split()[1]) * 1024 for line in facts if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        raise UsageError("cannot tell how much memory is free here; state the cache's bound") from None
