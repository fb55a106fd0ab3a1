"""What one optimizer step computes: from a batch to the terms of the loss, for each kind of training.

A step is one module around the network, so that DistributedDataParallel sees one forward pass however often the network
runs in it. All chance comes from the samples' seeds. The loop is in `loop`, losses in `losses` and `distillation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion_training.data import views
from animesion_training.losses.cal import FeatureCenters, cal_loss
from animesion_training.losses.distillation import auxiliary_loss, distillation_term
from animesion_training.models.cal import CALClassifier, CALOutput
from animesion_training.models.create import InputConfig
from animesion_training.recipe import TeacherSection, ViewsSection

Autocast = Callable[[], AbstractContextManager[Any]]


class Step(nn.Module):
    """The plain step: the objective of the network's logits, and what the network's own methods add to it.

    Args:
        model: the network, compiled or not.
        objective: of (logits, targets), a mean over the batch.
        autocast: entered around forward passes; losses are computed outside of it.
        bare: the network without what `torch.compile` puts around it.
    """

    def __init__(self, model: nn.Module, objective: nn.Module, autocast: Autocast, bare: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast
        self._has_losses = getattr(bare, "has_losses", False)
        self._needs_targets = getattr(bare, "needs_targets", False)

    def forward(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """Terms of the loss.

        Args:
            images: (B, 3, S, S), normalised.
            targets: class ids (B,) or soft labels (B, C).
            seeds: one for each sample, (B,) int64.

        Returns:
            Scalars by name; their sum is the loss, a mean over the batch.
        """
        with self.autocast():
            logits, more = self._run(images, targets)
        return {"label": self.objective(logits.float(), targets), **more}

    def _run(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and what the network's own methods add to the loss."""
        if not self._has_losses:
            return self.model(images), {}
        options = {"targets": targets} if self._needs_targets else {}
        logits, more = self.model(images, with_losses=True, **options)
        return logits, more

    def kept(self) -> Mapping[str, Tensor]:
        """State beyond the network's that a checkpoint must hold, by name."""
        return {}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Take back what `kept` gave."""


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum of its terms."""
    return torch.stack([term.float() for term in terms.values()]).sum()


