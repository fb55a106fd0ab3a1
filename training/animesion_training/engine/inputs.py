"""The input of a step from a batch: augmentation, and MixUp or CutMix."""

from __future__ import annotations

import torch
from torch import Tensor

from animesion_training.data import Augment, Batch
from animesion_training.data.mixing import Mixing, apply_plan, draw_plan
from animesion_training.data.tags import TagTargets


class Inputs:
    """Makes the input of a step.

    Args:
        augment: augmentation and normalisation.
        mixing: MixUp and CutMix.
        num_classes: of soft labels.
        channels_last: whether images keep the channels-last format of the batch.
        tags: the targets, if these are tags and not classes.
    """

    def __init__(
        self, augment: Augment, mixing: Mixing, num_classes: int, *, channels_last: bool, tags: TagTargets | None = None
    ) -> None:
        self.augment, self.mixing, self.tags = augment, mixing, tags
        self.num_classes, self.channels_last = num_classes, channels_last

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, S), normalised, and class ids (B,), soft labels (B, C) or tags (B, T).

        Args:
            batch: on the device; it may be empty.
            generator: of mixtures, of which one is drawn for each batch, also for an empty one: all processes draw the
                same.
        """
        images = batch.images
        targets = batch.labels if self.tags is None else self.tags(batch.indices)
        mixture = draw_plan(images.shape, self.mixing, generator) if self.mixing.active else None
        if len(targets):
            images = self.augment(images, batch.seeds)
            if mixture is not None:
                smoothing = self.mixing.label_smoothing
                images, targets = apply_plan(images, targets, self.num_classes, mixture, smoothing)
            if not self.channels_last:
                images = images.contiguous()
        return images, targets
