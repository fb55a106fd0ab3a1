"""Augment and normalise uint8 batches on the device: flip, colour jitter, erasing; and crops of cached images.

Every sample has its own random numbers, hashed from its seed (`seeds`), but the whole batch is processed in a few
calls; no generator state has to be restored to resume. TrivialAugmentWide is in `trivial_augment`, MixUp and CutMix are
in `mixing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from animesion_training.data import seeds
from animesion_training.data.trivial_augment import TrivialAugmentWide

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FLIP, _COLOUR, _ERASE, _BOX = 101, 102, 103, 104

# RGB to YIQ (FCC NTSC): luma of ITU-R BT.601, then the plane in which hue rotates
_TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
_FROM_YIQ = tuple(map(tuple, torch.linalg.inv(torch.tensor(_TO_YIQ)).tolist()))


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue; factors are uniform in [max(0, 1 - x), 1 + x].

    Brightness, saturation and hue are one 3x3 matrix per sample; contrast then blends with the mean grey, and values
    are clamped once at the end. Hue rotates colours in the YIQ plane, as NVIDIA DALI does, by up to `hue` of a full
    turn.

    Attributes:
        brightness: 0 or more.
        contrast: 0 or more.
        saturation: 0 or more.
        hue: 0 to 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        """Jitter the colours of a batch.

        Args:
            images: shape (B, H, W, 3), floating point, 0 to 255.
            u: shape (B, 4), in [0, 1).

        Returns:
            The same shape and range.
        """
        factors = [
            low + (1 + most - low) * u[:, i]
            for i, most in enumerate((self.brightness, self.saturation, self.contrast))
            for low in (max(0.0, 1 - most),)
        ]
        brightness, saturation, contrast = factors
        angle = (2 * u[:, 3] - 1) * (2 * torch.pi * self.hue)
        to_yiq, from_yiq = _constant(_TO_YIQ, u.device), _constant(_FROM_YIQ, u.device)
        cos, sin = saturation * angle.cos(), saturation * angle.sin()
        none, one = torch.zeros_like(angle), torch.ones_like(angle)
        # in YIQ: luma stays, the chroma plane is rotated and scaled, (B, 3, 3)
        turn = torch.stack((one, none, none, none, cos, -sin, none, sin, cos), 1).view(-1, 3, 3)
        matrix = from_yiq @ turn @ to_yiq * brightness[:, None, None]
        grey = images.mean((1, 2), dtype=torch.float32) @ to_yiq[0] * brightness  # (B,)
        matrix = matrix * contrast[:, None, None]
        shift = ((1 - contrast) * grey).to(images.dtype)[:, None, None]
        flat = images.reshape(images.shape[0], -1, 3)  # (B, H * W, 3)
        changed: Tensor = flat @ matrix.transpose(1, 2).to(images.dtype) + shift
        return changed.clamp_(0, 255).view_as(images)


@dataclass(frozen=True)
class RandomErasing:
    """Blank a random box with the mean colour (Zhong et al., "Random erasing data augmentation", 2020).

    Attributes:
        probability: share of the samples that are erased.
        scale: smallest and largest area, as a share of the image.
        ratio: smallest and largest height / width; longer sides are cut to the side of the image.
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def boxes(self, u: Tensor, height: int, width: int) -> Tensor:
        """Draw the boxes to erase, as masks.

        Args:
            u: shape (B, 5), in [0, 1).
            height: of the images.
            width: of the images.

        Returns:
            Shape (B, height, width), bool, true where pixels are erased.
        """
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 1]) * height * width
        least, most = (torch.tensor(bound).log() for bound in self.ratio)
        ratio = (least + (most - least) * u[:, 2]).exp()
        h = (area * ratio).sqrt().round().clamp(1, height)
        w = (area / ratio).sqrt().round().clamp(1, width)
        top, left = ((height - h + 1) * u[:, 3]).floor(), ((width - w + 1) * u[:, 4]).floor()
        rows = torch.arange(height, device=u.device)[None, :, None]
        columns = torch.arange(width, device=u.device)[None, None, :]
        top, left, h, w = (value[:, None, None] for value in (top, left, h, w))
        inside = (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)
        return inside & (u[:, 0] < self.probability)[:, None, None]


