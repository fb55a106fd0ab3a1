"""Processes that train together, kept alive for many examples: each would load torch again, for seconds."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import tempfile
import traceback
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from PIL import Image

from animesion.errors import AnimesionError, UsageError
from animesion_training.data import Augment, DataSplits, Samples
from animesion_training.data.seeds import IntArray
from animesion_training.distributed import DistributedContext
from animesion_training.engine import batch_size
from animesion_training.engine.feed import feed
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.eval import evaluate
from animesion_training.eval.reading import Reading
from animesion_training.models import create_model
from animesion_training.recipe import load
from animesion_training.weights import load_model

MOST = 4
_PATIENCE = 90  # seconds; longer than that of a collective


@contextlib.contextmanager
def pool() -> Iterator[Pool]:
    """Start the processes; functions of this module run in them."""
    # forks of a fresh process: the test process itself has threads, which do not survive a fork
    method = multiprocessing.get_context("spawn")
    ends = [method.Pipe() for _ in range(MOST)]
    parent = method.Process(target=_fork, args=([theirs for _, theirs in ends],))
    parent.start()
    for _, theirs in ends:
        theirs.close()
    try:
        yield Pool([ours for ours, _ in ends])
    finally:
        for ours, _ in ends:
            ours.close()
        parent.join(5)
        parent.kill()


class Pool:
    """Runs functions in 1 to 4 processes that form a gloo group."""

    def __init__(self, ends: list[Connection]) -> None:
        self._ends = ends

    def __call__(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """Call `function(context, *arguments)` in each process; return the results by rank.

        Raises:
            RuntimeError: a process failed; the message has its traceback.
            TimeoutError: a process does not answer: it waits for a collective that others do not take part in.
        """
        with tempfile.TemporaryDirectory() as folder:
            ends = self._ends[:world_size]
            for rank, end in enumerate(ends):
                end.send((function, rank, world_size, str(Path(folder) / "meet"), arguments))
            answers = []
            for rank, end in enumerate(ends):
                if not end.poll(_PATIENCE):
                    raise TimeoutError(f"process {rank} of {world_size} does not answer")
                answers.append(end.recv())
        problems = [problem for _, problem in answers if problem]
        if problems:
            raise RuntimeError("\n".join(problems))
        return [result for result, _ in answers]


def _fork(ends: Sequence[Connection]) -> None:
    method = multiprocessing.get_context("fork")
    workers = [method.Process(target=_serve, args=(end,), daemon=True) for end in ends]
    for worker in workers:
        worker.start()
    for end in ends:
        end.close()
    for worker in workers:
        worker.join()


def _serve(end: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world_size, meeting, arguments = end.recv()
        except EOFError:
            return
        try:
            if world_size > 1:
                dist.init_process_group(
                    "gloo", f"file://{meeting}", timedelta(seconds=40), world_size=world_size, rank=rank
                )
            answer = function(DistributedContext(rank, world_size, torch.device("cpu")), *arguments), ""
        except BaseException:  # told to the test
            answer = None, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        end.send(answer)


class Drawn:
    """A source of drawn images of 40 px, each different; some cannot be read."""

    def __init__(self, count: int, broken: frozenset[int]) -> None:
        rng = np.random.default_rng(1)
        self._images = []
        for i in range(count):
            out = io.BytesIO()
            noise = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((40, 40), Image.Resampling.BICUBIC).save(out, "PNG")
            self._images.append(b"no image" if i in broken else out.getvalue())
        self.sizes = np.array([len(image) for image in self._images])

    def name(self, file: int) -> str:
        return f"drawn-{file}"

    def read(self, file: int, offset: int, size: int) -> bytes:
        return self._images[file]

    view = read

    def check(self, files: IntArray) -> None:
        pass

    def prefetch(self, blocks: Sequence[int]) -> None:
        pass

    def discard(self, file: int, offset: int) -> bool:
        return False


def drawn(count: int, broken: frozenset[int] = frozenset()) -> DataSplits:
    """A training split of `count` drawn images of three classes, and a split `val` of the same images."""
    source, numbers = Drawn(count, broken), np.arange(count)
    keys = [f"k{i}" for i in range(count)]

    def split(name: str) -> Samples:
        return Samples(name, numbers**2 % 3, numbers, numbers * 0, source.sizes, keys, source)

    return DataSplits("drawn", ("a", "b", "c"), {name: split(name) for name in ("train", "val")})


#: A small vision transformer without batch norm, and short runs of it.
SMALL = (
    "model.name=vit_tiny_patch16", "model.options.depth=1", "model.options.embed_dim=16", "model.options.num_heads=2",
    "model.img_size=32", "data.workers=0", "data.val=", "data.test=", "schedule.epochs=1", "schedule.warmup_steps=0",
    "schedule.kind=constant", "optimizer.lr=0.02", "optimizer.clip=5",
)  # fmt: skip


class Trained(NamedTuple):
    """The end of a run in one process: number of steps, metrics of the last epoch, and every tensor by name."""

    steps: int
    numbers: dict[str, float]
    state: dict[str, npt.NDArray[Any]]


class Listener(Watcher):
    """Keeps the metrics of the last epoch."""

    numbers: dict[str, float]

    def ended(self, epoch: int, numbers: dict[str, float]) -> None:
        self.numbers = numbers


class StoppedError(Exception):
    """A run was stopped where the test wants it."""


def train(
    context: DistributedContext,
    overrides: Sequence[str],
    count: int,
    broken: frozenset[int] = frozenset(),
    out: Path | None = None,
    stop: int = 0,
) -> Trained | None:
    """Train on `drawn(count, broken)`.

    Args:
        context: of this process.
        overrides: of the recipe.
        count: images.
        broken: those that cannot be read.
        out: folder of the run, which is resumed if it has a checkpoint.
        stop: step after which the run dies, before that step is saved; 0 for none. The result is then None.
    """

    class Ends(Listener):
        def stepped(self, loss: float, rate: float, speed: float) -> None:
            if trainer.step == stop:
                raise StoppedError

    listener = Ends()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load("scratch", [*SMALL, *overrides])
        trainer = Trainer(recipe, drawn(count, broken), out or Path(folder), context, listener)
        trainer.resume()
        try:
            trainer.run()
        except StoppedError:
            return None
    parts = {"model": trainer.model.state_dict(), "method": trainer.update.step.method_state()}
    parts |= {"ema": trainer.ema.module.state_dict()} if trainer.ema else {}
    state = {f"{part}.{name}": value.numpy() for part, values in parts.items() for name, value in values.items()}
    return Trained(trainer.step, listener.numbers, state)


def collectives(context: DistributedContext, overrides: Sequence[str], count: int) -> list[Counter[str]]:
    """Count the collectives of each training step on `drawn(count)`, by their names in a trace of torch's profiler."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load("scratch", [*SMALL, *overrides]), drawn(count), Path(folder), context, Watcher())
        for batch, _ in feed(trainer.stream, context.device):
            with torch.profiler.profile() as trace:
                trainer.train_batch(batch)
            found.append(Counter(event.name for event in trace.events() if event.name.startswith("c10d::")))
    return found


