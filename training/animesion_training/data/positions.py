"""The common base of the streams: position in the sequence of epochs, resuming, and each rank's share of a batch.

A position is (epoch, samples consumed in the global order of the epoch). It is the same on every rank and does not
depend on the number of ranks, threads or the batch size. Subclasses decode the samples of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from animesion.errors import UsageError
from animesion_training.data import schedule, seeds
from animesion_training.data.samples import Samples
from animesion_training.data.sampling import blend_draws, check_sampling, epoch_draws
from animesion_training.data.seeds import Hashes, IntArray


class Batch(NamedTuple):
    """A rank's share of a global batch.

    Attributes:
        images: shape (B, 3, S, S), uint8, channels-last in memory.
        labels: class ids, shape (B,), int64.
        indices: positions in the split, shape (B,), int64.
        seeds: the random seed of each sample in this epoch, shape (B,), int64; augmentation draws from it.
        places: ascending positions in the global batch, shape (B,), int64.
        total: samples of the global batch, those that cannot be read included.
        text: token ids of the tags, shape (B, T), int64, for a network that reads tags; else None.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    seeds: Tensor
    places: Tensor
    total: int
    text: Tensor | None = None


class Share(NamedTuple):
    """A rank's share of a global batch.

    Attributes:
        indices: samples, shape (B,).
        seeds: of the samples, shape (B,).
        places: of the samples in the global batch, shape (B,).
        total: samples of the global batch.
        end: its end in the global order.
    """

    indices: IntArray
    seeds: Hashes
    places: IntArray
    total: int
    end: int


class Failure(NamedTuple):
    """A skipped sample, and the reason."""

    sample: int
    message: str