@dataclass(frozen=True)
class Augment:
    """Augment uint8 batches sample by sample and normalise them: flip, TrivialAugmentWide, jitter, then erasing.

    Attributes:
        flip: probability of a horizontal flip; 0 in evaluation.
        jitter: colour jitter, or None.
        erasing: random erasing, or None.
        mean: mean of each channel, for values of 0 to 1.
        std: standard deviation of each channel, for values of 0 to 1.
        dtype: of the result.
        channels_last: whether the result is channels-last in memory.
        trivial: TrivialAugmentWide, or None; it accepts uint8 only.
    """

    flip: float = 0.5
    jitter: ColorJitter | None = None
    erasing: RandomErasing | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    trivial: TrivialAugmentWide | None = None

    @classmethod
    def plain(
        cls,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
        *,
        channels_last: bool = True,
    ) -> Augment:
        """Return a transform that only normalises, for evaluation."""
        return cls(0.0, None, None, mean, std, dtype, channels_last)

    def __call__(self, images: Tensor, sample_seeds: Tensor) -> Tensor:
        """Augment and normalise.

        Args:
            images: shape (B, 3, H, W), uint8 or floating point of 0 to 255; fastest when channels-last.
            sample_seeds: shape (B,), int64, on the same device.

        Returns:
            Shape (B, 3, H, W) of `dtype`: (x / 255 - mean) / std.

        Raises:
            UsageError: images for TrivialAugmentWide are not uint8.
        """
        pixels = images.permute(0, 2, 3, 1)
        flipped = seeds.tensor_uniforms(sample_seeds, 1, _FLIP)[:, 0] < self.flip
        # the fast path on the CPU flips and normalises in one pass over each image
        by_image = pixels.device.type == "cpu" and pixels.dtype == torch.uint8 and self.jitter is None
        if self.flip > 0 and (self.trivial is not None or not by_image):
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(2), pixels)
            flipped = torch.zeros_like(flipped)
        if self.trivial is not None:
            pixels = self.trivial(pixels.permute(0, 3, 1, 2), sample_seeds).permute(0, 2, 3, 1)
        if by_image:
            result = self._flip_and_normalise(pixels, flipped)
        else:
            if self.jitter is not None:
                pixels = self.jitter(pixels.to(torch.float32), seeds.tensor_uniforms(sample_seeds, 4, _COLOUR))
            result = self._normalise(pixels)
        if self.erasing is not None:
            u = seeds.tensor_uniforms(sample_seeds, 5, _ERASE)
            result.masked_fill_(self.erasing.boxes(u, *result.shape[1:3])[..., None], 0.0)
        result = result.permute(0, 3, 1, 2)
        return result if self.channels_last else result.contiguous()

    def _scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        scale = tuple(1 / (255 * std) for std in self.std)
        shift = tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        return _constant(scale, device), _constant(shift, device)

    def _normalise(self, pixels: Tensor) -> Tensor:
        # one row per image row: rows of three values would not be vectorised
        batch, height, width, _ = pixels.shape
        scale, shift = (values.repeat(width) for values in self._scale_and_shift(pixels.device))
        rows = pixels.reshape(batch * height, width * 3)
        result = torch.addcmul(shift, rows.to(torch.float32), scale)
        return result.to(self.dtype).view(batch, height, width, 3)

    def _flip_and_normalise(self, pixels: Tensor, flipped: Tensor) -> Tensor:
        """Process image by image, while each is in the CPU's cache; four times as fast as the whole batch at once."""
        batch, height, width, _ = pixels.shape
        scale, shift = (values.repeat(width).numpy() for values in self._scale_and_shift(pixels.device))
        result = np.empty((batch, height, width * 3), dtype=np.float32)  # numpy asks for large pages
        for source, target, flip in zip(pixels.contiguous().numpy(), result, flipped.tolist(), strict=True):
            rows = (cv2.flip(source, 1) if flip else source).reshape(height, width * 3)
            np.multiply(rows, scale, out=target)
            target += shift
        return torch.from_numpy(result).to(self.dtype).view(batch, height, width, 3)


