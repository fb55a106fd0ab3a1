"""The training loop: read top to bottom, it is what happens.

A run is a function of its recipe and data: all chance comes from seeds, the batch is the same however many processes
share it, and a run that is killed goes on from its last checkpoint with the same losses. What the parts do is theirs:
`data`, `models`, `objectives`, `optimizing`, `evaluating`, `state`, `runs`.
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
from animesion_training.data import (
    Augment,
    Batch,
    CachedStream,
    ColorJitter,
    DataSplits,
    RandomErasing,
    RandomResizedCrop,
    ResizeRandomCrop,
    Stream,
    TrivialAugmentWide,
    cache_samples,
    open_data,
)
from animesion_training.data.mixing import Mixing, mix
from animesion_training.engine import checkpoint, optim, runs, steps
from animesion_training.engine.distributed import DistributedContext, distributed_context
from animesion_training.eval import evaluate
from animesion_training.eval.metrics import Evaluation
from animesion_training.losses.objectives import create_objective, objective_options
from animesion_training.models import create_model, input_config, load_weights
from animesion_training.models.cal import CALClassifier
from animesion_training.models.create import bare
from animesion_training.recipe import TrainRecipe
from animesion_training.weights import load_model, save_model


class DivergedError(AnimesionError):
    """The loss became NaN or infinite, or shot up; the last checkpoint is from before."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

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
    """What a run tells while it runs; this one keeps silent."""

    def message(self, text: str) -> None:
        """A sentence worth showing."""

    def started(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """An epoch (from 1) of so many steps begins, or goes on after `done` of them."""

    def stepped(self, loss: float, rate: float, speed: float) -> None:
        """A step is done: its loss, the learning rate, images a second."""

    def ended(self, epoch: int, numbers: dict[str, float]) -> None:
        """An epoch is done."""


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
    """Train a model, or go on with a run.

    Args:
        recipe: what to do.
        data_path: a built dataset, class folders or label files; see `animesion_training.data.open_data`.
        out: folder of the run.
        images: image root of label files.
        resume: go on from the folder's last checkpoint if there is one.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        watcher: told what happens, in the first process.

    Raises:
        UsageError: the recipe does not fit the data or the folder.
        BusyError: another run holds the folder.
        DivergedError: the loss is not finite any more, or has shot up.
    """
    start = time.perf_counter()
    data = open_data(data_path, images=images)
    with distributed_context(device) as context, _held(out, recipe, context, resume=resume):
        trainer = _Trainer(recipe, data, out, context, (watcher or Watcher()) if context.is_main else Watcher())
        if resume and (out / runs.LAST).exists():
            trainer.restore(checkpoint.load(out / runs.LAST))
        test = trainer.run()
    return Outcome(out, trainer.step, trainer.best_epoch, trainer.best_val, test, time.perf_counter() - start)


@contextlib.contextmanager
def _held(out: Path, recipe: TrainRecipe, context: DistributedContext, *, resume: bool) -> Iterator[None]:
    """The first process holds the folder for all; if it cannot, all stop with its sentence."""
    with contextlib.ExitStack() as stack:
        problem: AnimesionError | None = None
        if context.is_main:
            try:
                stack.enter_context(runs.claimed(out, recipe, resume=resume))
            except AnimesionError as error:
                problem = error
        problem = context.gathered(problem)[0]
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
        self.parts: dict[str, float] = {}
        self.told_to_stop = False
        settings = recipe.run
        if settings.batch_size % context.world_size:
            raise UsageError(
                f"run.batch_size {settings.batch_size} is over all processes and cannot be shared by {context.world_size}"
            )
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
        checkpoint.seed_generators(settings.seed, 0)  # the same weights in every process
        self.model = self._model()
        checkpoint.seed_generators(settings.seed, context.rank)
        self.counts = evaluate.train_counts(data, recipe.data.train)
        self.teacher, self.teacher_size = self._teacher()
        self.stream = self._stream()
        self.augment, self.normalise = self._augmentation()
        self.mixing = Mixing(
            recipe.augment.mixup,
            recipe.augment.cutmix,
            recipe.augment.mix_probability,
            label_smoothing=recipe.objective.smoothing,
        )
        self.mix_generator = torch.Generator().manual_seed(settings.seed * 1000 + context.rank)
        self.objective = self._objective()
        self.optimizer = optim.make_optimizer(self.model, recipe.optimizer)
        self.schedule = optim.make_schedule(self.optimizer, recipe.schedule, len(self.stream))
        self.ema = ModelEmaV3(self.model, decay=settings.ema) if settings.ema else None
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=settings.precision == "fp16")
        self.forward = self._forward()
        self.stepping: nn.Module = self.forward
        if context.world_size > 1:
            on = [context.device] if context.device.type == "cuda" else None
            self.stepping = nn.parallel.DistributedDataParallel(self.forward, device_ids=on)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _model(self) -> nn.Module:
        settings = self.recipe.model
        options: dict[str, Any] = dict(settings.options)
        model = create_model(
            settings.name,
            self.data.num_classes,
            settings.img_size,
            settings.head,
            pretrained=settings.pretrained,
            methods=settings.methods(),
            head_options=settings.method_options.get("head"),
            **options,
        )
        if settings.init:
            load_weights(model, settings.init, new_head=settings.reset_head)
        optim.freeze(model, settings.freeze)
        if self.recipe.run.checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise UsageError(f"run.checkpointing: {settings.name} cannot recompute its activations")
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        model = model.to(self.context.device)
        return model.to(memory_format=torch.channels_last) if self.recipe.run.channels_last else model

    def _teacher(self) -> tuple[nn.Module | None, int]:
        """The network that teaches, and the side of the images that it takes."""
        settings = self.recipe.teacher
        if not settings.weights:
            if settings.views:
                raise UsageError("teacher.views are made by a teacher: give its weights with --teacher")
            return None, 0
        teacher, card = load_model(settings.weights)
        evaluate.check_classes(card.classes, self.data, f"the teacher {settings.weights}")
        if settings.views and not isinstance(teacher, CALClassifier):
            raise UsageError(
                f"teacher.views: {settings.weights} is {card.name} without attention maps; train a teacher with "
                "`animesion train --recipe cal-teacher`, or switch teacher.views off"
            )
        if not isinstance(card.img_size, int):
            raise UsageError(f"the teacher {settings.weights} takes images of {card.img_size}: only squares are made")
        size = settings.img_size or card.img_size
        resize: Any = getattr(teacher, "set_input_size", None)
        if size != card.img_size and resize:
            resize(img_size=(size, size))
        return teacher.to(self.context.device), size

    def _stream(self) -> Any:
        augment, settings = self.recipe.augment, self.recipe.data
        size = max(self.recipe.model.img_size, self.teacher_size)
        margin = int((1 + augment.margin) * size) - size if augment.margin < 1 else int(augment.margin)
        transform = (
            RandomResizedCrop(size, augment.scale, augment.ratio)
            if augment.crop == "random-resized"
            else ResizeRandomCrop(size, margin)
        )
        common: dict[str, Any] = {
            "sampling": settings.sampling,
            "epochs": self.recipe.schedule.epochs,
            "seed": self.recipe.run.seed,
            "rank": self.context.rank,
            "world_size": self.context.world_size,
        }
        batch = self.recipe.run.batch_size // self.context.world_size
        if settings.cache != "none":
            resident = cache_samples(
                self.data,
                settings.train,
                size,
                where=settings.cache,
                device=self.context.device,
                notify=self.watcher.message,
            )
            return CachedStream(resident, batch, size, device=self.context.device, transform=transform, **common)
        return Stream(
            self.data,
            settings.train,
            batch,
            size,
            transform=transform,
            workers="auto" if settings.workers < 0 else settings.workers,
            on_error=settings.on_error,
            **common,
        )

    def _augmentation(self) -> tuple[Augment, Augment]:
        settings, inputs = self.recipe.augment, input_config(self.model)
        jitter = settings.color_jitter
        mean, std = evaluate.three(inputs.mean), evaluate.three(inputs.std)
        return (
            Augment(
                mean=mean,
                std=std,
                flip=settings.flip,
                jitter=ColorJitter(jitter, jitter, jitter, jitter / 2) if jitter else None,
                erasing=RandomErasing(settings.erasing) if settings.erasing else None,
                trivial=TrivialAugmentWide() if settings.trivial else None,
            ),
            Augment.plain(mean, std),
        )

    def _objective(self) -> nn.Module:
        settings = self.recipe.objective
        options = dict(settings.options)
        # mixed labels are smoothed as they are mixed
        if settings.smoothing and not self.mixing.active:
            if "label_smoothing" not in objective_options(settings.name):
                raise UsageError(f"objective.smoothing: '{settings.name}' takes no label smoothing; set it to 0")
            options["label_smoothing"] = settings.smoothing
        made = create_objective(settings.name, self.counts, epochs=self.recipe.schedule.epochs, **options)
        return made.to(self.context.device)

    def _forward(self) -> steps.Step:
        settings = self.recipe.run
        network: nn.Module = torch.compile(self.model) if settings.compile else self.model  # type: ignore[assignment]

        def autocast() -> contextlib.AbstractContextManager[None]:
            return evaluate.computed_in(settings.precision, self.context.device)

        step: steps.Step
        if self.teacher is not None:
            step = self._distillation(network, autocast)
        elif isinstance(self.model, CALClassifier):
            if self.mixing.active:
                raise UsageError("a CAL teacher needs one class an image: switch augment.mixup and augment.cutmix off")
            smoothing = self.recipe.objective.smoothing
            step = steps.CALStep(network, autocast, self.model, self.recipe.views, smoothing=smoothing)
        else:
            step = steps.Step(network, self.objective, autocast, self.model)
        return step.to(self.context.device)

    def _distillation(self, network: nn.Module, autocast: steps.Autocast) -> steps.Step:
        settings, device = self.recipe.teacher, self.context.device
        teacher = self.teacher
        assert teacher is not None
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = ("bf16" if fast else "fp32") if settings.precision == "auto" else settings.precision
        takes = steps.Resolution(self.teacher_size, input_config(teacher))
        if settings.compile:
            teacher = torch.compile(teacher)  # type: ignore[assignment]

        def teacher_autocast() -> contextlib.AbstractContextManager[None]:
            return evaluate.computed_in(precision, device)

        return steps.DistilStep(
            network,
            self.objective,
            autocast,
            self.model,
            teacher,
            teacher_autocast,
            settings,
            self.recipe.views,
            steps.Resolution(self.recipe.model.img_size, input_config(self.model)),
            takes,
        )

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Evaluation | None:
        """Train to the end, then evaluate the best weights on the test split."""
        log = runs.Log(self.out, self.recipe, self.step) if self.context.is_main else None
        with contextlib.closing(log) if log else contextlib.nullcontext(), self._stopping_between_steps():
            while self.stream.epoch < self.recipe.schedule.epochs:
                self._epoch(log)
        if self.recipe.data.test and self.recipe.data.test in self.data.splits:
            return self._test()
        return None

    def _epoch(self, log: runs.Log | None) -> None:
        epoch, epochs, length = self.stream.epoch + 1, self.recipe.schedule.epochs, len(self.stream)
        self.watcher.started(epoch, epochs, length, self.step - (epoch - 1) * length)
        self.objective.set_epoch(epoch - 1)  # type: ignore[operator]
        optim.train_mode(self.stepping)
        losses, seen, began = 0.0, 0, time.perf_counter()
        for batch in self.stream:
            loss, count = self._step(batch)
            losses, seen = losses + loss * count, seen + count
            rate = float(self.optimizer.param_groups[-1]["lr"])
            speed = seen / (time.perf_counter() - began)
            self.watcher.stepped(loss, rate, speed)
            if log and self.step % self.recipe.run.log_steps == 0:
                parts = {f"loss_{name}": value for name, value in self.parts.items()}
                log.write("step", self.step, epoch, {"loss": loss, **parts, "lr": rate, "images_per_second": speed})
            # all processes must agree: one that was told to stop alone would leave the others waiting
            stop = any(self.context.total(float(self.told_to_stop)))
            ends = self.recipe.run.save_steps
            if stop or (ends and self.step % ends == 0 and self.step < epoch * length):
                self.save()
            if stop:
                raise KeyboardInterrupt
        numbers = {"train_loss": losses / max(1, seen), "images_per_second": seen / (time.perf_counter() - began)}
        if self.recipe.data.val and self.recipe.data.val in self.data.splits:
            numbers |= self._validate(epoch)
        if self.context.is_main:
            self._save_weights(runs.FINAL, epoch, numbers)
            if log:
                log.write("epoch", self.step, epoch, numbers)
        self.save()
        self.watcher.ended(epoch, numbers)

    def _step(self, batch: Batch) -> tuple[float, int]:
        """One optimizer step; returns the mean loss over the global batch and its size."""
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
        [count] = map(int, self.context.total(len(labels)))
        sums: dict[str, Tensor] = {}
        pieces = min(settings.accumulate, len(labels))
        for i, piece in enumerate(zip(images.chunk(pieces), targets.chunk(pieces), seeds.chunk(pieces), strict=True)):
            with self._synchronised(last=i == pieces - 1):
                # means over the global batch, whatever share of it this process and piece have
                terms = {name: term * (len(piece[0]) / count) for name, term in self.stepping(*piece).items()}
                loss: Any = self.scaler.scale(steps.total(terms) * self.context.world_size)
                loss.backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.detach()
        parts = dict(zip(sums, self.context.total(*map(float, sums.values())), strict=True))
        mean = sum(parts.values())
        self._check(mean, parts)
        self.scaler.unscale_(self.optimizer)
        if self.recipe.optimizer.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema:
            self.ema.update(self.model, step=self.step)
        self.parts = parts if len(parts) > 1 else {}
        return mean, count

    def _synchronised(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients of all processes are added up once a step, with the last piece."""
        if isinstance(self.stepping, nn.parallel.DistributedDataParallel) and not last:
            return self.stepping.no_sync()
        return contextlib.nullcontext()

    def _check(self, loss: float, parts: dict[str, float]) -> None:
        last = self.out / runs.LAST
        advice = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        if not math.isfinite(loss):
            bad = ", ".join(name for name, value in parts.items() if not math.isfinite(value))
            where = f" (its part {bad})" if len(parts) > 1 else ""
            raise DivergedError(f"the loss{where} is {loss} at step {self.step}: lower optimizer.lr or clip; {advice}")
        spike = self.recipe.run.spike
        if spike and self.step > 100 and loss > spike * self.running_loss:
            raise DivergedError(
                f"the loss shot up to {loss:.3g} at step {self.step}, from about {self.running_loss:.3g}: lower "
                f"optimizer.lr or clip; {advice}"
            )
        self.running_loss = loss if self.step == 0 else 0.98 * self.running_loss + 0.02 * loss

    # -- looking at it -----------------------------------------------------------------------------------------------

    @property
    def _used(self) -> nn.Module:
        """The weights that are judged and published: the averaged ones when there are any."""
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
        scores = self._score(self._used, split)
        numbers: dict[str, float] = {}
        if self.context.is_main:
            complete = self.recipe.data.on_error == "raise"
            found = evaluate.judged(scores, self.data, split, self.counts, complete=complete)
            numbers = {"val_top_1": found.top_1, "val_top_5": found.top_5, "val_macro": found.macro_accuracy}
            numbers["val_nll"] = found.calibration.nll
        numbers = self.context.gathered(numbers)[0]
        if numbers["val_top_1"] > self.best_val:
            self.best_val, self.best_epoch = numbers["val_top_1"], epoch
            if self.context.is_main:
                self._save_weights(runs.BEST, epoch, numbers)
        return numbers

    def _test(self) -> Evaluation | None:
        split = self.recipe.data.test
        chosen = self.out / (runs.BEST if self.best_epoch else runs.FINAL)
        self.context.wait()  # until the first process has written it
        model, _ = load_model(chosen)
        scores = self._score(model.to(self.context.device), split)
        if not self.context.is_main:
            return None
        complete = self.recipe.data.on_error == "raise"
        found = evaluate.judged(scores, self.data, split, self.counts, complete=complete)
        facts = {"data": self.data.path, "split": split, "weights": chosen.name, "epoch": self.best_epoch}
        evaluate.write_report(self.out / "report", found, facts, scores, self.data, split)
        return found

    # -- keeping it --------------------------------------------------------------------------------------------------

    def _save_weights(self, name: str, epoch: int, numbers: dict[str, float]) -> None:
        facts = {"recipe": self.recipe.name, "data": Path(self.data.path).name, "epoch": epoch, **numbers}
        if self.counts is not None:
            facts["train_counts"] = self.counts.tolist()
        inputs = input_config(self.model)
        save_model(
            self._used,
            self.out / name,
            self.data.classes,
            facts,
            mean=inputs.mean,
            std=inputs.std,
            crop_pct=self.recipe.augment.crop_pct,
        )

    def save(self) -> None:
        """Write the checkpoint that a later call goes on from."""
        # chance belongs to a process: each has its own generators
        generators = self.context.gathered({**checkpoint.generators(), "mix": self.mix_generator.get_state()})
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
                "method": dict(self.forward.kept()),
                "generators": generators,
            },
        )

    def restore(self, content: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UsageError: it is of another recipe or other data.
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
        self.forward.restore(content["method"])
        mine = content["generators"][self.context.rank : self.context.rank + 1]
        if len(content["generators"]) == self.context.world_size and mine:
            checkpoint.restore_generators(mine[0])
            self.mix_generator.set_state(mine[0]["mix"])
        else:  # another number of processes: the data is the same, dropout and mixing draw anew
            checkpoint.seed_generators(self.recipe.run.seed + self.step, self.context.rank)

    @contextlib.contextmanager
    def _stopping_between_steps(self) -> Iterator[None]:
        """Ctrl-C, and SIGTERM as a cluster sends it before it kills, wait for the end of the step; then it is saved."""

        def told(number: int, frame: FrameType | None) -> None:
            if self.told_to_stop:  # twice: the person means now
                raise KeyboardInterrupt
            self.told_to_stop = True

        before: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs it stops it
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, told)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