class Scheduled(IterableDataset[Batch], ABC):
    """An iterable over one epoch at a time that can resume at every batch.

    Iterating runs from the position to the end of the epoch and moves the position to the start of the next epoch. In
    training, the next iteration continues an interrupted epoch; in evaluation it starts over.

    torch's `DataLoader` and torchdata's `StatefulDataLoader` accept it as a dataset, with `batch_size=None`. Each of
    their worker processes decodes every n-th batch, and its position is that of its own batches. The object in the
    main process does not move then: call `set_epoch` before each epoch.

    Args:
        samples: samples of the split.
        num_classes: classes in the map.
        batch_size: samples of a batch, over all ranks.
        train: whether to shuffle and sample. Every rank then has the same number of batches, of which some may be
            empty: those with too few samples for all ranks, or of samples that are skipped. Otherwise samples keep the
            order of the split, each once, and a rank may have one batch less.
        sampling: one of `animesion_training.data.sampling.SAMPLINGS`.
        epochs: length of the run, for progressive sampling.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
        window: in training, blocks that are shuffled together; 0 for all; None for 1 where data is remote, else 0.
        last: what becomes of the samples after the last full batch in training, see `schedule.batch_ends`.
        pairs: in training, batches of two samples or more, and for every sample its mirror image in the global batch
            on the same rank, see `schedule.share`.
        together: in training, samples of a class that follow each other, see `schedule.class_runs`; it divides the
            batch size, and with more than 1 blocks are not kept together: the window is 0.

        partners: in training, whether each sample is followed by another one of its class, see
            `schedule.with_partners`: an epoch has twice the samples, and the batch size is even. A sample and its
            partner are in the same batch on the same rank, and the window is 0.
        neighbours: in training, whether every other sample of a batch is on the same rank as the next one.
        versions: in training, number of seeds that a sample has, which epochs use in turn: its augmentation repeats
            after that many epochs; 0 for other seeds in each epoch.

    Attributes:
        draws: samples of an epoch.
        skipped: samples of this rank that were skipped, since the last `forget_failures`.
        failures: the first 100 of them.

    Raises:
        UsageError: too few samples for one batch, or an argument is out of range.
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
        window: int | None,
        last: schedule.Last = "keep",
        pairs: bool = False,
        together: int = 1,
        partners: bool = False,
        neighbours: bool = False,
        versions: int = 0,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or (window or 0) < 0:
            raise UsageError(
                f"batch size {batch_size}, rank {rank} of {world_size} and window {window} do not fit together; the "
                "batch size is 1 or more, ranks count from 0"
            )
        if last not in get_args(schedule.Last):
            raise UsageError(f"last must be one of {', '.join(get_args(schedule.Last))}, not {last!r}")
        if train and (together < 1 or batch_size % together or (together > 1 and window)):
            raise UsageError(
                f"batches of {batch_size} are no multiple of {together} images per class, or there is a window, which "
                "keeps blocks together: set run.batch_size to a multiple of data.images_per_class, and window to 0"
            )
        if train and partners and (batch_size % 2 or together > 1 or window):
            raise UsageError(
                f"data.partners puts a second image beside each one, and batches of {batch_size}, {together} images "
                f"per class and window {window} do not allow it: give an even run.batch_size, 1 image per class, no "
                "window"
            )
        needed = batch_size if last == "drop" else 2 if pairs else 1
        draws = samples.draws * (1 + partners) if train else len(samples)
        if train and (draws < needed or batch_size < 1 + pairs):
            raise UsageError(
                f"the split '{samples.split}' has {draws} samples, and batches of {batch_size} need at least "
                f"{max(needed, 1 + pairs)} of them in one batch; use another batch size, or more data"
            )
        if train and samples.parts and sampling != "instance":
            raise UsageError(
                f"data.sampling is {sampling!r}, and data.blend gives datasets weights: the two contradict each other, "
                "use one of them"
            )
        self.samples = samples
        self.draws = draws
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.train = train
        self.sampling = sampling if train else "instance"
        self.epochs = epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.together = together if train else 1
        self.partners = partners and train
        self.neighbours = (partners or neighbours) and train
        self.versions = versions if train else 0
        anywhere = together > 1 or partners  # members of a class are in any block
        self.window = (int(samples.remote) if window is None and not anywhere else window or 0) if train else 0
        self.last = last if train else "keep"
        self.pairs = pairs and train
        self.skipped = 0
        self.failures: list[Failure] = []
        self._epoch = 0
        self._consumed = 0
        self._resumed = False
        self._fingerprint = ""
        # report a wrong name here and not with the first batch
        check_sampling(self.sampling)

    # -- position ----------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Epoch of the current iteration, or of the next one between iterations."""
        return self._epoch

    @property
    def consumed(self) -> int:
        """Samples of this epoch's global order that all ranks together have received."""
        return self._consumed

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch; a position inside that epoch is kept."""
        if epoch != self._epoch:
            self._epoch, self._consumed = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, and the identity of data and settings; the same on every rank."""
        position = {"epoch": self._epoch, "consumed": self._consumed}
        return position | self._identity() | self._layout()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position in training, with any number of ranks and workers.

        The batch size may differ where the order does not depend on it: between epochs, and without a window. In
        evaluation, the number of ranks must be the same, too.

        Raises:
            UsageError: the position is of other data, another seed, sampling or order.
        """
        started = bool(state.get("consumed"))
        for name, expected in (self._identity() | (self._layout() if started else {})).items():
            if state.get(name) != expected:
                raise UsageError(
                    f"cannot resume the split '{self.samples.split}': its {name} was {state.get(name)!r} and is now "
                    f"{expected!r}; use the data and settings that the run was started with"
                )
        epoch, consumed = state.get("epoch"), state.get("consumed")
        if not isinstance(epoch, int) or not isinstance(consumed, int) or not 0 <= consumed <= self.draws:
            raise UsageError(
                "the stream position in the checkpoint is damaged: restore the checkpoint or start a new run"
            )
        self._epoch, self._consumed, self._resumed = epoch, consumed, True

    def _identity(self) -> dict[str, Any]:
        # computed on first use: it hashes every key
        self._fingerprint = self._fingerprint or self.samples.fingerprint()
        identity = {"samples": len(self.samples), "fingerprint": self._fingerprint, "seed": self.seed}
        identity |= {"sampling": self.sampling, "window": self.window}
        if self.train and self.samples.parts:
            identity["draws"] = [part.draws for part in self.samples.parts]
        if self.together > 1:
            identity["images per class"] = self.together
        if self.partners:
            identity["partners"] = True
        if self.versions:
            identity["versions"] = self.versions
        if self.sampling == "progressive":
            identity["epochs"] = self.epochs
        return identity

    def _layout(self) -> dict[str, Any]:
        """What the order within an epoch depends on besides the identity."""
        if not self.train:
            return {"batch size": self.batch_size, "number of ranks": self.world_size}
        if self.window == 0:
            return {}
        return {"batch size": self.batch_size, "last batch": self.last, "pairs": self.pairs}

    def forget_failures(self) -> None:
        """Count skipped samples from 0 again."""
        self.skipped, self.failures = 0, []

    # -- batches -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of batches of this rank in a whole epoch."""
        ends = self._ends(0)
        if self.train:
            return len(ends)
        sizes, counts = np.unique(np.diff(ends, prepend=0), return_counts=True)
        has_some = [len(schedule.share(0, int(size), self.rank, self.world_size)) > 0 for size in sizes]
        return int(counts[np.array(has_some, dtype=bool)].sum())

    def _ends(self, consumed: int) -> IntArray:
        return schedule.batch_ends(self.draws, self.batch_size, consumed=consumed, last=self.last, pairs=self.pairs)

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

    def order(self, epoch: int | None = None) -> IntArray:
        """Return the global order of an epoch, by default the current one: positions in the split, shape (N,)."""
        epoch = self._epoch if epoch is None else epoch
        if not self.train:
            # each rank scores a range of the split
            whole = np.arange(len(self.samples), dtype=np.int64)
            return schedule.spread(whole, self._ends(0), self.world_size)
        if self.samples.parts:
            draws = blend_draws(self.samples.parts, seed=self.seed, epoch=epoch)
        else:
            draws = epoch_draws(
                self.samples.labels, self.num_classes, self.sampling, seed=self.seed, epoch=epoch, epochs=self.epochs
            )
        order = schedule.training_order(
            draws, self.samples.blocks, self._ends(0), seed=self.seed, epoch=epoch, window=self.window
        )
        if self.partners:
            return schedule.with_partners(order, self.samples.labels, seed=self.seed, epoch=epoch)
        return schedule.class_runs(order, self.samples.labels, self.together)

    def _shares(self) -> Iterator[Share]:
        """Yield this rank's shares of the rest of the epoch; in training also empty ones."""
        start, epoch = self._consumed, self._epoch
        order = self.order()
        process = get_worker_info()
        number, worker, workers = start // self.batch_size, *((process.id, process.num_workers) if process else (0, 1))
        for end in self._ends(start).tolist():
            number += 1
            if (number - 1) % workers != worker:
                start = end
                continue
            together = {"pairs": self.pairs, "partners": self.neighbours}
            positions = schedule.share(start, end, self.rank, self.world_size, **together)
            if len(positions) or self.train:
                version = (epoch % self.versions, order[positions]) if self.versions else (epoch, positions)
                hashes = seeds.hashes(self.seed, seeds.AUGMENT, *version)
                yield Share(order[positions], hashes, positions - start, end - start, end)
            start = end