@lru_cache(maxsize=64)
def _constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Return small constants on the device, copied once: every copy from the host waits for the device."""
    with torch.inference_mode(False):  # evaluation may ask first, and training use them later
        return torch.tensor(values, dtype=torch.float32, device=device)


# -- crops of cached images ----------------------------------------------------------------------------------------


def random_boxes(
    sample_seeds: Tensor,
    aspects: Tensor,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    tries: int = 10,
) -> Tensor:
    """Draw boxes of random area and aspect for a batch, from the distribution of `decode.RandomResizedCrop`.

    Args:
        sample_seeds: shape (B,), int64.
        aspects: width / height of the images, shape (B,).
        scale: smallest and largest area, as a share of the image.
        ratio: smallest and largest width / height.
        tries: number of draws, after which the centre of the image is taken, cut to the nearest allowed aspect.

    Returns:
        Left, top, width, height as shares of the image, shape (B, 4), float32.
    """
    # area and aspect of each try, then the position
    u = seeds.tensor_uniforms(sample_seeds, 2 * tries + 2, _BOX)
    area = scale[0] + (scale[1] - scale[0]) * u[:, : 2 * tries : 2]
    least, most = (torch.tensor(bound).log() for bound in ratio)
    # ratios in units of the image's aspect, so that widths and heights are shares of its sides, (B, tries)
    shape = (least + (most - least) * u[:, 1 : 2 * tries : 2]).exp() / aspects[:, None]
    widths, heights = (area * shape).sqrt(), (area / shape).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # argmax returns the first of equals
    width, height = widths.gather(1, first)[:, 0], heights.gather(1, first)[:, 0]
    none = ~fits.any(1)
    width = torch.where(none, (ratio[1] / aspects).clamp(max=1), width)
    height = torch.where(none, (aspects / ratio[0]).clamp(max=1), height)
    middle = torch.full_like(width, 0.5)
    left = (1 - width) * torch.where(none, middle, u[:, -2])
    top = (1 - height) * torch.where(none, middle, u[:, -1])
    return torch.stack((left, top, width, height), 1)


def resample_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop a box from each image and resize it, antialiased bilinear as in Pillow, by two batched matrix products.

    Args:
        images: shape (B, H, W, 3), uint8.
        boxes: left, top, width, height as shares of the image, shape (B, 4).
        size: S.

    Returns:
        Shape (B, 3, S, S), channels-last in memory, float32, 0 to 255.
    """
    batch, height, width, _ = images.shape
    across = _weights(boxes[:, 0], boxes[:, 2], width, size)  # (B, S, W)
    down = _weights(boxes[:, 1], boxes[:, 3], height, size)  # (B, S, H)
    values = images.to(torch.float32)
    values = torch.bmm(down, values.reshape(batch, height, width * 3)).view(batch, size, width, 3)
    return torch.matmul(across[:, None], values).permute(0, 3, 1, 2)


def _weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Weights (B, S, source) of the source pixels in each of S output pixels; rows sum to 1."""
    step = length * source / size
    centres = start[:, None] * source + (torch.arange(size, device=start.device) + 0.5) * step[:, None]
    pixels = torch.arange(source, device=start.device) + 0.5
    # a triangle filter, widened when the box shrinks
    reach = step.clamp(min=1)[:, None, None]
    weights = (1 - (pixels - centres[:, :, None]).abs() / reach).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)
