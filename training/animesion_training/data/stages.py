"""Measure where a stream spends its time: each stage alone, the stream as a whole, and threads that only decode.

Times are wall times, and each stage is measured in one thread while the others rest. On a machine that is also busy
with other work they are too long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch

from animesion.errors import UsageError
from animesion.images.codec import RejectedImageError
from animesion_training.data import seeds
from animesion_training.data.augment import Augment
from animesion_training.data.decode import Content, Pixels, decode_into, decode_view, plain_jpeg, resize_view
from animesion_training.data.stream import Stream

Where = Literal["threads", "main", "first"]
_SLICE = 16


@dataclass(frozen=True)
class Stage:
    """One stage of a stream.

    Attributes:
        name: what is done.
        where: `threads`; `first`, in the threads but in the first epoch only; or `main`, in the loop over the batches.
        seconds: per image.
    """

    name: str
    where: Where
    seconds: float


@dataclass(frozen=True)
class StageTimes:
    """Where a stream spends its time.

    Attributes:
        stages: the stages.
        workers: threads of the stream.
        images: images that the stages were measured on.
        stream: images/s of the stream with the augmentation, without a network.
        decoding: images/s of as many threads that do nothing but decode files in memory.
    """

    stages: tuple[Stage, ...]
    workers: int
    images: int
    stream: float
    decoding: float


def measure_stages(
    stream: Stream, augment: Augment, device: torch.device, *, images: int = 1024, seconds: float = 5.0
) -> StageTimes:
    """Measure the stages of a stream in training.

    Args:
        stream: not yet iterated; its position moves.
        augment: augmentation of the batches, on the device.
        device: where batches are copied to.
        images: how many images, from the start of the epoch, the stages are measured on.
        seconds: for the stream, and for the threads that only decode.

    Raises:
        UsageError: an image cannot be read or decoded.
    """
    cv2.setNumThreads(1)
    samples, transform, stages = stream.samples, stream.transform, list[Stage]()

    @contextlib.contextmanager
    def timed(name: str, where: Where, count: int) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stages.append(Stage(name, where, (time.perf_counter() - began) / count))

    with timed("order of an epoch", "main", stream.draws):
        order = stream.order()
    rows = order[:images].tolist()
    count = len(rows)
    with timed("random numbers", "main", count):
        hashes = seeds.hashes(stream.seed, seeds.AUGMENT, stream.epoch, np.arange(count))
        numbers = seeds.uniforms(hashes, transform.numbers, seeds.CROP).tolist()
    try:
        with timed("read" if samples.digests is None else "read and compare with the digest", "first", count):
            contents = [bytes(samples.read(i)) for i in rows]
        with timed("parse the header", "first", count):
            headers = [plain_jpeg(content) for content in contents]
        with timed("read again", "threads", count):
            for i in rows:
                samples.read(i, checked=stream.on_error == "raise")
        with timed("decode", "threads", count):
            decoded = [
                decode_view(content, transform, u, plain)
                for content, u, plain in zip(contents, numbers, headers, strict=True)
            ]
    except RejectedImageError as error:
        raise UsageError(
            f"an image of the split '{samples.split}' does not decode ({error}): delete or replace it"
        ) from None
    pixels: Pixels = np.empty((count, transform.size, transform.size, 3), dtype=np.uint8)
    with timed("crop and resize", "threads", count):
        for out, (part, view, width, height) in zip(pixels, decoded, strict=True):
            resize_view(out, part, view, width, height, transform.smooth)
    size = min(stream.batch_size, count)
    whole = count - count % size
    batches = [
        (
            torch.from_numpy(pixels[i : i + size]).permute(0, 3, 1, 2),
            torch.from_numpy(hashes[i : i + size].view(np.int64)),
        )
        for i in range(0, whole, size)
    ]
    if device.type == "cuda":
        with timed("copy to the device", "main", whole):
            batches = [(of_batch.to(device), its_seeds.to(device)) for of_batch, its_seeds in batches]
    augment(*batches[0])  # the first call prepares memory
    with timed("augment", "main", whole):
        for of_batch, its_seeds in batches:
            augment(of_batch, its_seeds)
    return StageTimes(
        tuple(stages),
        stream.workers,
        count,
        _stream_speed(stream, augment, device, seconds),
        _decoding_speed(stream, contents, numbers, headers, seconds),
    )


def _stream_speed(stream: Stream, augment: Augment, device: torch.device, seconds: float) -> float:
    """Images/s of the stream and the augmentation, behind the first batches."""
    seen, began = 0, None
    while True:
        for batch in stream:
            augment(batch.images.to(device), batch.seeds.to(device))
            if began is None:
                began = time.perf_counter()
                continue
            seen += batch.total
            if time.perf_counter() - began > seconds:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                stream.close()
                return seen / (time.perf_counter() - began)


def _decoding_speed(
    stream: Stream,
    contents: Sequence[Content],
    numbers: list[list[float]],
    headers: list[tuple[int, int] | None],
    seconds: float,
) -> float:
    """Images/s of threads that only decode, over and over."""
    pixels: Pixels = np.empty((len(contents), stream.transform.size, stream.transform.size, 3), dtype=np.uint8)
    until = time.perf_counter() + seconds

    def decode(turn: int) -> int:
        start = turn * _SLICE % len(contents)
        part = slice(start, start + _SLICE)
        for out, content, u, plain in zip(pixels[part], contents[part], numbers[part], headers[part], strict=True):
            decode_into(out, content, stream.transform, u, plain)
        return len(contents[part])

    def work(worker: int) -> int:
        turn, done = worker, 0
        while time.perf_counter() < until:
            done += decode(turn)
            turn += max(1, stream.workers)
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(max(1, stream.workers)) as pool:
        total = sum(pool.map(work, range(max(1, stream.workers))))
    return total / (time.perf_counter() - began)
