"""The training loop: epochs, optimizer steps, validation, checkpoints and resuming.

A run is a function of its recipe and data: all randomness comes from seeds, the batch is the same for any number of
processes, and a run that was killed continues from its last checkpoint with the same losses.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from animesion.errors import UsageError
from animesion_training.data import Batch, DataSplits
from animesion_training.data.tags import category_counts
from animesion_training.distributed import DistributedContext
from animesion_training.engine import checkpoint, norms, optim, plan, runs, setup, texts
from animesion_training.engine.feed import feed
from animesion_training.engine.meter import DivergedError, Meter
from animesion_training.engine.origins import origins
from animesion_training.engine.update import StepReport, Update
from animesion_training.engine.validation import Evaluator
from animesion_training.engine.watcher import Watcher
from animesion_training.engine.writer import Writer, kept_state
from animesion_training.eval.metrics import Evaluation
from animesion_training.eval.similarity_report import Similarity
from animesion_training.eval.tag_metrics import TagEvaluation
from animesion_training.models import input_config
from animesion_training.models.create import bare
from animesion_training.precision import resolve
from animesion_training.recipe import TrainRecipe
from animesion_training.run_weights import BEST, FINAL
from animesion_training.text.facts import facts_of
from animesion_training.text.tokenizer import Texts
from animesion_training.weights import card_of, load_model, write_weights


class Trainer:
    """The state of a run.

    Args:
        recipe: of the run.
        data: the opened data.
        out: folder of the run.
        context: of this process.
        watcher: receives progress events; in the first process only.

    Attributes:
        step: optimizer steps done.
        model: the network.
        ema: the average of its weights, if the recipe has one.
        vocabulary: names of the tags that the network knows; empty if it reads none.
        texts: of the samples by split, for a network that reads tags.
        best_val: best top-1 accuracy on the validation split; mAP@R where its classes are not trained on; mAP of tags.
        best_epoch: its epoch, from 1.
        similarity: results on the test split, if its classes are not trained on.
        tagging: results on the test split, if the run trains on tags.
    """

    def __init__(
        self, recipe: TrainRecipe, data: DataSplits, out: Path, context: DistributedContext, watcher: Watcher
    ) -> None:
        self.recipe, self.data, self.out, self.context, self.watcher = recipe, data, out, context, watcher
        self.step = 0
        self.best_val, self.best_epoch = -1.0, 0
        self.stop_requested = False
        self.similarity: Similarity | None = None
        self.tagging: TagEvaluation | None = None
        self._resumed_at = 0
        self._position: dict[str, Any] = {}
        self._log: runs.Log | None = None
        settings, device = recipe.run, context.device
        if recipe.schedule.patience and (not recipe.data.val or recipe.data.val not in data.splits):
            raise UsageError("schedule.patience compares validation accuracies: name a validation split in data.val")
        self.precision = resolve(settings.precision, device)
        checkpoint.seed_generators(settings.seed, 0)  # the same initial weights in every process
        self.vocabulary = texts.tag_vocabulary(recipe, data)
        self.model = setup.build_model(recipe, data, device, vocabulary=self.vocabulary)
        if settings.sync_bn:
            norms.synchronise(self.model, recipe, context)
        checkpoint.seed_generators(settings.seed, context.rank)
        self.train_counts = setup.output_counts(data, recipe.data.train)
        teacher = setup.load_teacher(recipe, data, device)
        mixing = setup.build_mixing(recipe)
        # the same in every process: all draw the mixture of the whole batch
        self.mix_generator = torch.Generator().manual_seed(settings.seed * 1000)
        pairs = setup.needs_pairs(self.model, teacher, recipe, mixing)
        self.texts = texts.open_texts(recipe, data, self.vocabulary, length=setup.text_length(self.model))
        self.stream = setup.open_stream(recipe, data, context, teacher=teacher, pairs=pairs, notify=watcher.message)
        augment, normalise = setup.build_augmentation(recipe.augment, self.model)
        self.evaluator = Evaluator(
            recipe, data, context, watcher, normalise, self.precision, self.train_counts, self._evaluated_texts()
        )
        self.inputs = setup.build_inputs(recipe, data, augment, mixing, device)
        self.objective = setup.build_objective(recipe, self.train_counts, mixing, device)
        steps = len(self.stream) * recipe.schedule.epochs
        step = setup.build_step(recipe, self.model, self.objective, mixing, teacher, device, self.precision, steps)
        optimizer = optim.make_optimizer(self.model, recipe.optimizer, device, step.extra)
        self.schedule = optim.make_schedule(optimizer, recipe.schedule, len(self.stream))
        self.ema = optim.make_average(self.model, settings) if settings.ema else None
        self.update = Update(
            recipe,
            context,
            self.model,
            step,
            optimizer,
            precision=self.precision,
            ema=self.ema,
            smallest=2 if pairs else 1,
        )
        self.writer = Writer()
        if device.type != "cuda":  # what is written is not a copy
            self.update.before_change = self.writer.wait
        self.meter = Meter(settings.spike, settings.log_steps, self._advice)

    def _evaluated_texts(self) -> dict[str, Texts]:
        return self.texts if self.recipe.text.evaluate else {}

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Evaluation | None:
        """Train to the end, then evaluate the best weights on the test split."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals_deferred())
            stack.enter_context(contextlib.closing(self.writer))
            for line in self._plan():
                self.watcher.message(line)
            while self.stream.epoch < self.recipe.schedule.epochs and not self._stalled():
                self._epoch(stack)
        if self.recipe.data.test and self.recipe.data.test in self.data.splits:
            return self._test()
        return None

    def _stalled(self) -> bool:
        """Whether `schedule.patience` ends the run; it depends on the checkpointed state alone."""
        patience, done = self.recipe.schedule.patience, self.stream.epoch
        if not patience or not self.best_epoch or done - self.best_epoch < patience:
            return False
        self.watcher.message(
            f"the run ends after epoch {done}: no validation was better than that of epoch {self.best_epoch} "
            f"(schedule.patience = {patience})"
        )
        return True

    def _plan(self) -> list[str]:
        return plan.describe(
            self.recipe,
            self.data,
            self.model,
            self.context,
            self.out,
            precision=self.precision,
            steps=len(self.stream),
            done=self.step,
            pairs=self.stream.pairs or self.stream.partners,
        )

    def _open_log(self, stack: contextlib.ExitStack) -> None:
        """Claim the folder and open the log in the first process, once the first step has gone well."""
        if self.context.is_main and self._log is None:
            runs.claim(self.out, self.recipe, origins(self.recipe, self.data))
            self._log = stack.enter_context(contextlib.closing(runs.Log(self.out, self.recipe, self._resumed_at)))

    def _epoch(self, stack: contextlib.ExitStack) -> None:
        epoch, epochs, length = self.stream.epoch + 1, self.recipe.schedule.epochs, len(self.stream)
        self.watcher.started(epoch, epochs, length, self.step - (epoch - 1) * length)
        self.objective.set_epoch(epoch - 1)  # type: ignore[operator]
        norms.train_mode(self.update.parallel_step)
        self.meter.restart_clock()
        images, began = 0, time.perf_counter()
        for batch, position in feed(self.stream, self.context.device, self.texts.get(self.recipe.data.train)):
            self._position = position
            report = self.train_batch(batch)
            images += batch.total
            interval = self.recipe.run.save_steps
            # the end of the epoch writes a checkpoint anyway
            due = interval > 0 and self.step % interval == 0 and self.step < epoch * length
            if self.meter.add(self.step, report) or due:
                self.meter.read()
            self._open_log(stack)
            rate = float(self.update.optimizer.param_groups[-1]["lr"])
            speed = images / (time.perf_counter() - began)
            last = self.meter.last
            self.watcher.stepped(last.loss, rate, speed)
            if self._log and self.step % self.recipe.run.log_steps == 0:
                terms = {f"loss_{name}": value for name, value in last.terms.items()} if len(last.terms) > 1 else {}
                self._log.write(
                    "step", self.step, epoch, {"loss": last.loss, **terms, "lr": rate, "images_per_second": speed}
                )
            # one process stops at once; several when they read that one of them was asked to
            stop = self.meter.stop or (self.stop_requested and self.context.world_size == 1)
            if stop or due:
                self._settle()
                self.save()
            if stop:
                raise KeyboardInterrupt
        self._position = self.stream.state_dict()
        self._settle()
        self._open_log(stack)  # no step is left of an epoch that was stopped after its last one
        numbers = self._epoch_numbers(images / (time.perf_counter() - began))
        if self.recipe.data.val and self.recipe.data.val in self.data.splits:
            numbers |= self._validate(epoch)
        if self.context.is_main:
            self._save_weights(FINAL, epoch, numbers)
            if self._log:
                self._log.write("epoch", self.step, epoch, numbers)
        self.meter.start_epoch()
        self.save()
        self.watcher.ended(epoch, numbers)

    def train_batch(self, batch: Batch) -> StepReport:
        """Do one optimizer step with a batch on the device."""
        self.schedule.step_update(self.step)
        images, targets = self.inputs(batch, self.mix_generator)
        self.step += 1
        return self.update(
            images,
            targets,
            batch.seeds,
            batch.places,
            batch.total,
            number=self.step,
            stop=self.stop_requested,
            text=batch.text,
            pace=self.meter.pace,
        )

    def _epoch_numbers(self, speed: float) -> dict[str, float]:
        """The metrics of an epoch without those of the validation.

        Raises:
            UsageError: nothing could be read.
        """
        failures = self.context.all_gather((self.stream.skipped, self.stream.failures[:1]))
        skipped, first = sum(count for count, _ in failures), next((each[0] for _, each in failures if each), None)
        self.stream.forget_failures()
        if first:
            note = f"{skipped:,} images could not be read and were skipped; the first: {first.message}"
            if not self.meter.images:
                raise UsageError(f"none of the images of this epoch can be read: {first.message}")
            self.watcher.message(note)
        numbers = {"train_loss": self.meter.loss_sum / max(1, self.meter.images), "images_per_second": speed}
        return numbers | ({"skipped": skipped} if self.recipe.data.on_error == "skip" else {})

    def _settle(self) -> None:
        """Make sure that the state is worth keeping: read all losses, merge batch norms, check every number.

        Raises:
            DivergedError: a loss, weight or moment of the optimizer is not finite.
        """
        self.writer.wait()
        self.meter.read()
        models = [self.model, *([self.ema.module] if self.ema else [])]
        norms.reduce_statistics(models, self.context, self.update.take_passes())
        state = dict(zip(("model", "ema"), (each.state_dict() for each in models), strict=False))
        state["optimizer"] = self.update.optimizer.state_dict()["state"]
        # all processes raise, or none
        bad = next(filter(None, self.context.all_gather(checkpoint.not_finite(state))), "")
        if bad:
            raise DivergedError(
                f"{bad} is not finite after step {self.step}: lower optimizer.lr or clip; {self._advice()}"
            )

    def _advice(self) -> str:
        self.writer.wait()
        newest = runs.newest_checkpoint(self.out)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    # -- evaluation --------------------------------------------------------------------------------------------------

    @property
    def _eval_model(self) -> nn.Module:
        """The model that is evaluated and saved: the moving average of the weights when the recipe has one."""
        return self.ema.module if self.ema else self.model

    def _validate(self, epoch: int) -> dict[str, float]:
        """Evaluate the validation split, and keep the weights if they are the best so far."""
        numbers = self.evaluator.validate(self._eval_model)
        value = numbers[self.evaluator.best_metric]
        if value > self.best_val:
            self.best_val, self.best_epoch = value, epoch
            if self.context.is_main:
                self._save_weights(BEST, epoch, numbers)
        return numbers

    def _test(self) -> Evaluation | None:
        chosen = self.out / (BEST if self.best_epoch else FINAL)
        self.writer.wait()
        self.context.barrier()  # the first process may still be writing the weights
        model, card = load_model(chosen)
        model = model.to(self.context.device)
        facts = {"weights": chosen.name, "epoch": self.best_epoch}
        if self.data.tags is not None:
            self.tagging = self.evaluator.test_tags(model, self.out / "report", facts, card.thresholds)
            return None
        evaluation, self.similarity = self.evaluator.test(model, self.out / "report", facts)
        return evaluation

    # -- weights and checkpoints -------------------------------------------------------------------------------------

    def _save_weights(self, name: str, epoch: int, numbers: dict[str, float]) -> None:
        facts = {"recipe": self.recipe.name, "data": Path(self.data.path).name, "epoch": epoch, **numbers}
        if self.train_counts is not None:
            facts["train_counts"] = self.train_counts.tolist()
        facts |= facts_of(self.vocabulary, self.recipe.text.categories)
        inputs = input_config(self.model)
        model, crop_pct = self._eval_model, self.recipe.augment.crop_pct
        tags = self.data.tags
        card = card_of(
            model,
            self.data.classes if tags is None else tags.names,
            facts,
            mean=inputs.mean,
            std=inputs.std,
            crop_pct=crop_pct,
            tag_categories=None if tags is None else category_counts(tags.categories),
            thresholds=self.evaluator.thresholds,
        )
        self.writer.submit(partial(write_weights, self.out / name, card, kept_state(bare(model))))

    def save(self) -> None:
        """Write the checkpoint that the run can resume from, and keep the one before.

        The first process writes it in a thread. On a CPU, no copy is made, and the next update waits for it; a GPU's
        state is copied to the CPU.
        """
        # each process has its own random generators
        generators = self.context.all_gather(checkpoint.generator_state())
        if not self.context.is_main:
            return
        content = {
            "recipe": self.recipe.digest(),
            "epochs": self.recipe.schedule.epochs,
            "step": self.step,
            "best": [self.best_val, self.best_epoch],
            "losses": [self.meter.running_loss, self.meter.loss_sum, self.meter.images],
            "stream": self._position,
            "model": kept_state(bare(self.model)),
            "ema": kept_state(self.ema.module) if self.ema else {},
            "optimizer": self.update.optimizer.state_dict(),
            "scaler": self.update.scaler.state_dict(),
            "method": dict(self.update.step.method_state()),
            "mixing": self.mix_generator.get_state(),
            "generators": generators,
        }
        last, previous = self.out / runs.LAST, self.out / runs.PREVIOUS
        self.writer.submit(partial(checkpoint.save, last, checkpoint.to_host(content), previous=previous))

    def resume(self) -> None:
        """Continue from the newest checkpoint in the folder that can be read, if there is one.

        Raises:
            UsageError: no checkpoint can be read, or they are of another recipe or other data.
        """
        newest = runs.newest_checkpoint(self.out)
        if newest is None:
            return
        try:
            content = checkpoint.load(newest)
        except UsageError as error:
            previous = self.out / runs.PREVIOUS
            if newest == previous or not previous.exists():
                raise
            content, newest = checkpoint.load(previous), previous
            self.watcher.message(f"{error}; continuing from the one before, {previous}")
        try:
            self.restore(content)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{newest} is not of this run, or is damaged ({type(error).__name__}: {reason}): start a new one"
            ) from None

    def restore(self, content: dict[str, Any]) -> None:
        """Set the state of the run to that of a checkpoint.

        Raises:
            UsageError: the checkpoint is of another recipe or other data.
        """
        if content["recipe"] != self.recipe.digest():
            raise UsageError(f"{self.out / runs.LAST} is of a run with other settings: give the same recipe")
        if self.recipe.schedule.epochs < content["epochs"]:
            raise UsageError(
                f"schedule.epochs: the run in {self.out} has {content['epochs']} epochs, and fewer would change the "
                "steps that are done; more are possible"
            )
        self.step = self._resumed_at = content["step"]
        self.best_val, self.best_epoch = content["best"]
        self.meter.running_loss, loss_sum, images = content["losses"]
        self.meter.start_epoch(loss_sum, images)
        self.stream.load_state_dict(content["stream"])
        bare(self.model).load_state_dict(content["model"])
        if self.ema:
            self.ema.module.load_state_dict(content["ema"])
        self.update.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:  # empty in another precision
            self.update.scaler.load_state_dict(content["scaler"])
        self.update.step.load_method_state(content["method"])
        self.mix_generator.set_state(content["mixing"])
        if len(content["generators"]) == self.context.world_size:
            checkpoint.restore_generators(content["generators"][self.context.rank])
        else:  # another number of processes: same batches, but new draws for dropout
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