def fitting_batch(context: DistributedContext, free: Sequence[float], count: int) -> tuple[int, list[str]]:
    """Return the batch size for `run.batch_size = 0` and the messages, where processes have these bytes of memory."""
    told: list[str] = []
    recipe = load("scratch", [*SMALL, "run.batch_size=0"])
    with unittest.mock.patch.object(batch_size, "free_bytes", return_value=int(free[context.rank])):
        found = batch_size.settle(recipe, drawn(count), context, notify=told.append)
    return found.run.batch_size, told


def stop(context: DistributedContext, rank: int, step: int, out: Path) -> int:
    """Train until one process gets SIGTERM in a step; return the number of steps that this process did."""

    class Stops(Watcher):
        steps = 0

        def stepped(self, loss: float, rate: float, speed: float) -> None:
            self.steps += 1
            if context.rank == rank and self.steps == step:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(load("scratch", [*SMALL, "run.batch_size=4"]), drawn(120), out, context, Stops())
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run()
    return trainer.step


def validate(context: DistributedContext, weights: Path, count: int) -> float:
    """Return the negative log-likelihood of a weights file on the split `val` of `drawn(count)`."""
    model, card = load_model(weights)
    data = drawn(count)
    scores = evaluate.score(model, data, "val", Reading.of(card, weights, workers=0), context)
    return float(evaluate.compute_metrics(scores, data, "val").calibration.nll)


@contextlib.contextmanager
def on_machines_of(processes: int, context: DistributedContext) -> Iterator[None]:
    """The environment of torchrun, as if a machine had this number of processes."""
    facts = {"LOCAL_RANK": str(context.rank % processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ.update(facts)
    try:
        yield
    finally:
        for name in facts:
            del os.environ[name]


class Cached(NamedTuple):
    """The cache of a process, and what it took to fill it."""

    images: npt.NDArray[np.uint8]
    aspects: npt.NDArray[np.float32]
    seen: bytes
    decoded: int


def cache(
    context: DistributedContext, count: int, processes: int, broken: frozenset[int] = frozenset()
) -> Cached | str:
    """Cache the split `train` of `drawn(count, broken)` with some processes per machine; return an error as text."""
    from animesion_training.data import cache as module

    decoded, plain = 0, module._decode

    def counting(samples: Samples, i: int, *arguments: Any) -> tuple[int, int]:
        nonlocal decoded
        decoded += 1
        return plain(samples, i, *arguments)

    with on_machines_of(processes, context):
        module._decode = counting  # type: ignore[assignment]
        try:
            resident = module.cache_samples(
                drawn(count, broken), "train", 24, side=32, workers=1, notify=lambda _: None, context=context
            )
        except UsageError as error:
            return str(error)
        finally:
            module._decode = plain
    images, aspects = resident.images.numpy().copy(), resident.aspects.numpy().copy()
    context.barrier()
    # written by the first process of each machine, and read by all of that machine
    if context.rank % processes == 0:
        resident.images[0] = context.rank + 1
    context.barrier()
    return Cached(images, aspects, resident.images[0, 0, 0].numpy().tobytes(), decoded)


def score(context: DistributedContext, count: int, broken: frozenset[int]) -> str:
    """Score the split `val` of `drawn(count, broken)`; return the error as text."""
    model = create_model("vit_tiny_patch16", 3, 32, depth=1, embed_dim=16, num_heads=2)
    try:
        evaluate.score(model, drawn(count, broken), "val", Reading(Augment.plain(), 32, workers=0), context)
    except AnimesionError as error:
        return str(error)
    return ""
