"""What a training run is: the recipe model and the built-in recipes.

Where the data lies, where the run goes and what it runs on is the command line's. Read as every recipe is
(`animesion.config.settings`); what the values mean is done in the module named by each section.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, StringConstraints, model_validator

from animesion.config import settings
from animesion.config.settings import Section

PACKAGE = "animesion_training"

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
Scalar = bool | int | float | str
Number = Annotated[float, Field(strict=False)]
Range = tuple[float, float]


class DataSection(Section):
    """What is read, and in which proportions."""

    train: str = Field("train", description="split that is trained on")
    val: str = Field("val", description="split that is watched after each epoch; empty for none")
    test: str = Field("test", description="split that is measured at the end; empty for none")
    sampling: Literal["instance", "class-balanced", "square-root", "progressive"] = Field(
        "instance", description="how often each class is seen: as it comes, all alike, in between, or moving over"
    )
    cache: Literal["none", "ram", "device"] = Field("none", description="decode once into memory of this kind")
    on_error: Literal["raise", "skip"] = Field("raise", description="an image that cannot be read: stop, or count it")
    workers: int = Field(-1, ge=-1, le=256, description="decoding threads; -1 for one a core, 0 for none")


class ModelSection(Section):
    """The network."""

    name: str = Field("resnet18", description="any timm model, or one of ours; `animesion models` lists them")
    head: str = Field("linear", description="classifier: linear, cosine, ifa, cla, or another that `models` lists")
    selector: str = Field("", description="how parts are found: cal, glsim, ...; empty for not at all")
    reduction: str = Field("", description="token reduction: evit, tome, ...; empty for none")
    keep_rate: Number | list[Number] = Field(1.0, description="share of tokens kept, at all reductions or at each")
    reduction_layers: list[int] = Field([], description="blocks that reduce, from 0; empty for the method's own")
    cache: str = Field("", description="cross-layer cache: clc, or empty for none")
    adapter: str = Field("", description="adapter between or in blocks: ila, adapter, lora, ...; empty for none")
    img_size: int = Field(128, ge=16, le=2048, description="side of the square input in pixels")
    pretrained: bool = Field(False, description="start from timm's published weights; needs the network once")
    init: str = Field("", description="weights file to start from; a head of another number of classes is replaced")
    reset_head: bool = Field(False, description="with init: draw the head anew although it would fit")
    freeze: list[str] = Field([], description="parameters not trained: name prefixes or shell patterns, `backbone`")
    options: dict[str, Scalar] = Field({}, description="passed to the model, such as drop_path_rate")
    method_options: dict[str, dict[str, Scalar | list[int] | list[float]]] = Field(
        {}, description="passed to head, selector, reduction, cache or adapter, by that name"
    )

    def methods(self) -> Any:
        """The fine-grained methods, as `create_model` takes them.

        Raises:
            UsageError: values that make no sense.
        """
        from animesion_training.models.methods import Methods  # not before torch is wanted

        options = {name: value for name, value in self.method_options.items() if name != "head"}
        rate = tuple(self.keep_rate) if isinstance(self.keep_rate, list) else self.keep_rate
        layers = tuple(self.reduction_layers)
        return Methods(self.reduction, rate, layers, self.cache, self.adapter, self.selector, options)


class AugmentSection(Section):
    """What is done to training images; `animesion_training.data` does it."""

    crop: Literal["random-resized", "resize-crop"] = Field(
        "random-resized", description="random area and aspect, or square resize to img_size + margin and random crop"
    )
    scale: tuple[float, float] = Field((0.35, 1.0), strict=False, description="share of the area, for random-resized")
    ratio: tuple[float, float] = Field((0.75, 4 / 3), strict=False, description="aspect, for random-resized")
    margin: float = Field(
        32, ge=0, strict=False, description="for resize-crop: pixels, or below 1 a share of the side, as 0.34"
    )
    crop_pct: float = Field(
        1.0, gt=0, le=1, strict=False, description="share of the resized square's side that evaluation looks at"
    )
    flip: float = Field(0.5, ge=0, le=1, strict=False, description="probability of a horizontal flip")
    color_jitter: float = Field(0.1, ge=0, le=1, strict=False, description="brightness, contrast, saturation; hue too")
    trivial: bool = Field(False, description="TrivialAugmentWide: one random operation of random strength")
    erasing: float = Field(0.0, ge=0, le=1, strict=False, description="probability of random erasing")
    mixup: float = Field(0.0, ge=0, strict=False, description="alpha of MixUp's beta distribution; 0 switches it off")
    cutmix: float = Field(0.0, ge=0, strict=False, description="alpha of CutMix's beta distribution; 0 switches it off")
    mix_probability: float = Field(1.0, ge=0, le=1, strict=False, description="share of batches that are mixed")


class ObjectiveSection(Section):
    """What is minimised; `animesion_training.losses.objectives` has them."""

    name: str = Field("cross-entropy", description="name of the objective")
    smoothing: float = Field(0.0, ge=0, lt=1, strict=False, description="label smoothing")
    options: dict[str, Scalar] = Field({}, description="passed to the objective, such as gamma or beta")


class ViewsSection(Section):
    """Crops and drops that attention maps make of an image: for training a CAL teacher, and for TGDA."""

    maps: int = Field(0, ge=0, description="how many of the maps may be drawn; 0 for all")
    sample: bool = Field(True, description="draw a map for each view; else both come from the mean of the maps")
    crop: Range = Field((0.4, 0.6), strict=False, description="range of the crop's threshold, as a share of the peak")
    drop: Range = Field((0.2, 0.5), strict=False, description="range of the drop's threshold")
    padding: float = Field(0.1, ge=0, le=1, strict=False, description="around a crop, as a share of the image")


class TeacherSection(Section):
    """Distillation from a trained network; without weights there is none."""

    weights: str = Field("", description="weights file of the teacher; empty trains on labels alone")
    img_size: int = Field(0, ge=0, le=2048, description="side of the teacher's images; 0 for its own")
    views: bool = Field(False, description="distil also on crops and drops that the teacher's attention makes (TGDA)")
    temperature: float = Field(7.0, gt=0, strict=False, description="softens both outputs")
    weight: float = Field(10 / 49, ge=0, strict=False, description="of the distillation, times temperature squared")
    label_weight: float = Field(1.0, ge=0, strict=False, description="of the objective on the labels")
    view_weights: tuple[float, float, float] = Field(
        (0.5, 0.5, 0.5), strict=False, description="of image, crop and drop within the distillation"
    )
    train_mode: bool = Field(False, description="leave norms and stochastic depth in training mode, as the original")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on a GPU that has it")
    compile: bool = Field(False, description="torch.compile the teacher")
    antialias: bool = Field(True, description="when views are shrunk for the student; the original does not")
    auxiliary: str = Field("", description="a further loss on the images' logits: dkd, rkd, pkt, hint, ...")
    auxiliary_weight: float = Field(1.0, ge=0, strict=False, description="of the further loss")


class OptimizerSection(Section):
    """How weights move; any optimizer of timm by name."""

    name: str = Field("sgd", description="any of timm's, such as sgd, adamw or lamb")
    lr: float = Field(0.05, gt=0, strict=False, description="at batch_size, before the schedule")
    momentum: float = Field(0.9, ge=0, lt=1, strict=False, description="of optimizers that have one")
    weight_decay: float = Field(5e-4, ge=0, strict=False, description="not on biases and norms")
    layer_decay: float = Field(1.0, gt=0, le=1, strict=False, description="factor of the rate from layer to layer down")
    clip: float = Field(0.0, ge=0, strict=False, description="largest norm of the gradient; 0 switches it off")


class ScheduleSection(Section):
    """How long, and how the rate changes, by optimizer step."""

    epochs: int = Field(30, ge=1, description="rounds over the training split")
    kind: Literal["cosine", "cosine-late", "step", "constant"] = Field(
        "cosine",
        description="course after the warm-up; cosine-late is the fine-grained papers': cosine over all steps, the "
        "warm-up laid over its start at full length, each rate used one step late",
    )
    warmup_steps: int = Field(100, ge=0, description="linear from warmup_lr; at most a quarter of all steps")
    warmup_lr: float = Field(1e-6, ge=0, strict=False, description="rate of the first step")
    min_lr: float = Field(0.0, ge=0, strict=False, description="where cosine ends")
    step_epochs: int = Field(20, ge=1, description="for step: epochs between drops")
    step_factor: float = Field(1 / 3, gt=0, lt=1, strict=False, description="for step: factor of each drop")


class RunSection(Section):
    """How it is computed."""

    batch_size: int = Field(64, ge=1, description="images in one optimizer step, over all processes")
    accumulate: int = Field(1, ge=1, description="pieces that a process's share of the batch is computed in")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the forward pass; weights stay fp32")
    channels_last: bool = Field(True, description="memory format of images; faster for convolutions")
    compile: bool = Field(False, description="torch.compile the network")
    checkpointing: bool = Field(False, description="recompute activations to save memory, where the model can")
    ema: float = Field(0.0, ge=0, lt=1, strict=False, description="decay of the averaged weights; 0 for none")
    seed: int = Field(0, ge=0, description="of all chance: weights, order, augmentation")
    deterministic: bool = Field(False, description="only algorithms that repeat to the bit; slower on GPUs")
    save_steps: int = Field(0, ge=0, description="checkpoints between those at epoch ends; 0 for none")
    spike: float = Field(0.0, ge=0, strict=False, description="stop when the loss is so many times its running mean")
    log_steps: int = Field(20, ge=1, description="steps between lines of metrics")
    tensorboard: bool = Field(False, description="also log to TensorBoard")
    wandb: Literal["off", "online", "offline"] = Field("off", description="also log to Weights & Biases")


class TrainRecipe(Section):
    """A training run, resolved: every default filled in."""

    name: Name = Field(description="name of the run's kind")
    summary: str = Field("", description="one line on what it is for")
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    augment: AugmentSection = AugmentSection()
    objective: ObjectiveSection = ObjectiveSection()
    views: ViewsSection = ViewsSection()
    teacher: TeacherSection = TeacherSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in ("scale", "ratio"):
            low, high = getattr(self.augment, name)
            if not 0 < low <= high:
                raise ValueError(f"augment.{name} is [low, high] with 0 < low <= high, not [{low}, {high}]")
        for name in ("crop", "drop"):
            low, high = getattr(self.views, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"views.{name} is [low, high] with 0 <= low <= high <= 1, not [{low}, {high}]")
        if min(self.teacher.view_weights) < 0:
            raise ValueError("teacher.view_weights are 0 or more")
        if self.augment.scale[1] > 1:
            raise ValueError("augment.scale is a share of the area: at most 1")
        if self.model.pretrained and self.model.init:
            raise ValueError("model.pretrained and model.init both say what to start from: give one")
        if self.run.accumulate > self.run.batch_size:
            raise ValueError("run.accumulate cuts a batch into more pieces than it has images")
        return self

    def to_toml(self) -> str:
        """The resolved recipe, as it is written into the run's folder."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 over every value; equal digests mean equal recipes."""
        return settings.params_digest(self.model_dump(mode="json"))


def builtin_names() -> list[str]:
    """Names of the training recipes that come with the package."""
    return settings.builtin_names(PACKAGE)


def load(name_or_path: str, overrides: Iterable[str] = (), changes: dict[str, Any] | None = None) -> TrainRecipe:
    """Read a built-in training recipe or a TOML file.

    Args:
        name_or_path: built-in name, or path.
        overrides: `key.path=value`, applied last.
        changes: values by `section.key`, as options of a command give them; None is passed over.

    Raises:
        UsageError: one sentence for the first mistake.
    """
    data, where = settings.read(PACKAGE, name_or_path)
    for key, value in (changes or {}).items():
        if value is not None:
            section, _, name = key.partition(".")
            data.setdefault(section, {})[name] = value
    for override in overrides:
        settings.apply(data, override)
    return settings.check(TrainRecipe, data, where)
