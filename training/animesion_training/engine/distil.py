"""The step of a student that learns from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.engine.steps import Autocast, Step
from animesion_training.engine.teaching import Teaching
from animesion_training.losses.distillation import auxiliary_loss, distillation_term, feature_distance
from animesion_training.models.create import InputConfig
from animesion_training.models.embedding import FeatureTap, feature_width, last_layer
from animesion_training.recipe import TeacherSection


class NetworkInput(NamedTuple):
    """Input of student or teacher: side in pixels, and mean and deviation of its normalisation."""

    size: int
    config: InputConfig


class DistilStep(Step):
    """Knowledge distillation on the images alone, or also on crops and drops from the teacher's attention.

    With `teacher.views` this is TGDA (arXiv 2507.12157): labels supervise the images only, the teacher supervises
    images and views. With `teacher.transplants` (ours), the second view is not a drop: the attended region of an image
    is replaced by that of its partner, and the teacher's answer for the partner's crop is taught. Partners are at the
    places 2k and 2k + 1 of the global batch; the last image of an odd number has none, and keeps its region.
    The teacher is not a submodule, so optimizer, checkpoint and DistributedDataParallel ignore it.
    With `teacher.feature_weight`, a linear layer that belongs to the run maps the student's features to the teacher's.

    Args:
        model: the student, compiled or not.
        objective: of the student's logits and the labels.
        autocast: context of the student's forward passes.
        bare: the student without the wrapper of `torch.compile`.
        teaching: the teacher.
        settings: of the distillation.
        student_input: input of the student.
        teacher_input: input of the teacher.

    Raises:
        UsageError: features of a student that has no one last layer, or that is compiled.
    """

    to_teacher: Tensor | None
    to_student: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        autocast: Autocast,
        bare: nn.Module,
        teaching: Teaching,
        settings: TeacherSection,
        student_input: NetworkInput,
        teacher_input: NetworkInput,
    ) -> None:
        super().__init__(model, objective, autocast, bare)
        self.teaching, self.settings = teaching, settings
        self.student_input, self.teacher_input = student_input, teacher_input
        student, other = student_input.config, teacher_input.config
        for name, (old, new) in {"to_teacher": (student, other), "to_student": (other, student)}.items():
            # (x std + mean) is the pixel value: denormalise and normalise by one factor and one shift
            factor = torch.tensor(old.std) / torch.tensor(new.std)
            shift = (torch.tensor(old.mean) - torch.tensor(new.mean)) / torch.tensor(new.std)
            same = (old.mean, old.std) == (new.mean, new.std)
            change = None if same else torch.stack((factor, shift))[..., None, None]  # (2, 3, 1, 1)
            self.register_buffer(name, change, persistent=False)
        self._tap, self.projection = None, None
        if settings.feature_weight:
            if model is not bare:
                raise UsageError("teacher.feature_weight reads features within the student: set run.compile = false")
            self._tap = FeatureTap(bare)
            self.projection = nn.Linear(feature_width(last_layer(bare)), teaching.width)
        if settings.transplants:
            self.unit = 2
        # batch norm must see images and views as two batches; without it, one pass over both is equal and faster
        self._one_pass = not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in bare.modules())

    @property
    def extra(self) -> nn.Module | None:
        """See `Step.extra`."""
        return self.projection

    def method_state(self) -> Mapping[str, Tensor]:
        """See `Step.method_state`."""
        return {} if self.projection is None else self.projection.state_dict()

    def load_method_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Step.load_method_state`."""
        if self.projection is not None:
            self.projection.load_state_dict(dict(state))

    def terms(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """See `Step.terms`; images are normalised for the student, at the larger of the two sizes."""
        settings = self.settings
        # the batch has the larger of the two sizes, and the normalisation of the student
        partners = self._partners(len(images), images.device) if settings.transplants else None
        taught = self.teaching(self._for_teacher(images), seeds, partners)
        own = torch.arange(len(images), device=images.device)
        subjects = torch.cat((own, own if partners is None else partners))  # (2 B,): whose region a view shows
        logits, view_logits, features, method_losses = self._student_logits(images, taught.view_images, targets)
        terms = {"label": settings.label_weight * self.objective(logits, targets), **method_losses}
        on_views = () if taught.view_logits is None else (view_logits, taught.view_logits)
        counts = None
        if settings.right and taught.view_logits is not None:
            labels = targets.argmax(1) if targets.is_floating_point() else targets
            counts = taught.view_logits.argmax(1) == labels[subjects]  # (2 B,)
        terms["distillation"] = settings.weight * distillation_term(
            logits,
            taught.logits,
            *on_views,
            temperature=settings.temperature,
            view_weights=settings.view_weights,
            counts=counts,
        )
        if self.projection is not None and features is not None and taught.features is not None:
            with self.autocast():
                mapped = self.projection(features)
            terms["features"] = settings.feature_weight * feature_distance(mapped, taught.features)
        if settings.auxiliary:
            given: dict[str, Any] = dict(settings.auxiliary_options)
            with_targets = (*on_views, targets[subjects]) if on_views else ()
            auxiliary = auxiliary_loss(settings.auxiliary, logits, taught.logits, targets, *with_targets, **given)
            terms[settings.auxiliary] = settings.auxiliary_weight * auxiliary
        return terms

    def _student_logits(
        self, images: Tensor, view_images: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """The student's logits of images (B, C) and views (2B, C), its features of both, and its methods' losses."""
        own = self._resize(images, self.student_input.size)  # (B, 3, S, S)
        with self.autocast(), self._tap or nullcontext():
            if view_images is None:
                logits, method_losses = self._run(own, targets)
                return logits.float(), logits, self._features(), method_losses
            # views have the teacher's size and normalisation
            own_views = _renormalise(view_images, self.to_student)
            own_views = self._resize(own_views, self.student_input.size)
            if self._one_pass and not self._has_losses:
                both = self.model(torch.cat([own, own_views])).float()
                logits, view_logits = both.split([len(own), len(own_views)])
                return logits, view_logits, self._features(), {}
            logits, method_losses = self._run(own, targets)
            features = self._features()
            view_logits = self.model(own_views)
            if features is not None and (of_views := self._features()) is not None:
                features = torch.cat((features, of_views))
        return logits.float(), view_logits.float(), features, method_losses

    def _features(self) -> Tensor | None:
        """Features of the student's last pass, if they are read."""
        return self._tap.take() if self._tap else None

    def _for_teacher(self, images: Tensor) -> Tensor:
        """The images at the teacher's size and normalisation."""
        images = _renormalise(images, self.to_teacher)
        return self._resize(images, self.teacher_input.size)

    def _resize(self, images: Tensor, size: int) -> Tensor:
        if images.shape[-2:] == (size, size):
            return images
        return functional.interpolate(
            images, (size, size), mode="bicubic", align_corners=False, antialias=self.settings.antialias
        )


def _renormalise(images: Tensor, change: Tensor | None) -> Tensor:
    """Images by a factor and a shift per channel, (2, 3, 1, 1), if they change."""
    return images if change is None else images * change[0] + change[1]