class CALStep(Step):
    """Counterfactual attention learning: the image and the views that the network's own attention makes of it.

    Terms and weights are those of `losses.cal.cal_loss`. The feature centers are part of the run, not of the network.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: Autocast,
        bare: CALClassifier,
        settings: ViewsSection,
        *,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, nn.Identity(), autocast, bare)
        self.settings = settings
        self.smoothing = smoothing
        self.centers = FeatureCenters(bare.num_classes, bare.head.num_maps * bare.head.in_features)

    def forward(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """See `Step.forward`; targets are class ids."""
        with self.autocast():
            raw: CALOutput = self.model(images, parts=True)
        made = _views(images, raw.attention.detach().float(), seeds, self.settings)
        with self.autocast():
            augmented: CALOutput = self.model(made, parts=True)
        return cal_loss(raw, augmented, targets, self.centers, label_smoothing=self.smoothing)

    def kept(self) -> Mapping[str, Tensor]:
        """See `Step.kept`."""
        return self.centers.state_dict()

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """See `Step.restore`."""
        self.centers.load_state_dict(dict(kept))


class Resolution(NamedTuple):
    """What one of the two networks takes: side in pixels, and what it normalises with."""

    size: int
    inputs: InputConfig


class DistilStep(Step):
    """Knowledge distillation, on the images alone or also on the crops and drops that the teacher's attention makes.

    With `teacher.views` this is TGDA (arXiv 2507.12157): labels are for the images only, of views the teacher alone
    has a word to say. The teacher runs without gradients and is no part of the module: neither optimizer, checkpoint
    nor DistributedDataParallel see it.

    Args:
        model: the student, compiled or not.
        objective: of the student's logits and the labels.
        autocast: around the student.
        bare: the student without what `torch.compile` puts around it.
        teacher: takes images to logits; with views it is a `CALClassifier`.
        teacher_autocast: around the teacher.
        settings: of the distillation.
        view_settings: how views are made.
        student_takes: the student's input.
        teacher_takes: the teacher's input.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        autocast: Autocast,
        bare: nn.Module,
        teacher: nn.Module,
        teacher_autocast: Autocast,
        settings: TeacherSection,
        view_settings: ViewsSection,
        student_takes: Resolution,
        teacher_takes: Resolution,
    ) -> None:
        super().__init__(model, objective, autocast, bare)
        self.settings, self.view_settings = settings, view_settings
        self.student_takes, self.teacher_takes = student_takes, teacher_takes
        self._hidden = (teacher.train(settings.train_mode).requires_grad_(False), teacher_autocast)
        # each pass of a batch norm sees a batch of its own; without one, a single pass gives the same in less time
        self._one_pass = not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in bare.modules())

    def forward(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """See `Step.forward`; images are normalised for the student, at the larger of the two sizes."""
        teacher, teacher_autocast = self._hidden
        settings = self.settings
        made = None
        with torch.no_grad():
            shown = self._shown(images)
            with teacher_autocast():
                if settings.views:
                    seen: CALOutput = teacher(shown, parts=True)
                    taught = seen.logits
                else:
                    taught = teacher(shown)
            if settings.views:
                made = _views(shown, seen.attention.float(), seeds, self.view_settings)
                with teacher_autocast():
                    taught_views = teacher(made)
        logits, learned_views, more = self._learned(images, made, targets)
        terms = {"label": settings.label_weight * self.objective(logits, targets), **more}
        on_views = () if made is None else (learned_views, taught_views)
        terms["distillation"] = settings.weight * distillation_term(
            logits, taught, *on_views, temperature=settings.temperature, view_weights=settings.view_weights
        )
        if settings.auxiliary:
            further = auxiliary_loss(settings.auxiliary, logits, taught, targets, *on_views)
            terms[settings.auxiliary] = settings.auxiliary_weight * further
        return terms

    def _learned(
        self, images: Tensor, made: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The student's logits of images (B, C) and views (2B, C), and what its own methods add."""
        own = self._resized(images, self.student_takes.size)
        with self.autocast():
            if made is None:
                logits, more = self._run(own, targets)
                return logits.float(), logits, more
            back = self._renormalised(made, self.teacher_takes.inputs, self.student_takes.inputs)
            back = self._resized(back, self.student_takes.size)
            if self._one_pass and not self._has_losses:
                logits, views_logits = self.model(torch.cat([own, back])).float().split([len(own), len(back)])
                return logits, views_logits, {}
            logits, more = self._run(own, targets)
            second = self.model(back)
        return logits.float(), second.float(), more

    def _shown(self, images: Tensor) -> Tensor:
        """The images as the teacher takes them."""
        inputs = self._renormalised(images, self.student_takes.inputs, self.teacher_takes.inputs)
        return self._resized(inputs, self.teacher_takes.size)

    @staticmethod
    def _renormalised(images: Tensor, old: InputConfig, new: InputConfig) -> Tensor:
        if (old.mean, old.std) == (new.mean, new.std):
            return images
        old_mean, old_std, mean, std = (
            torch.tensor(values, device=images.device)[:, None, None]
            for values in (old.mean, old.std, new.mean, new.std)
        )
        return (images * old_std + (old_mean - mean)) / std

    def _resized(self, images: Tensor, size: int) -> Tensor:
        if images.shape[-2:] == (size, size):
            return images
        return functional.interpolate(
            images, (size, size), mode="bicubic", align_corners=False, antialias=self.settings.antialias
        )


def _views(images: Tensor, attention: Tensor, seeds: Tensor, settings: ViewsSection) -> Tensor:
    """Crops, then drops: (2B, 3, S, S)."""
    draws = views.draw(
        seeds,
        attention,
        sample_maps=settings.sample,
        num_maps=settings.maps or None,
        crop=settings.crop,
        drop=settings.drop,
    )
    return views.views(images, attention, draws, padding=settings.padding)
