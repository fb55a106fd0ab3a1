"""Build the components of a training run from its recipe: model, teacher, stream, augmentation, objective and step.

Optimizer and schedule are built in `optim`. The training loop in `loop` fixes the order of the calls, which matters:
models draw their initial weights from the global generators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch._dynamo
from torch import nn

from animesion.errors import UsageError
from animesion_training.data import (
    Augment,
    CachedStream,
    ColorJitter,
    DataSplits,
    RandomErasing,
    RandomResizedCrop,
    ResizeRandomCrop,
    Stream,
    TrivialAugmentWide,
    blend,
    cache_samples,
    open_data,
)
from animesion_training.data.mixing import Mixing
from animesion_training.data.tags import TagTargets
from animesion_training.distributed import DistributedContext
from animesion_training.engine import norms, optim, steps
from animesion_training.engine.distil import DistilStep, NetworkInput
from animesion_training.engine.inputs import Inputs
from animesion_training.engine.masked import MaskedStep
from animesion_training.engine.teaching import Teaching
from animesion_training.eval import evaluate
from animesion_training.eval.reading import as_rgb
from animesion_training.losses.metric import ComparingObjective
from animesion_training.losses.objectives import create_objective, is_on_tags, objective_options
from animesion_training.models import create_model, input_config, load_weights
from animesion_training.models.cal import CALClassifier
from animesion_training.models.embedding import last_layer
from animesion_training.models.heads import CosineHead
from animesion_training.models.shorthand import split_name
from animesion_training.precision import autocast, resolve
from animesion_training.recipe import AugmentSection, TrainRecipe
from animesion_training.text.tokenizer import SPECIAL_TOKENS
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.tag_text import TagText
from animesion_training.weights import load_model


class Teacher(NamedTuple):
    """A network to distil from, and the side of its square input in pixels."""

    network: nn.Module
    size: int


def open_datasets(
    recipe: TrainRecipe, path: Path | str, images: Path | str | None = None
) -> tuple[DataSplits, list[str]]:
    """Open the data of a run, blended with the further datasets of its recipe.

    Args:
        recipe: names further datasets.
        path: a built dataset, class folders or label files.
        images: image root of label files.

    Returns:
        The data, and a sentence on each further dataset.

    Raises:
        UsageError: one of them cannot be read or does not fit.
    """
    if is_on_tags(recipe.objective.name):
        if recipe.data.blend:
            raise UsageError(f"data.blend: '{recipe.objective.name}' trains on the tags of one dataset: leave it out")
        data = open_data(path, images=images, tags=True)
        assert data.tags is not None
        wanted = recipe.tags.categories
        return replace(data, tags=data.tags.only(wanted) if wanted else data.tags), []
    data = open_data(path, images=images)
    if not recipe.data.blend:
        return data, []
    others = {name: (open_data(name), weight) for name, weight in recipe.data.blend.items()}
    return blend(data, recipe.data.train, others)


def num_outputs(data: DataSplits) -> int:
    """Number of outputs of a network: classes, or tags if the data was opened with tags."""
    return data.num_classes if data.tags is None else len(data.tags)


def output_counts(data: DataSplits, split: str) -> Any:
    """Training images of each class or tag, (C,); None when the data has no such split."""
    if data.tags is None or split not in data.splits:
        return evaluate.train_counts(data, split)
    return data.tags.counts(split)


def build_inputs(
    recipe: TrainRecipe, data: DataSplits, augment: Augment, mixing: Mixing, device: torch.device
) -> Inputs:
    """What makes the input of a step from a batch, with classes or tags as targets."""
    tags = None
    if data.tags is not None:
        tags = TagTargets(data.tags.assigned[recipe.data.train], len(data.tags), device)
    return Inputs(augment, mixing, num_outputs(data), channels_last=recipe.run.channels_last, tags=tags)


def build_model(
    recipe: TrainRecipe, data: DataSplits, device: torch.device, *, vocabulary: tuple[str, ...] = ()
) -> nn.Module:
    """Create the network on the device, with initial weights loaded and parameters frozen as the recipe requests.

    Args:
        recipe: of the run.
        data: the opened data.
        device: of the network.
        vocabulary: names of the tags that it reads; empty if it reads none.

    Raises:
        UsageError: unknown names, unusable weights, or a network that cannot recompute its activations.
    """
    settings = recipe.model
    options: dict[str, Any] = dict(settings.options)
    methods = settings.methods()
    if vocabulary:
        text = methods.of("text") | {"vocab_size": len(SPECIAL_TOKENS) + len(vocabulary)}
        named = split_name(settings.name)[1].text
        methods = replace(methods, text=methods.text or named, options={**methods.options, "text": text})
    model = create_model(
        settings.name,
        num_outputs(data),
        settings.img_size,
        settings.head,
        pretrained=settings.pretrained,
        methods=methods,
        head_options=settings.method_options.get("head"),
        **options,
    )
    if data.tags is not None and recipe.tags.prior:
        start_at_prior(model, data.tags.counts(recipe.data.train), len(data.select(recipe.data.train)))
    if settings.init:
        load_weights(model, settings.init, new_head=settings.reset_head)
    optim.freeze(model, settings.freeze)
    if recipe.run.checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UsageError(f"run.checkpointing: {settings.name} cannot recompute its activations")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if recipe.run.channels_last else model


def start_at_prior(model: nn.Module, counts: Any, images: int) -> None:
    """Set the bias of the last layer to the log-odds of the tags, so that the first loss is not one of a coin per tag.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017 (arXiv 1708.02002), section 3.3, with the prior of
    each tag in place of one for all. A network whose last layer has no bias stays as it is.

    Args:
        model: the network.
        counts: training images of each tag, (T,).
        images: number of training images.
    """
    bias = getattr(last_layer(model), "bias", None)
    if isinstance(bias, nn.Parameter) and bias.shape == (len(counts),):
        shares = (np.asarray(counts, dtype=np.float64) + 0.5) / (images + 1)
        with torch.no_grad():
            bias.copy_(torch.from_numpy(np.log(shares / (1 - shares))))


def load_teacher(recipe: TrainRecipe, data: DataSplits, device: torch.device) -> Teacher | None:
    """Load the teacher's weights; None when the recipe names no teacher.

    Raises:
        UsageError: weights of other classes, without attention maps where views need them, or of a non-square input;
            or views without a teacher.
    """
    settings = recipe.teacher
    if not settings.weights:
        if settings.views:
            raise UsageError("teacher.views needs a teacher: give its weights with --teacher")
        return None
    network, card = load_model(settings.weights)
    evaluate.check_classes(card, data, f"the teacher {settings.weights}")
    if settings.views and not isinstance(network, CALClassifier):
        raise UsageError(
            f"teacher.views: {settings.weights} is {card.name} without attention maps; train a teacher with "
            "`animesion train --recipe cal-teacher`, or switch teacher.views off"
        )
    if not isinstance(card.img_size, int):
        raise UsageError(
            f"the teacher {settings.weights} takes images of {card.img_size}: only square inputs are supported"
        )
    size = settings.img_size or card.img_size
    resize: Any = getattr(network, "set_input_size", None)
    if size != card.img_size and resize:
        resize(img_size=(size, size))
    network = network.to(device)
    return Teacher(network.to(memory_format=torch.channels_last) if recipe.run.channels_last else network, size)


def open_stream(
    recipe: TrainRecipe,
    data: DataSplits,
    context: DistributedContext,
    *,
    teacher: Teacher | None,
    pairs: bool,
    notify: Callable[[str], None],
) -> Stream | CachedStream:
    """Open the training split, streamed or from a cache in memory.

    Images have the larger of the student's and the teacher's sizes; the step resizes them for the smaller one. With
    `pairs`, see `needs_pairs`, batches have two images or more.

    Raises:
        UsageError: batches of one where two are needed, or a split that is too small.
    """
    augment, settings = recipe.augment, recipe.data
    size = image_size(recipe, teacher)
    # a margin below 1 is a share of the side
    margin = int((1 + augment.margin) * size) - size if augment.margin < 1 else int(augment.margin)
    transform = (
        RandomResizedCrop(size, augment.scale, augment.ratio)
        if augment.crop == "random-resized"
        else ResizeRandomCrop(size, margin)
    )
    if pairs and recipe.run.batch_size == 1:
        raise UsageError(
            f"run.batch_size is 1, and {recipe.model.name} normalises over the batch or mixes its images: give 2 or "
            "more, or freeze the batch norms"
        )
    common: dict[str, Any] = {
        "last": settings.last,
        "pairs": pairs,
        "sampling": settings.sampling,
        "together": settings.images_per_class,
        "partners": settings.partners,
        "neighbours": recipe.teacher.transplants,
        "versions": settings.versions,
        "epochs": recipe.schedule.epochs,
        "seed": recipe.run.seed,
        "rank": context.rank,
        "world_size": context.world_size,
    }
    batch_size = recipe.run.batch_size
    if settings.decoder == "gpu" and context.device.type != "cuda":
        raise UsageError(f"data.decoder is 'gpu', and the run is on the {context.device.type}: use 'cpu'")
    if settings.cache != "none":
        resident = cache_samples(
            data, settings.train, size, where=settings.cache, device=context.device, notify=notify, context=context
        )
        return CachedStream(resident, batch_size, size, device=context.device, transform=transform, **common)
    return Stream(
        data,
        settings.train,
        batch_size,
        size,
        transform=transform,
        workers="auto" if settings.workers < 0 else settings.workers,
        on_error=settings.on_error,
        decoder=context.device if settings.decoder == "gpu" else None,
        **common,
    )


def text_length(model: nn.Module) -> int:
    """Number of token ids in a text of a network, 0 if it reads no tags."""
    tags = getattr(model, "tags", None)
    return tags.length if isinstance(tags, TagText) else 0


def image_size(recipe: TrainRecipe, teacher: Teacher | None) -> int:
    """Side of the images of a batch in pixels: the larger of the student's and the teacher's."""
    return max(recipe.model.img_size, teacher.size if teacher else 0)


def needs_pairs(model: nn.Module, teacher: Teacher | None, recipe: TrainRecipe, mixing: Mixing) -> bool:
    """Whether every pass needs two images or more, and each image its partner: batch norm, MixUp or CutMix."""
    taught = teacher is not None and recipe.teacher.train_mode
    return (
        mixing.active
        or norms.normalises_over_batch(model)
        or (teacher is not None and taught and norms.normalises_over_batch(teacher.network, frozen=True))
    )


def build_augmentation(settings: AugmentSection, model: nn.Module) -> tuple[Augment, Augment]:
    """Augmentation for training and plain normalisation for evaluation, with the model's mean and deviation."""
    inputs = input_config(model)
    mean, std = as_rgb(inputs.mean), as_rgb(inputs.std)
    return training_augment(settings, mean, std), Augment.plain(mean, std)


