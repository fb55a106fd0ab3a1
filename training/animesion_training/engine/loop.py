"""Train a model in a folder, or resume a run there.

`trainer` holds the state of a run and its loop. `setup` builds the components, `steps` computes the loss, `update` does
an optimizer step, `checkpoint` and `runs` write files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from animesion.errors import AnimesionError
from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext, distributed_context
from animesion_training.engine import batch_size, runs, setup
from animesion_training.engine.origins import origins
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.eval.metrics import Evaluation
from animesion_training.eval.similarity_report import Similarity
from animesion_training.eval.tag_metrics import TagEvaluation
from animesion_training.memory import kept_heap
from animesion_training.precision import numerics
from animesion_training.recipe import TrainRecipe


@dataclass(frozen=True)
class Outcome:
    """Result of a training run.

    Attributes:
        out: the run's folder.
        steps: optimizer steps done.
        best_epoch: epoch (from 1) with the best validation accuracy; 0 without validation.
        best_val: its accuracy, 0 to 1.
        best_metric: what that is: `val_top_1`, `val_map_at_r` if the classes of the validation split are not trained
            on, or `val_map` of tags.
        test: evaluation of the best weights on the test split, if there is one with classes that are trained on.
        similarity: the same for a test split of classes that are not trained on.
        tagging: the same for a run that trains on tags.
        seconds: wall seconds of this call.
    """

    out: Path
    steps: int
    best_epoch: int
    best_val: float
    best_metric: str
    test: Evaluation | None
    similarity: Similarity | None
    tagging: TagEvaluation | None
    seconds: float


def train(
    recipe: TrainRecipe,
    data_path: Path | str,
    out: Path,
    *,
    images: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    watcher: Watcher | None = None,
) -> Outcome:
    """Train a model, or resume a run.

    Args:
        recipe: the resolved recipe.
        data_path: a built dataset, class folders or label files; see `animesion_training.data.open_data`.
        out: folder of the run.
        images: image root of label files.
        resume: continue from the last checkpoint in `out`, if there is one.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        watcher: receives progress events in the first process.

    Raises:
        UsageError: the recipe does not fit the data or the folder.
        BusyError: another run holds the folder.
        DivergedError: the loss or the weights are no longer finite, or the loss has jumped.
    """
    start = time.perf_counter()
    data, notes = setup.open_datasets(recipe, data_path, images)
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(distributed_context(device))
        settings = recipe.run
        if context.device.type == "cpu":
            stack.enter_context(kept_heap())
        stack.enter_context(numerics(context.device, deterministic=settings.deterministic, tf32=settings.tf32))
        watcher = (watcher or Watcher()) if context.is_main else Watcher()
        for note in notes:
            watcher.message(note)
        recipe = batch_size.settle(recipe, data, context, out=out, notify=watcher.message)
        stack.enter_context(_lock_folder(out, recipe, data, context, resume=resume))
        trainer = Trainer(recipe, data, out, context, watcher)
        if resume:
            trainer.resume()
        test = trainer.run()
    return Outcome(
        out,
        trainer.step,
        trainer.best_epoch,
        trainer.best_val,
        trainer.evaluator.best_metric,
        test,
        trainer.similarity,
        trainer.tagging,
        time.perf_counter() - start,
    )


@contextlib.contextmanager
def _lock_folder(
    out: Path, recipe: TrainRecipe, data: DataSplits, context: DistributedContext, *, resume: bool
) -> Iterator[None]:
    """Lock the folder in the first process; if that fails, every process raises the first one's error."""
    with contextlib.ExitStack() as stack:
        problem: AnimesionError | None = None
        if context.is_main:
            try:
                stack.enter_context(runs.lock_folder(out, recipe, origins(recipe, data), resume=resume))
            except AnimesionError as error:
                problem = error
        problem = context.all_gather(problem)[0]
        if problem is not None:
            raise problem
        yield
