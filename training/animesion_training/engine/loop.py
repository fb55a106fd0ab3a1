"""The training loop: epochs, optimizer steps, validation, checkpoints and resuming.

A run is a function of its recipe and data: all randomness comes from seeds, the batch is the same for any number of
processes, and a run that was killed continues from its last checkpoint with the same losses. `setup` builds the
components, `steps` computes the loss, `checkpoint` and `runs` write files.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from animesion.errors import AnimesionError, UsageError
from animesion_training.data import Batch, DataSplits, open_data
from animesion_training.data.mixing import mix
from animesion_training.distributed import DistributedContext, distributed_context
from animesion_training.engine import checkpoint, optim, runs, setup, steps
from animesion_training.eval import evaluate
from animesion_training.eval.metrics import Evaluation
from animesion_training.models import input_config
from animesion_training.models.create import bare
from animesion_training.recipe import TrainRecipe
from animesion_training.weights import load_model, save_model


class DivergedError(AnimesionError):
    """The loss became NaN or infinite, or jumped; the last checkpoint is from before that."""


@dataclass(frozen=True)
class Outcome:
    """Result of a training run.

    Attributes:
        out: the run's folder.
        steps: optimizer steps done.
        best_epoch: epoch (from 1) with the best validation accuracy; 0 without validation.
        best_val: its top-1 accuracy, 0 to 1.
        test: evaluation of the best weights on the test split, if there is one.
        seconds: wall seconds of this call.
    """

    out: Path
    steps: int
    best_epoch: int
    best_val: float
    test: Evaluation | None
    seconds: float


class Watcher:
    """Progress events of a run, in the first process; this base class ignores them."""

    def message(self, text: str) -> None:
        """Show a message to the user."""

    def started(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """An epoch (from 1) of `steps` steps begins, or resumes after `done` of them."""

    def stepped(self, loss: float, rate: float, speed: float) -> None:
        """A step is done, with its loss, learning rate and images per second."""

    def ended(self, epoch: int, numbers: dict[str, float]) -> None:
        """An epoch is done, with its metrics by name."""


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
        DivergedError: the loss is no longer finite, or has jumped.
    """
    start = time.perf_counter()
    data = open_data(data_path, images=images)
    with distributed_context(device) as context, _lock_folder(out, recipe, context, resume=resume):
        trainer = _Trainer(recipe, data, out, context, (watcher or Watcher()) if context.is_main else Watcher())
        if resume and (out / runs.LAST).exists():
            trainer.restore(checkpoint.load(out / runs.LAST))
        test = trainer.run()
    return Outcome(out, trainer.step, trainer.best_epoch, trainer.best_val, test, time.perf_counter() - start)


@contextlib.contextmanager
def _lock_folder(out: Path, recipe: TrainRecipe, context: DistributedContext, *, resume: bool) -> Iterator[None]:
    """Lock the folder in the first process; if that fails, every process raises the first one's error."""
    with contextlib.ExitStack() as stack:
        problem: AnimesionError | None = None
        if context.is_main:
            try:
                stack.enter_context(runs.lock_folder(out, recipe, resume=resume))
            except AnimesionError as error:
                problem = error
        problem = context.all_gather(problem)[0]
        if problem is not None:
            raise problem
        yield