def training_augment(
    settings: AugmentSection, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Augment:
    """Augmentation for training, with this mean and deviation."""
    jitter = settings.color_jitter
    return Augment(
        mean=mean,
        std=std,
        flip=settings.flip,
        jitter=ColorJitter(jitter, jitter, jitter, jitter / 2) if jitter else None,
        erasing=RandomErasing(settings.erasing, settings.erasing_area) if settings.erasing else None,
        trivial=TrivialAugmentWide() if settings.trivial else None,
    )


def build_mixing(recipe: TrainRecipe) -> Mixing:
    """MixUp and CutMix as the recipe configures them."""
    settings = recipe.augment
    return Mixing(settings.mixup, settings.cutmix, settings.mix_probability, label_smoothing=recipe.objective.smoothing)


def build_objective(recipe: TrainRecipe, counts: Any, mixing: Mixing, device: torch.device) -> nn.Module:
    """Create the objective on the device.

    Args:
        recipe: of the run.
        counts: training images of each class or tag, (C,).
        mixing: applies the label smoothing instead of an objective on classes when it is active.
        device: where the loss is computed.

    Raises:
        UsageError: label smoothing for an objective without it, or an option that the objective rejects.
    """
    settings = recipe.objective
    options = dict(settings.options)
    if settings.smoothing and (is_on_tags(settings.name) or not mixing.active):
        if "label_smoothing" not in objective_options(settings.name):
            raise UsageError(f"objective.smoothing: '{settings.name}' takes no label smoothing; set it to 0")
        options["label_smoothing"] = settings.smoothing
    return create_objective(settings.name, counts, epochs=recipe.schedule.epochs, **options).to(device)


def build_step(
    recipe: TrainRecipe,
    model: nn.Module,
    objective: nn.Module,
    mixing: Mixing,
    teacher: Teacher | None,
    device: torch.device,
    precision: str,
    total: int,
) -> steps.Step:
    """Wrap the network into the step that fits the run: distillation, counterfactual attention learning, or plain.

    Args:
        recipe: of the run.
        model: the network.
        objective: the loss on labels.
        mixing: MixUp and CutMix.
        teacher: the network to distil from, if there is one.
        device: where the loss is computed.
        precision: of the forward pass.
        total: optimizer steps of the run.

    Raises:
        UsageError: MixUp or CutMix with a CAL network, an unknown auxiliary loss, or an objective that the network or
            the settings of the run do not allow.
    """
    _check_objective(recipe, model, objective, teacher)
    if text_length(model) and (teacher is not None or mixing.active or isinstance(objective, ComparingObjective)):
        raise UsageError(
            f"model.text: {recipe.model.name} reads the tags of single images: leave teacher, augment.mixup and "
            "augment.cutmix out, and take an objective that does not compare images"
        )
    mode = recipe.run.compile_mode
    network = compiled(model, mode) if recipe.run.compile else model

    def model_autocast() -> contextlib.AbstractContextManager[None]:
        return autocast(precision, device)

    step: steps.Step
    if recipe.pretrain.method:
        _check_pretraining(recipe, teacher, mixing, objective)
        step = MaskedStep(model, objective, model_autocast, recipe.pretrain)
    elif teacher is not None:
        step = _distillation_step(recipe, model, network, objective, model_autocast, teacher, device)
    elif isinstance(model, CALClassifier):
        if mixing.active:
            raise UsageError("a CAL teacher needs one class per image: switch augment.mixup and augment.cutmix off")
        smoothing = recipe.objective.smoothing
        step = steps.CALStep(network, model_autocast, model, recipe.views, smoothing=smoothing)
        if recipe.views.mix and not recipe.data.partners:
            raise UsageError("views.mix exchanges regions of two images of a class: set data.partners = true")
    elif isinstance(model, TokenVisionTransformer) and model.tags is not None:
        step = steps.TaggingStep(network, objective, model_autocast, model, recipe.text, total)
    elif isinstance(objective, ComparingObjective):
        complete = recipe.data.on_error == "raise"
        step = steps.ComparingStep(network, objective, model_autocast, model, complete=complete)
    else:
        step = steps.Step(network, objective, model_autocast, model)
    if recipe.views.mix and not isinstance(step, steps.CALStep):
        raise UsageError("views.mix trains a CAL network on labels: set model.selector = 'cal', or views.mix = false")
    step.records_graphs = recipe.run.compile and mode != "default"
    return step.to(device)


def _check_pretraining(recipe: TrainRecipe, teacher: Teacher | None, mixing: Mixing, objective: nn.Module) -> None:
    """Raise `UsageError` for settings that self-supervised training has no use for."""
    unfit = {
        "a teacher": teacher is not None,
        "augment.mixup and augment.cutmix": mixing.active,
        f"objective.name = '{recipe.objective.name}'": isinstance(objective, ComparingObjective)
        or is_on_tags(recipe.objective.name),
        "run.compile": recipe.run.compile,
    }
    for name, given in unfit.items():
        if given:
            raise UsageError(f"pretrain.method = '{recipe.pretrain.method}' does not go with {name}: leave it out")


def _check_objective(recipe: TrainRecipe, model: nn.Module, objective: nn.Module, teacher: Teacher | None) -> None:
    """Raise `UsageError` if the objective cannot train this network in this run."""
    name = recipe.objective.name
    heads = [module for module in model.modules() if isinstance(module, CosineHead)]
    plain = len(heads) == 1 and not isinstance(heads[0].scale, nn.Parameter) and float(heads[0].scale) == 1
    if getattr(objective, "needs_cosines", False) and not plain:
        raise UsageError(
            f"objective.name: '{name}' reads cosines: set model.head = 'cosine' and model.method_options.head = "
            "{ scale = 1.0, learn_scale = false }"
        )
    if is_on_tags(name) and (teacher is not None or isinstance(model, CALClassifier)):
        raise UsageError(f"objective.name: '{name}' trains on tags: leave teacher and selector cal out")
    if is_on_tags(name) and getattr(model, "needs_targets", False):
        raise UsageError(f"objective.name: '{name}' trains on tags, and a method of {recipe.model.name} needs classes")
    if not isinstance(objective, ComparingObjective):
        return
    if teacher is not None or isinstance(model, CALClassifier):
        raise UsageError(f"objective.name: '{name}' trains a network of its own: leave teacher and selector cal out")
    if recipe.run.accumulate > 1:
        raise UsageError(
            f"objective.name: '{name}' compares all images of a batch, which run.accumulate = {recipe.run.accumulate} "
            "would cut: set it to 1"
        )
    if recipe.run.compile and objective.reads == "features":
        raise UsageError(
            f"objective.name: '{name}' reads the features within the network, which run.compile hides: set it to false"
        )


def compiled(network: nn.Module, mode: str) -> nn.Module:
    """Compile a network, once for all sizes of a batch; modes that record CUDA graphs do so for each size."""
    wrapper: Any = torch.compile(network, mode=None if mode == "default" else mode)
    if mode == "default":
        wrapper.register_forward_pre_hook(_mark_batch, with_kwargs=True)
    return cast("nn.Module", wrapper)


def _mark_batch(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell torch.compile before the first call that the number of images varies: it would compile again for a rest."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, torch.Tensor):
            torch._dynamo.maybe_mark_dynamic(each, 0)


def _distillation_step(
    recipe: TrainRecipe,
    model: nn.Module,
    network: nn.Module,
    objective: nn.Module,
    model_autocast: steps.Autocast,
    teacher: Teacher,
    device: torch.device,
) -> steps.Step:
    settings = recipe.teacher
    precision = resolve(settings.precision, device)
    teacher_network = teacher.network
    teacher_input = NetworkInput(teacher.size, input_config(teacher_network))
    if settings.compile and settings.feature_weight:
        raise UsageError("teacher.feature_weight reads features within the teacher: set teacher.compile = false")
    if settings.compile:
        teacher_network = compiled(teacher_network, "default")

    def teacher_autocast() -> contextlib.AbstractContextManager[None]:
        return autocast(precision, device)

    if recipe.data.versions and (build_mixing(recipe).active or settings.train_mode):
        raise UsageError(
            "data.versions asks a teacher about each version of an image once, so its answer must not depend on other "
            "images: switch augment.mixup, augment.cutmix and teacher.train_mode off"
        )
    if settings.transplants and not settings.views:
        raise UsageError("teacher.transplants needs views: set teacher.views = true")
    if settings.transplants and recipe.run.batch_size == 1:
        raise UsageError("teacher.transplants needs a second image: set run.batch_size to 2 or more")
    if settings.transplants and build_mixing(recipe).active:
        # both need partners in the same process, and these are not the same images
        raise UsageError(
            "teacher.transplants pairs images otherwise than augment.mixup and augment.cutmix: set these to 0"
        )
    teaching = Teaching(
        teacher_network.train(settings.train_mode),
        teacher_autocast,
        recipe.views if settings.views else None,
        transplants=settings.transplants,
        keeps=recipe.data.versions > 0,
        with_features=settings.feature_weight > 0,
    )
    return DistilStep(
        network,
        objective,
        model_autocast,
        model,
        teaching,
        settings,
        NetworkInput(recipe.model.img_size, input_config(model)),
        teacher_input,
    )
