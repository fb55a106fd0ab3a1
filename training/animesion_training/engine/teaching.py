"""Ask a teacher about images, make its views of them, and keep its answers for images that return unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from animesion_training.data import views
from animesion_training.models.cal import CALClassifier, CALOutput
from animesion_training.models.embedding import FeatureTap, feature_width, last_layer
from animesion_training.recipe import ViewsSection


class Taught(NamedTuple):
    """What a teacher says of a batch.

    Attributes:
        logits: of the images, (B, K).
        view_logits: of the views, crops and then drops or transplants, (2 B, K); None without views.
        view_images: these views, (2 B, 3, S, S); None without views.
        features: of images, then views, (B, D) or (3 B, D); None unless asked for.
    """

    logits: Tensor
    view_logits: Tensor | None
    view_images: Tensor | None
    features: Tensor | None


class Answer(NamedTuple):
    """What has to be kept to say the same again; the views are made from the maps.

    Attributes:
        logits: (B, K).
        maps: the attention that was drawn for the V views, (B, V, h, w): crop and drop, or the crop alone where
            transplants take the place of drops; None without views.
        view_logits: of these views, (B, V, K); None without views.
        features: of the image, and of the views, (B, 1, D) or (B, 1 + V, D); None unless asked for.
    """

    logits: Tensor
    maps: Tensor | None
    view_logits: Tensor | None
    features: Tensor | None

    def of(self, place: int) -> Answer:
        """The answer for one image of the batch, without its dimension."""
        others = (None if each is None else each[place] for each in self[1:])
        return Answer(self.logits[place], *others)


def _together(answers: Sequence[Answer]) -> Answer:
    """The answers of `Answer.of` as those of a batch; all have views, or none has."""
    logits, *others = zip(*answers, strict=True)
    return Answer(torch.stack(logits), *(None if each[0] is None else torch.stack(each) for each in others))


class Teaching:
    """A teacher and, with `keeps`, its answers by the seeds of samples.

    An image with the seed that it had before has the same augmentation (`data.versions`), so its answer is the same,
    and the teacher is not asked again. With V views, an answer takes 4 ((1 + V) K + V h w) bytes on the device of the
    step, and 4 (1 + V) D with features. Reading the
    seeds waits for the device. The answers are of this process alone and not part of a checkpoint: a resumed run asks
    again.

    Args:
        network: the teacher in the mode that it answers in; with views it is a `CALClassifier`. It runs without
            gradients.
        autocast: context of its forward passes.
        view_settings: how views are drawn; None for no views.
        transplants: whether the second view is an image with the attended region of its partner, see `DistilStep`.
        keeps: whether images with the same seed are the same.
        with_features: also return features: the input of the last layer; of a CAL network, the mean over its maps.

    Attributes:
        width: D, length of the features.

    Raises:
        UsageError: features of a network that has no one last layer.
    """

    def __init__(
        self,
        network: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
        view_settings: ViewsSection | None,
        *,
        transplants: bool = False,
        keeps: bool = False,
        with_features: bool = False,
    ) -> None:
        self.network = network.requires_grad_(False)
        self._autocast, self._views, self._transplants, self._keeps = autocast, view_settings, transplants, keeps
        self._kept: dict[int, Answer] = {}
        self._with_features = with_features
        self._tap: FeatureTap | None = None
        self.width = 0
        if isinstance(network, CALClassifier):
            self.width = network.head.in_features
        elif with_features:
            self._tap, self.width = FeatureTap(network), feature_width(last_layer(network))

    @torch.no_grad()
    def __call__(self, images: Tensor, seeds: Tensor, partners: Tensor | None = None) -> Taught:
        """Return the answers for images.

        Args:
            images: (B, 3, S, S), of the teacher's size and normalisation.
            seeds: (B,), int64.
            partners: (B,), int64, index of each image's partner, for transplants.
        """
        if not self._keeps:
            answer, view_images = self._ask(images, seeds)
        else:
            names = seeds.tolist()
            missing = [row for row, name in enumerate(names) if name not in self._kept]
            if missing:
                rows = torch.tensor(missing, device=images.device)
                asked, _ = self._ask(images[rows], seeds[rows])
                for place, row in enumerate(missing):
                    self._kept[names[row]] = asked.of(place)
            answer = _together([self._kept[name] for name in names])
            view_images = None if answer.maps is None else self._make_views(images, answer.maps, seeds)
        if self._transplants:
            assert view_images is not None
            assert partners is not None
            view_images = torch.cat((view_images, self._transplanted(images, answer, seeds, partners)))
            answer = _with_partners(answer, partners)
        view_logits = None if answer.view_logits is None else answer.view_logits.transpose(0, 1).flatten(0, 1)
        features = None if answer.features is None else answer.features.transpose(0, 1).flatten(0, 1)
        return Taught(answer.logits, view_logits, view_images, features)

    def _ask(self, images: Tensor, seeds: Tensor) -> tuple[Answer, Tensor | None]:
        """The teacher's answers, and the views."""
        logits, attention, features = self._pass(images)
        if self._views is None:
            return Answer(logits, None, None, None if features is None else features[:, None]), None
        assert attention is not None
        if self._views.displace:
            attention = views.displace(attention, seeds)
        draws = self._draw(seeds, attention, sample=self._views.sample)
        wanted = draws.maps[:, :1] if self._transplants else draws.maps
        maps = torch.cat(views.select_maps(attention, wanted), dim=1)  # (B, V, h, w)
        view_images = self._make_views(images, maps, seeds)
        # views are made in float32, without autocast
        view_logits, _, view_features = self._pass(view_images)
        view_logits = _by_image(view_logits, len(images))  # (B, V, K)
        if features is not None and view_features is not None:
            features = torch.cat((features[:, None], _by_image(view_features, len(images))), dim=1)  # (B, 1 + V, D)
        return Answer(logits, maps, view_logits, features), view_images

    def _pass(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits (B, K), attention (B, M, h, w) of a CAL network with views, and features (B, D) if asked for."""
        parts = self._views is not None or self._with_features
        with self._autocast(), self._tap or contextlib.nullcontext():
            if not parts or self._tap:
                return self.network(images), None, self._tap.take().float() if self._tap else None
            output: CALOutput = self.network(images, parts=True)
        features = None
        if self._with_features:
            features = output.features.view(len(images), -1, self.width).mean(1)  # over the maps
        return output.logits, output.attention.float(), features

    def _make_views(self, images: Tensor, maps: Tensor, seeds: Tensor) -> Tensor:
        """Crops by the first map of each image, then drops by the second if there is one, (V B, 3, S, S)."""
        assert self._views is not None
        draws = self._draw(seeds, maps, sample=False)  # thresholds depend on the seeds alone
        both = torch.tensor([0, maps.shape[1] - 1], device=maps.device).expand(len(maps), 2)
        settings = self._views
        return views.views(
            images,
            maps,
            draws._replace(maps=both),
            padding=settings.padding,
            upsampling=settings.upsampling,
            pool=settings.pool,
            drops=not self._transplants,
        )

    def _transplanted(self, images: Tensor, answer: Answer, seeds: Tensor, partners: Tensor) -> Tensor:
        """Images with the attended region of their partners in place of their own, (B, 3, S, S)."""
        assert self._views is not None
        assert answer.maps is not None
        settings = self._views
        mixture = views.draw_mixture(seeds, answer.maps, partners, sample_maps=False, threshold=settings.mix_threshold)
        maps = views.pool_map(answer.maps) if settings.pool else answer.maps  # (B, 1, h, w)
        size = (images.shape[2], images.shape[3])
        boxes = views.crop_boxes(maps, size, mixture.threshold, 0.0, settings.upsampling)
        return views.exchange(images, boxes, partners)

    def _draw(self, seeds: Tensor, attention: Tensor, *, sample: bool) -> views.Draws:
        settings = self._views
        assert settings is not None
        count = settings.maps or None
        return views.draw(seeds, attention, sample_maps=sample, num_maps=count, crop=settings.crop, drop=settings.drop)


def _by_image(values: Tensor, count: int) -> Tensor:
    """Rows of one kind of view after the other, (V B, D), as (B, V, D)."""
    return values.view(-1, count, values.shape[-1]).transpose(0, 1)


def _with_partners(answer: Answer, partners: Tensor) -> Answer:
    """The answer with that for the crop of each image's partner as the last."""
    assert answer.view_logits is not None
    view_logits = torch.cat((answer.view_logits, answer.view_logits[partners]), dim=1)
    features = answer.features
    if features is not None:
        features = torch.cat((features, features[partners][:, -1:]), dim=1)
    return answer._replace(view_logits=view_logits, features=features)