class _Trainer:
    """The state of a run."""

    def __init__(
        self, recipe: TrainRecipe, data: DataSplits, out: Path, context: DistributedContext, watcher: Watcher
    ) -> None:
        self.recipe, self.data, self.out, self.context, self.watcher = recipe, data, out, context, watcher
        self.step = 0
        self.best_val, self.best_epoch = -1.0, 0
        self.running_loss = 0.0
        self.loss_terms: dict[str, float] = {}  # of the last step, when the loss has more than one
        self.stop_requested = False
        settings, device = recipe.run, context.device
        if settings.batch_size % context.world_size:
            raise UsageError(
                f"run.batch_size {settings.batch_size} is over all processes and not a multiple of their number, "
                f"{context.world_size}"
            )
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
        checkpoint.seed_generators(settings.seed, 0)  # the same initial weights in every process
        self.model = setup.build_model(recipe, data.num_classes, device)
        checkpoint.seed_generators(settings.seed, context.rank)
        self.train_counts = evaluate.train_counts(data, recipe.data.train)
        teacher = setup.load_teacher(recipe, data, device)
        self.stream = setup.open_stream(recipe, data, context, teacher=teacher, notify=watcher.message)
        self.augment, self.normalise = setup.build_augmentation(recipe.augment, self.model)
        self.mixing = setup.build_mixing(recipe)
        self.mix_generator = torch.Generator().manual_seed(settings.seed * 1000 + context.rank)
        self.objective = setup.build_objective(recipe, self.train_counts, self.mixing, device)
        self.optimizer = optim.make_optimizer(self.model, recipe.optimizer)
        self.schedule = optim.make_schedule(self.optimizer, recipe.schedule, len(self.stream))
        self.ema = ModelEmaV3(self.model, decay=settings.ema) if settings.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.step_module = setup.build_step(recipe, self.model, self.objective, self.mixing, teacher, device)
        self.parallel_step: nn.Module = self.step_module
        if context.world_size > 1:
            device_ids = [device] if device.type == "cuda" else None
            self.parallel_step = nn.parallel.DistributedDataParallel(self.step_module, device_ids=device_ids)

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Evaluation | None:
        """Train to the end, then evaluate the best weights on the test split."""
        log = runs.Log(self.out, self.recipe, self.step) if self.context.is_main else None
        with contextlib.closing(log) if log else contextlib.nullcontext(), self._signals_deferred():
            while self.stream.epoch < self.recipe.schedule.epochs:
                self._epoch(log)
        if self.recipe.data.test and self.recipe.data.test in self.data.splits:
            return self._test()
        return None

    def _epoch(self, log: runs.Log | None) -> None:
        epoch, epochs, length = self.stream.epoch + 1, self.recipe.schedule.epochs, len(self.stream)
        self.watcher.started(epoch, epochs, length, self.step - (epoch - 1) * length)
        self.objective.set_epoch(epoch - 1)  # type: ignore[operator]
        optim.train_mode(self.parallel_step)
        loss_sum, images, began = 0.0, 0, time.perf_counter()
        for batch in self.stream:
            loss, count = self._step(batch)
            loss_sum, images = loss_sum + loss * count, images + count
            rate = float(self.optimizer.param_groups[-1]["lr"])
            speed = images / (time.perf_counter() - began)
            self.watcher.stepped(loss, rate, speed)
            if log and self.step % self.recipe.run.log_steps == 0:
                terms = {f"loss_{name}": value for name, value in self.loss_terms.items()}
                log.write("step", self.step, epoch, {"loss": loss, **terms, "lr": rate, "images_per_second": speed})
            # all processes must agree: one that stops alone leaves the others waiting in their next collective
            stop = any(self.context.all_sum(float(self.stop_requested)))
            interval = self.recipe.run.save_steps
            # the end of the epoch writes a checkpoint anyway
            due = interval and self.step % interval == 0 and self.step < epoch * length
            if stop or due:
                self.save()
            if stop:
                raise KeyboardInterrupt
        numbers = {"train_loss": loss_sum / max(1, images), "images_per_second": images / (time.perf_counter() - began)}
        if self.recipe.data.val and self.recipe.data.val in self.data.splits:
            numbers |= self._validate(epoch)
        if self.context.is_main:
            self._save_weights(runs.FINAL, epoch, numbers)
            if log:
                log.write("epoch", self.step, epoch, numbers)
        self.save()
        self.watcher.ended(epoch, numbers)

    def _step(self, batch: Batch) -> tuple[float, int]:
        """Do one optimizer step; return the mean loss over the global batch, and the size of that batch."""
        self.schedule.step_update(self.step)
        settings, device = self.recipe.run, self.context.device
        labels = batch.labels.to(device, non_blocking=True)
        seeds = batch.seeds.to(device, non_blocking=True)
        images = self.augment(batch.images.to(device, non_blocking=True), seeds)
        targets = labels
        if self.mixing.active:
            images, targets = mix(images, labels, self.data.num_classes, self.mixing, self.mix_generator)
        if not settings.channels_last:
            images = images.contiguous()
        [count] = map(int, self.context.all_sum(len(labels)))  # size of the global batch
        sums: dict[str, Tensor] = {}
        pieces = min(settings.accumulate, len(labels))
        for i, piece in enumerate(zip(images.chunk(pieces), targets.chunk(pieces), seeds.chunk(pieces), strict=True)):
            with self._gradient_sync(last=i == pieces - 1):
                # a piece has the mean over its own samples: weight it by its share of the global batch
                share = len(piece[0]) / count
                terms = {name: term * share for name, term in self.parallel_step(*piece).items()}
                # DistributedDataParallel divides gradients by the number of processes
                loss: Any = self.scaler.scale(steps.sum_terms(terms) * self.context.world_size)
                loss.backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.detach()
        totals = dict(zip(sums, self.context.all_sum(*map(float, sums.values())), strict=True))
        mean = sum(totals.values())
        self._check_loss(mean, totals)
        self.scaler.unscale_(self.optimizer)
        if self.recipe.optimizer.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema:
            self.ema.update(self.model, step=self.step)
        self.loss_terms = totals if len(totals) > 1 else {}
        return mean, count

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Reduce gradients over the processes once per step, in the backward pass of the last piece."""
        if isinstance(self.parallel_step, nn.parallel.DistributedDataParallel) and not last:
            return self.parallel_step.no_sync()
        return contextlib.nullcontext()

    def _check_loss(self, loss: float, terms: dict[str, float]) -> None:
        """Raise `DivergedError` for a loss that is not finite or that jumps; update the running mean."""
        last = self.out / runs.LAST
        advice = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        if not math.isfinite(loss):
            bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
            where = f" (its term {bad})" if len(terms) > 1 else ""
            raise DivergedError(f"the loss{where} is {loss} at step {self.step}: lower optimizer.lr or clip; {advice}")
        spike = self.recipe.run.spike
        if spike and self.step > 100 and loss > spike * self.running_loss:
            raise DivergedError(
                f"the loss jumped to {loss:.3g} at step {self.step}, from about {self.running_loss:.3g}: lower "
                f"optimizer.lr or clip; {advice}"
            )
        self.running_loss = loss if self.step == 0 else 0.98 * self.running_loss + 0.02 * loss

    # -- evaluation --------------------------------------------------------------------------------------------------

    @property
    def _eval_model(self) -> nn.Module:
        """The model that is evaluated and saved: the moving average of the weights when the recipe has one."""
        return self.ema.module if self.ema else self.model

    def _score(self, model: nn.Module, split: str) -> Any:
        return evaluate.score(
            model,
            self.data,
            split,
            self.normalise,
            self.context,
            img_size=self.recipe.model.img_size,
            crop_pct=self.recipe.augment.crop_pct,
            batch_size=max(1, 2 * self.recipe.run.batch_size // self.context.world_size),
            precision=self.recipe.run.precision,
            channels_last=self.recipe.run.channels_last,
            workers=None if self.recipe.data.workers < 0 else self.recipe.data.workers,
            on_error=self.recipe.data.on_error,
        )

    def _validate(self, epoch: int) -> dict[str, float]:
        split = self.recipe.data.val
        scores = self._score(self._eval_model, split)
        numbers: dict[str, float] = {}
        if self.context.is_main:
            complete = self.recipe.data.on_error == "raise"
            evaluation = evaluate.compute_metrics(scores, self.data, split, self.train_counts, complete=complete)
            numbers = {
                "val_top_1": evaluation.top_1,
                "val_top_5": evaluation.top_5,
                "val_macro": evaluation.macro_accuracy,
                "val_nll": evaluation.calibration.nll,
            }
        numbers = self.context.all_gather(numbers)[0]
        if numbers["val_top_1"] > self.best_val:
            self.best_val, self.best_epoch = numbers["val_top_1"], epoch
            if self.context.is_main:
                self._save_weights(runs.BEST, epoch, numbers)
        return numbers

    def _test(self) -> Evaluation | None:
        split = self.recipe.data.test
        chosen = self.out / (runs.BEST if self.best_epoch else runs.FINAL)
        self.context.barrier()  # the first process may still be writing the weights
        model, _ = load_model(chosen)
        scores = self._score(model.to(self.context.device), split)
        if not self.context.is_main:
            return None
        complete = self.recipe.data.on_error == "raise"
        evaluation = evaluate.compute_metrics(scores, self.data, split, self.train_counts, complete=complete)
        facts = {"data": self.data.path, "split": split, "weights": chosen.name, "epoch": self.best_epoch}
        evaluate.write_report(self.out / "report", evaluation, facts, scores, self.data, split)
        return evaluation

    # -- weights and checkpoints -------------------------------------------------------------------------------------

    def _save_weights(self, name: str, epoch: int, numbers: dict[str, float]) -> None:
        facts = {"recipe": self.recipe.name, "data": Path(self.data.path).name, "epoch": epoch, **numbers}
        if self.train_counts is not None:
            facts["train_counts"] = self.train_counts.tolist()
        inputs = input_config(self.model)
        save_model(
            self._eval_model,
            self.out / name,
            self.data.classes,
            facts,
            mean=inputs.mean,
            std=inputs.std,
            crop_pct=self.recipe.augment.crop_pct,
        )

    def save(self) -> None:
        """Write the checkpoint that the run can resume from."""
        # each process has its own random generators
        generators = self.context.all_gather({**checkpoint.generator_state(), "mix": self.mix_generator.get_state()})
        if not self.context.is_main:
            return
        checkpoint.save(
            self.out / runs.LAST,
            {
                "recipe": self.recipe.digest(),
                "step": self.step,
                "best": [self.best_val, self.best_epoch],
                "running_loss": self.running_loss,
                "stream": self.stream.state_dict(),
                "model": bare(self.model).state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else {},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "method": dict(self.step_module.method_state()),
                "generators": generators,
            },
        )

    def restore(self, content: dict[str, Any]) -> None:
        """Set the state of the run to that of a checkpoint.

        Raises:
            UsageError: the checkpoint is of another recipe or other data.
        """
        if content["recipe"] != self.recipe.digest():
            raise UsageError(f"{self.out / runs.LAST} is of a run with other settings: give the same recipe")
        self.step = content["step"]
        self.best_val, self.best_epoch = content["best"]
        self.running_loss = content["running_loss"]
        self.stream.load_state_dict(content["stream"])
        bare(self.model).load_state_dict(content["model"])
        if self.ema:
            self.ema.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.step_module.load_method_state(content["method"])
        mine = content["generators"][self.context.rank : self.context.rank + 1]
        if len(content["generators"]) == self.context.world_size and mine:
            checkpoint.restore_generators(mine[0])
            self.mix_generator.set_state(mine[0]["mix"])
        else:  # another number of processes: same batches, but new draws for dropout and mixing
            checkpoint.seed_generators(self.recipe.run.seed + self.step, self.context.rank)

    @contextlib.contextmanager
    def _signals_deferred(self) -> Iterator[None]:
        """Defer SIGINT and SIGTERM to the end of the step, where a checkpoint is written."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:  # the second signal stops at once
                raise KeyboardInterrupt
            self.stop_requested = True

        previous: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # handlers can be set in the main thread only
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, request_stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
