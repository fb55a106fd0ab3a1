"""Compute the terms of the loss from a batch, for each kind of training.

A step is a module around the network, so that DistributedDataParallel sees one forward pass even where the network runs
twice. All randomness comes from the seeds of the samples, except for that inside a network, such as dropout. Only
`ComparingStep` communicates, within its forward pass: `update` sums what processes share otherwise. The losses are in
`animesion_training.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion_training.data import views
from animesion_training.distributed import DistributedContext
from animesion_training.losses.cal import FeatureCenters, cal_loss
from animesion_training.losses.metric import ComparingObjective
from animesion_training.models.cal import CALClassifier, CALOutput
from animesion_training.models.embedding import FeatureTap, feature_width, last_layer
from animesion_training.recipe import TextSection, ViewsSection
from animesion_training.text.masking import mask_share, mask_tags, tag_loss, unknown_tags
from animesion_training.tokens.host import TokenVisionTransformer

Autocast = Callable[[], AbstractContextManager[Any]]


class Step(nn.Module):
    """The plain step: the objective on the logits, and the losses of the network's own methods.

    Args:
        model: the network, compiled or not.
        objective: of (logits, targets), a mean over the batch.
        autocast: context of forward passes; losses are computed outside of it.
        bare: the network without the wrapper of `torch.compile`.
    """

    def __init__(self, model: nn.Module, objective: nn.Module, autocast: Autocast, bare: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast
        self._has_losses = getattr(bare, "has_losses", False)
        self._needs_targets = getattr(bare, "needs_targets", False)
        #: Whether the network is recorded as a CUDA graph, whose outputs the next step overwrites.
        self.records_graphs = False
        #: Number of the optimizer step, from 1.
        self.number = 1
        #: Images that stay together when a share is cut into pieces.
        self.unit = 1
        self._batch: tuple[DistributedContext | None, Tensor, int] = (None, torch.zeros(0, dtype=torch.int64), 0)
        self._at = 0  # where the next piece starts in this process's share

    @property
    def extra(self) -> nn.Module | None:
        """What is trained beside the network and belongs to the run; None for nothing."""
        return None

    def forward(self, images: Tensor, targets: Tensor, seeds: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the terms of the loss.

        Args:
            images: (B, 3, S, S), normalised.
            targets: class ids (B,) or soft labels (B, C).
            seeds: one per sample, (B,) int64.
            text: token ids of the tags, (B, T) int64; only `TaggingStep` reads them.

        Returns:
            Scalars by name; their sum is the loss, a mean over the batch. For an empty batch, the network does not run,
            and one scalar gives every trained parameter a gradient of 0, so that a process without images takes part
            in the reduction of the gradients.
        """
        if not len(images):
            sums = [parameter.sum().float() for parameter in self.parameters() if parameter.requires_grad]
            return {"none": 0 * torch.stack(sums).sum()}
        if self.records_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self.terms(images, targets, seeds) if text is None else self.text_terms(images, targets, seeds, text)

    def terms(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """Compute the terms for at least one image; see `forward`."""
        with self.autocast():
            logits, method_losses = self._run(images, targets)
        return {"label": self.objective(logits.float(), targets), **method_losses}

    def text_terms(self, images: Tensor, targets: Tensor, seeds: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Compute the terms for at least one image with its text; see `forward`."""
        raise NotImplementedError

    def _run(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C), and the losses of the network's own methods by name."""
        if not self._has_losses:
            return self.model(images), {}
        options = {"targets": targets} if self._needs_targets else {}
        logits, method_losses = self.model(images, with_losses=True, **options)
        return logits, method_losses

    def begin(self, context: DistributedContext, places: Tensor, total: int, number: int) -> None:
        """Notify the step of a batch before its pieces.

        Args:
            context: of this process.
            places: positions of its samples in the global batch, (B,) int64.
            total: samples of the global batch.
            number: of the optimizer step, from 1.
        """
        self.number = number
        self._batch = (context, places, total)
        self._at = 0

    def _partners(self, count: int, device: torch.device) -> Tensor:
        """Index (B,) of the partner of each image of the next piece, its own if the partner is not in the piece.

        Partners are at the places 2k and 2k + 1 of the global batch.
        """
        places = self._batch[1][self._at : self._at + count]
        self._at += count
        found = places[:, None] == places ^ 1  # (B, B)
        return torch.where(found.any(1), found.to(torch.uint8).argmax(1), torch.arange(count, device=device))

    def collect(self, places: Tensor, total: int) -> Tensor | None:
        """Return what this process adds to the state of the method, from the passes since the last call.

        Args:
            places: positions of its samples in the global batch, (B,) int64.
            total: samples of the global batch.

        Returns:
            float32 of the same shape in every process, whose sum over all processes `absorb` takes; None for nothing.
        """
        return None

    def absorb(self, collected: Tensor) -> None:
        """Update the state of the method by the sum of what all processes have collected."""

    def method_state(self) -> Mapping[str, Tensor]:
        """State by name that a checkpoint must hold beyond that of the network."""
        return {}

    def load_method_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `method_state` returned."""


class ComparingStep(Step):
    """A step for objectives that compare the images of the batch with each other, see `losses.metric`.

    What the objective reads of this process's images is put beside that of all others, which is constant here. Each
    process computes the loss of the whole batch. Its gradients are those through its own images, so that their sum over
    the processes is the gradient of the batch, as `update` expects it.

    If the objective reads features, the last layer learns to classify them by cross-entropy, without an influence on
    the features: the network can be evaluated as a classifier of its training classes, too.

    Args:
        complete: whether every image of a batch is read, so that none is missing beside the own ones.
    """

    objective: ComparingObjective

    def __init__(
        self, model: nn.Module, objective: ComparingObjective, autocast: Autocast, bare: nn.Module, *, complete: bool
    ) -> None:
        super().__init__(model, objective, autocast, bare)
        self._complete = complete
        # in a tuple, so that nn.Module does not register the layer twice
        self._last = (last_layer(bare), FeatureTap(bare)) if objective.reads == "features" else None
        self._width = feature_width(self._last[0]) if self._last else int(getattr(bare, "num_classes", 0))

    def forward(self, images: Tensor, targets: Tensor, seeds: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """See `Step.forward`; a process without images takes part in the collection."""
        if not len(images):
            self._whole(images.new_zeros(0, self._width, dtype=torch.float32), targets)
        return super().forward(images, targets, seeds, text)

    def terms(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """See `Step.terms`; targets are class ids (B,)."""
        with self.autocast(), self._last[1] if self._last else nullcontext():
            logits, terms = self._run(images, targets)
        read = logits.float()
        if self._last:
            layer, tap = self._last
            read = tap.take().float()
            with self.autocast():
                logits = layer(read.detach())
        rows, labels = self._whole(read, targets)
        loss = self.objective(rows, labels)
        # `update` weights by the share of this process, but the gradient is that of the whole batch
        loss = loss.detach() + (loss - loss.detach()) * (len(rows) / len(images))
        if self._last:
            terms = {"classifier": functional.cross_entropy(logits.float(), targets), **terms}
        return {"label": loss, **terms}

    def _whole(self, read: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the objective reads of the whole batch, (N, D), and its classes (N,)."""
        context, places, total = self._batch
        if context is None or context.world_size == 1:
            return read, targets
        rows = read.new_zeros(total, read.shape[1] + 1)  # the last column is 1 + class
        rows[places] = torch.cat((read.detach(), 1 + targets[:, None].float()), dim=1)
        context.sum_(rows)
        labels = rows[:, -1].round().long() - 1
        inputs = rows[:, :-1].index_copy(0, places, read)
        return (inputs, labels) if self._complete else (inputs[labels >= 0], labels[labels >= 0])


class TaggingStep(Step):
    """A step for a network that reads the tags of images, and predicts those that are masked (ViLT).

    The loss is that of the labels and, with a head for tags, the cross-entropy of the masked tags.

    Args:
        model: the network, compiled or not.
        objective: of (logits, targets), a mean over the batch.
        autocast: context of forward passes.
        bare: the network without the wrapper of `torch.compile`.
        settings: how tags are masked, and the weights of both losses.
        steps: optimizer steps of the run, which the schedule of the masks is for.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        autocast: Autocast,
        bare: TokenVisionTransformer,
        settings: TextSection,
        steps: int,
    ) -> None:
        super().__init__(model, objective, autocast, bare)
        assert bare.tags is not None
        self.settings, self._steps = settings, steps
        self._vocab_size, self._predicts = bare.tags.vocab_size, bare.tags.tagger is not None
        self._length = bare.tags.length

    @property
    def mask_share(self) -> float:
        """The probability that a tag is masked in this step."""
        settings, done = self.settings, (self.number - 1) / self._steps
        return mask_share(settings.schedule, done, warmup=settings.warmup, cooldown=settings.cooldown)

    def terms(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """See `Step.terms`; the tags of all images are unknown."""
        unknown = unknown_tags(self._length, images.device)
        return self.text_terms(images, targets, seeds, unknown.expand(len(images), -1))

    def text_terms(self, images: Tensor, targets: Tensor, seeds: Tensor, text: Tensor) -> dict[str, Tensor]:
        """See `Step.text_terms`."""
        settings = self.settings
        masked = mask_tags(
            text,
            seeds,
            self.mask_share,
            vocab_size=self._vocab_size,
            unknown=settings.unknown,
            replace=settings.replace,
        )
        with self.autocast():
            output = self.model(images, masked.text, with_tags=self._predicts)
        logits = output[0] if self._predicts else output
        terms = {"label": settings.label_weight * self.objective(logits.float(), targets)}
        if self._predicts:
            terms["tags"] = settings.weight * tag_loss(output[1], masked.targets)
        return terms


def sum_terms(terms: Mapping[str, Tensor]) -> Tensor:
    """Add up the terms of the loss."""
    return torch.stack([term.float() for term in terms.values()]).sum()


class CALStep(Step):
    """Counterfactual attention learning on images and on the views that the network's attention selects.

    `losses.cal.cal_loss` defines terms and weights. The feature centers belong to the run, not to the network.

    With `views.mix` this is CALMix (arXiv 2605.18700): images at the places 2k and 2k + 1 of the global batch are
    partners and exchange their most attended regions, so each image is passed four times instead of three. An image
    whose partner cannot be read does not change in its mixture.
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
        self._passed: list[tuple[Tensor, Tensor]] = []  # features and targets of the pieces of this step
        self.unit = 2 if settings.mix else 1

    def terms(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """See `Step.terms`; targets are class ids (B,)."""
        with self.autocast():
            raw: CALOutput = self.model(images, parts=True, seeds=seeds)
        mixes = self.settings.mix
        partners = self._partners(len(images), images.device) if mixes else None
        view_images = _views(images, raw.attention.detach().float(), seeds, self.settings, partners)  # (nB, 3, S, S)
        # other seeds for each view: it has a fake attention of its own
        view_seeds = torch.cat((seeds + 1, seeds + 3, seeds + 2) if mixes else (seeds + 1, seeds + 2))
        with self.autocast():
            augmented: CALOutput = self.model(view_images, parts=True, seeds=view_seeds)
        features = raw.features.detach()
        self._passed.append((features.clone() if self.records_graphs else features, targets))
        return cal_loss(raw, augmented, targets, self.centers, label_smoothing=self.smoothing)

    def collect(self, places: Tensor, total: int) -> Tensor:
        """See `Step.collect`: features and 1 + class of each sample in its row of (total, width + 1); 0 elsewhere."""
        rows = self.centers.centers.new_zeros(total, self.centers.centers.shape[1] + 1)
        if self._passed:
            features, targets = (torch.cat(parts) for parts in zip(*self._passed, strict=True))
            rows[places] = torch.cat((features.float(), 1 + targets[:, None].float()), dim=1)
            self._passed = []
        return rows

    def absorb(self, collected: Tensor) -> None:
        """See `Step.absorb`."""
        self.centers.move(collected[:, :-1], collected[:, -1].long() - 1)

    def method_state(self) -> Mapping[str, Tensor]:
        """See `Step.method_state`."""
        return self.centers.state_dict()

    def load_method_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Step.load_method_state`."""
        self.centers.load_state_dict(dict(state))


def _views(
    images: Tensor, attention: Tensor, seeds: Tensor, settings: ViewsSection, partners: Tensor | None = None
) -> Tensor:
    """Crops, then drops, of images (B, 3, S, S) and attention (B, M, h, w): (2B, 3, S, S); see `views.views`."""
    maps: dict[str, Any] = {"sample_maps": settings.sample, "num_maps": settings.maps or None}
    attention = views.displace(attention, seeds) if settings.displace else attention
    draws = views.draw(seeds, attention, crop=settings.crop, drop=settings.drop, **maps)
    mixture = None
    if partners is not None:
        mixture = views.draw_mixture(seeds, attention, partners, threshold=settings.mix_threshold, **maps)
    return views.views(
        images,
        attention,
        draws,
        padding=settings.padding,
        upsampling=settings.upsampling,
        pool=settings.pool,
        mixture=mixture,
    )
