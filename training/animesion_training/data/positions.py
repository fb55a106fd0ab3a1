"""Where a run stands in its endless sequence of epochs, and how to get back there: the common base of the streams.

The position is (epoch, samples consumed in the epoch's global order): the same number on every rank, whatever the
number of ranks, threads or the batch size. How the samples of a batch become pixels is left to the subclasses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.data import schedule, seeds
from animesion_training.data.samples import Samples
from animesion_training.data.sampling import check_sampling, epoch_draws
from animesion_training.data.seeds import Hashes, IntArray


class Batch(NamedTuple):
    """A rank's share of a global batch.

    Attributes:
        images: shape (B, 3, S, S), uint8, channels-last in memory.
        labels: class ids, shape (B,), int64.
        indices: positions in the split, shape (B,), int64.
        seeds: the random seed of each sample in this epoch, shape (B,), int64; augmentation draws from it.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    seeds: Tensor


class Share(NamedTuple):
    """What a rank decodes for one global batch: the samples, their seeds, and where the global batch ends."""

    indices: IntArray
    seeds: Hashes
    end: int


class Scheduled(ABC):
    """An iterable over one epoch at a time, resumable at every batch.

    Iterating goes from the position to the end of the epoch and leaves the position at the start of the next epoch. In
    training a broken-off epoch is continued by the next iteration; in evaluation it starts anew.

    Args:
        samples: of the split.
        num_classes: classes in the map.
        batch_size: samples of a batch of one rank; the last batch of an epoch may have fewer, or up to one more.
        train: shuffled and sampled, and each rank gets the same number of batches; otherwise the split's own order,
            each sample once, and a rank may get one batch less.
        sampling: one of `animesion_training.data.sampling.SAMPLINGS`.
        epochs: of the run; progressive sampling goes by it.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
        window: shards that are read at a time; 0 for all.

    Raises:
        UsageError: the split cannot be divided so, or an argument is out of range.
    """

    def __init__(
        self,
        samples: Samples,
        num_classes: int,
        *,
        batch_size: int,
        train: bool,
        sampling: str,
        epochs: int,
        seed: int,
        rank: int,
        world_size: int,
        window: int,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or window < 0:
            raise UsageError(
                f"batch size {batch_size}, rank {rank} of {world_size} and window {window} do not fit together; the "
                "batch size is 1 or more, ranks count from 0"
            )
        if train and len(samples) < world_size:
            raise UsageError(
                f"the split '{samples.split}' has {len(samples)} samples, too few for {world_size} processes; use fewer"
            )
        self.samples = samples
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.train = train
        self.sampling = sampling if train else "instance"
        self.epochs = epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.window = window if train else 0
        self._epoch = 0
        self._consumed = 0
        self._resumed = False
        self._fingerprint = ""
        # a wrong name must not wait for the first batch
        check_sampling(self.sampling)

    # -- position ----------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration yields from, or the current one does."""
        return self._epoch

    @property
    def consumed(self) -> int:
        """Samples of this epoch's global order that all ranks together were handed."""
        return self._consumed

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; where the stream is inside that epoch already, it stays."""
        if epoch != self._epoch:
            self._epoch, self._consumed = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch yielded last, and what it is a position of; the same on every rank."""
        return {"epoch": self._epoch, "consumed": self._consumed, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, with the same or another number of ranks, workers, or another batch size.

        Raises:
            UsageError: it is the position of other data, another seed or sampling.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise UsageError(
                    f"cannot resume the split '{self.samples.split}': its {name} was {state.get(name)!r} and is now "
                    f"{mine!r}; use the data and settings that the run was started with"
                )
        epoch, consumed = state.get("epoch"), state.get("consumed")
        if not isinstance(epoch, int) or not isinstance(consumed, int) or not 0 <= consumed <= len(self.samples):
            raise UsageError("the stream position in the checkpoint is damaged; resume from an older checkpoint")
        self._epoch, self._consumed, self._resumed = epoch, consumed, True

    def _identity(self) -> dict[str, Any]:
        self._fingerprint = self._fingerprint or self.samples.fingerprint()
        identity = {"samples": len(self.samples), "fingerprint": self._fingerprint, "seed": self.seed}
        identity |= {"sampling": self.sampling, "window": self.window}
        if self.sampling == "progressive":
            identity["epochs"] = self.epochs
        return identity

    # -- batches -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        ends = schedule.batch_ends(len(self.samples), self.batch_size, self.world_size, train=self.train)
        if not len(ends):
            return 0
        # only the last batch can be too small for all ranks
        begin, end = schedule.share(([0, *ends])[-2], int(ends[-1]), self.rank, self.world_size)
        return len(ends) - (begin == end)

    def __iter__(self) -> Iterator[Batch]:
        if not self.train and not self._resumed:
            self._consumed = 0
        self._resumed = False
        batches = self._batches()
        try:
            yield from batches
        finally:
            batches.close()
        self._epoch, self._consumed = self._epoch + 1, 0

    @abstractmethod
    def _batches(self) -> Any:
        """Yield the batches of `_shares`, setting `_consumed` to a share's end before yielding its batch."""

    def order(self) -> IntArray:
        """The global order of the current epoch: positions in the split, shape (N,)."""
        if not self.train:
            return np.arange(len(self.samples), dtype=np.int64)
        draws = epoch_draws(
            self.samples.labels,
            self.num_classes,
            self.sampling,
            seed=self.seed,
            epoch=self._epoch,
            epochs=self.epochs,
        )
        return schedule.training_order(draws, self.samples.files, seed=self.seed, epoch=self._epoch, window=self.window)

    def _shares(self) -> Iterator[Share]:
        """This rank's part of what is left of the epoch; shares without a sample are left out."""
        order, start, epoch = self.order(), self._consumed, self._epoch
        ends = schedule.batch_ends(len(order), self.batch_size, self.world_size, consumed=start, train=self.train)
        for end in ends.tolist():
            begin, stop = schedule.share(start, end, self.rank, self.world_size)
            if stop > begin:
                places = np.arange(begin, stop, dtype=np.int64)
                yield Share(order[begin:stop], seeds.hashes(self.seed, seeds.AUGMENT, epoch, places), end)
            start = end
