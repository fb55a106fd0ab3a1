"""How the images of a split are read, normalised and passed through a network, on all processes.

`evaluate` scores classes and tags this way, `embed` computes embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from animesion.errors import AnimesionError, UsageError
from animesion_training.data import Augment, Batch, DataSplits, Resize, Stream
from animesion_training.distributed import DistributedContext
from animesion_training.eval.tta import TTA, decoded_size
from animesion_training.precision import autocast
from animesion_training.weights import WeightsCard

T = TypeVar("T")


def _ignored(count: int) -> None:
    """Nobody watches the progress."""


@dataclass(frozen=True)
class Reading:
    """How a split is read, and passed through a network.

    Attributes:
        normalise: deterministic, from uint8 to the input of the network.
        img_size: side of the input in pixels; images are resized to a square.
        crop_pct: share of that square's side that the crop covers; see `Resize`.
        batch_size: samples per batch and process.
        precision: `fp32`, `bf16` or `fp16`.
        channels_last: memory format of the input.
        workers: decoding threads; None for one per core.
        on_error: `raise`, or `skip` samples that cannot be read.
        tta: views of each image whose predictions are averaged, see `tta.predict`.
        advance: called with the number of samples of each batch.
    """

    normalise: Augment
    img_size: int
    crop_pct: float = 1.0
    batch_size: int = 128
    precision: str = "fp32"
    channels_last: bool = False
    workers: int | None = None
    on_error: str = "raise"
    tta: TTA = "none"
    advance: Callable[[int], None] = _ignored

    @classmethod
    def of(cls, card: WeightsCard, where: object, **more: Any) -> Reading:
        """As the network of a card was trained.

        Args:
            card: of the weights.
            where: the weights, for messages.
            more: further attributes.

        Raises:
            UsageError: its images are not square, or have another number of channels than 3.
        """
        if not isinstance(card.img_size, int):
            raise UsageError(f"{where} takes images of {card.img_size}: only square inputs are supported")
        return cls(Augment.plain(as_rgb(card.mean), as_rgb(card.std)), card.img_size, card.crop_pct, **more)

    @property
    def decoded(self) -> tuple[int, float]:
        """The side in pixels at which images are decoded, and the share of it that is then cropped."""
        return decoded_size(self.tta, self.img_size, self.crop_pct)

    def outputs(
        self,
        forward: Callable[[Tensor, Batch], Tensor],
        data: DataSplits,
        split: str,
        context: DistributedContext,
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Yield what `forward` makes of each batch of normalised images (B, 3, L, L), and the batch.

        Each sample is in one batch of one process.

        Args:
            forward: runs in the precision of the reading.
            data: the data of the split.
            split: its name.
            context: rank and device.

        Raises:
            AnimesionError: an image cannot be read.
        """
        side, crop_pct = self.decoded
        stream = Stream(
            data,
            split,
            self.batch_size * context.world_size,
            side,
            train=False,
            transform=Resize(side, crop_pct),
            rank=context.rank,
            world_size=context.world_size,
            workers="auto" if self.workers is None else self.workers,
            on_error="skip" if self.on_error == "skip" else "raise",
        )
        for batch in stream:
            with torch.inference_mode():
                images = self.normalise(
                    batch.images.to(context.device, non_blocking=True),
                    batch.seeds.to(context.device, non_blocking=True),
                )
                if not self.channels_last:
                    images = images.contiguous()
                with autocast(self.precision, context.device):
                    found = forward(images, batch)
            yield found, batch
            self.advance(len(batch.labels))


def as_rgb(values: tuple[float, ...]) -> tuple[float, float, float]:
    """Check that a mean or deviation is of three channels, and return it with that type.

    Raises:
        UsageError: another number of channels.
    """
    if len(values) != 3:
        raise UsageError(f"the model takes {len(values)} channels; images have 3")
    return values[0], values[1], values[2]


def of_all(context: DistributedContext, work: Callable[[], T]) -> list[T]:
    """Do the work of each process; returns the results of all by rank, in every process.

    Raises:
        AnimesionError: the work of a process has failed; all processes raise it, as the others would wait for that one.
    """
    result: T | None = None
    problem = ""
    try:
        result = work()
    except AnimesionError as error:
        if context.world_size == 1:
            raise
        problem = str(error)
    gathered = context.all_gather((result, problem))
    if problem := next((each for _, each in gathered if each), ""):
        raise AnimesionError(problem)
    return [each for each, _ in gathered]
