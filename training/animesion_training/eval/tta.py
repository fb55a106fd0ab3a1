"""Test-time augmentation: predictions of several views of an image are averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

TTA = Literal["none", "flip", "crops"]

#: Side of a crop as a share of the resized image, for models that are evaluated on the whole image.
_SHARE = 0.875


def decoded_size(tta: TTA, size: int, crop_pct: float) -> tuple[int, float]:
    """The side in pixels at which images are decoded for the views, and the share of it that is then cropped.

    Args:
        tta: kind of views.
        size: side of the model's input.
        crop_pct: share of the resized square that the model is evaluated on without views.
    """
    if tta != "crops":
        return size, crop_pct
    share = crop_pct if crop_pct < 1 else _SHARE
    return max(size, int(size / share)), 1.0


def predict(model: Callable[[Tensor], Tensor], images: Tensor, size: int, tta: TTA) -> Tensor:
    """Predict a batch from its views.

    Args:
        model: from images (B, 3, size, size) to logits (B, C).
        images: (B, 3, L, L), with the L of `decoded_size`.
        size: side of the model's input.
        tta: `none`; `flip` for the image and its mirror image; `crops` for the crops of the four corners and the
            centre, and their mirror images: 10 views.

    Returns:
        (B, C), float32: logits without views, else the logarithm of the mean probabilities.
    """
    if tta == "none":
        return model(images).float()
    found = [model(view).float().log_softmax(dim=1) for view in views(images, size, tta)]
    return torch.stack(found).logsumexp(dim=0) - math.log(len(found))


def predict_tags(model: Callable[[Tensor], Tensor], images: Tensor, size: int, tta: TTA) -> Tensor:
    """Predict the tags of a batch: the mean over the views of the sigmoids, (B, T), float32; see `predict`."""
    if tta == "none":
        return model(images).float().sigmoid()
    return torch.stack([model(view).float().sigmoid() for view in views(images, size, tta)]).mean(dim=0)


def views(images: Tensor, size: int, tta: TTA) -> Iterator[Tensor]:
    """Yield the views of a batch, each (B, 3, size, size); see `predict`, for kinds other than `none`."""
    last = images.shape[-1] - size
    middle = last // 2
    corners = [(middle, middle)] if tta == "flip" else [(0, 0), (0, last), (last, 0), (last, last), (middle, middle)]
    for y, x in corners:
        view = images[:, :, y : y + size, x : x + size]
        yield view
        yield view.flip(3)  # (B, 3, H, W): axis 3 mirrors
