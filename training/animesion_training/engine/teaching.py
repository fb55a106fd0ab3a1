"""Ask a teacher about images, make its views of them, and keep its answers for images that return unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from animesion_training.data import views
from animesion_training.models.cal import CALOutput
from animesion_training.recipe import ViewsSection


class Taught(NamedTuple):
    """What a teacher says of a batch.

    Attributes:
        logits: of the images, (B, K).
        view_logits: of the views, crops and then drops, (2 B, K); None without views.
        view_images: these views, (2 B, 3, S, S); None without views.
    """

    logits: Tensor
    view_logits: Tensor | None
    view_images: Tensor | None


class Answer(NamedTuple):
    """What has to be kept to say the same again; the views are made from the maps.

    Attributes:
        logits: (B, K).
        maps: the attention that was drawn for the crop and for the drop, (B, 2, h, w); None without views.
        view_logits: of crop and drop, (B, 2, K); None without views.
    """

    logits: Tensor
    maps: Tensor | None
    view_logits: Tensor | None

    def of(self, place: int) -> Answer:
        """The answer for one image of the batch, without its dimension."""
        maps = None if self.maps is None else self.maps[place]
        return Answer(self.logits[place], maps, None if self.view_logits is None else self.view_logits[place])


def _together(answers: Sequence[Answer]) -> Answer:
    """The answers of `Answer.of` as those of a batch; all have views, or none has."""
    logits, *on_views = zip(*answers, strict=True)
    maps, view_logits = (None if each[0] is None else torch.stack(each) for each in on_views)
    return Answer(torch.stack(logits), maps, view_logits)


class Teaching:
    """A teacher and, with `keeps`, its answers by the seeds of samples.

    An image with the seed that it had before has the same augmentation (`data.versions`), so its answer is the same,
    and the teacher is not asked again. An answer takes 4 (3 K + 2 h w) bytes on the device of the step. Reading the
    seeds waits for the device. The answers are of this process alone and not part of a checkpoint: a resumed run asks
    again.

    Args:
        network: the teacher in the mode that it answers in; with views it is a `CALClassifier`. It runs without
            gradients.
        autocast: context of its forward passes.
        view_settings: how views are drawn; None for no views.
        keeps: whether images with the same seed are the same.
    """

    def __init__(
        self,
        network: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
        view_settings: ViewsSection | None,
        *,
        keeps: bool = False,
    ) -> None:
        self.network = network.requires_grad_(False)
        self._autocast, self._views, self._keeps = autocast, view_settings, keeps
        self._kept: dict[int, Answer] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, seeds: Tensor) -> Taught:
        """Return the answers for images (B, 3, S, S) of the teacher's size and normalisation; seeds are (B,) int64."""
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
        view_logits = None if answer.view_logits is None else answer.view_logits.transpose(0, 1).flatten(0, 1)
        return Taught(answer.logits, view_logits, view_images)

    def _ask(self, images: Tensor, seeds: Tensor) -> tuple[Answer, Tensor | None]:
        """The teacher's answers, and the views."""
        with self._autocast():
            if self._views is None:
                return Answer(self.network(images), None, None), None
            output: CALOutput = self.network(images, parts=True)
        attention = output.attention.float()
        draws = self._draw(seeds, attention, sample=self._views.sample)
        maps = torch.cat(views.select_maps(attention, draws.maps), dim=1)  # (B, 2, h, w)
        view_images = self._make_views(images, maps, seeds)
        # views are made in float32: autocast is left in between
        with self._autocast():
            logits = self.network(view_images)  # (2 B, K)
        return Answer(output.logits, maps, logits.unflatten(0, (2, len(images))).transpose(0, 1)), view_images

    def _make_views(self, images: Tensor, maps: Tensor, seeds: Tensor) -> Tensor:
        """Crops by the first map of each image, then drops by the second, (2 B, 3, S, S)."""
        assert self._views is not None
        draws = self._draw(seeds, maps, sample=False)  # thresholds depend on the seeds alone
        both = torch.arange(2, device=maps.device).expand(len(maps), 2)
        settings = self._views
        return views.views(
            images,
            maps,
            draws._replace(maps=both),
            padding=settings.padding,
            upsampling=settings.upsampling,
            pool=settings.pool,
        )

    def _draw(self, seeds: Tensor, attention: Tensor, *, sample: bool) -> views.Draws:
        settings = self._views
        assert settings is not None
        count = settings.maps or None
        return views.draw(seeds, attention, sample_maps=sample, num_maps=count, crop=settings.crop, drop=settings.drop)
