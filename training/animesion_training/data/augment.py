"""From a batch of uint8 pixels to what a model takes, on the device: flip, distort, normalise, erase; cached crops.

Every sample is changed on its own but all of them in the same few calls, and by numbers hashed from the sample's seed
(`seeds`): there is no generator whose state a resumed run would have to restore. TrivialAugmentWide is in `trivial`;
mixing samples (MixUp, CutMix) is left to the objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from animesion_training.data import seeds
from animesion_training.data.trivial_augment import TrivialAugmentWide

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FLIP, _COLOUR, _ERASE, _BOX = 101, 102, 103, 104

# luma, and the rotation's plane: YIQ (FCC NTSC), as in ITU-R BT.601 luma
_TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue; factors are uniform in [max(0, 1 - x), 1 + x].

    Brightness, saturation and hue are one 3x3 matrix a sample, then contrast pulls towards the mean grey; values are
    clamped once at the end. Hue turns the colours in the YIQ plane (as NVIDIA DALI does) by up to `hue` of a full turn.

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
        """Jitter.

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
        to_yiq = torch.tensor(_TO_YIQ, device=u.device, dtype=torch.float32)
        cos, sin, none, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
        turn = torch.stack(
            (one, none, none, none, saturation * cos, -saturation * sin, none, saturation * sin, saturation * cos), 1
        ).view(-1, 3, 3)
        matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq * brightness[:, None, None]
        grey = images.mean((1, 2), dtype=torch.float32) @ to_yiq[0] * brightness
        matrix = matrix * contrast[:, None, None]
        shift = ((1 - contrast) * grey).to(images.dtype)[:, None, None]
        flat = images.reshape(images.shape[0], -1, 3)
        changed: Tensor = flat @ matrix.transpose(1, 2).to(images.dtype) + shift
        return changed.clamp_(0, 255).view_as(images)


@dataclass(frozen=True)
class RandomErasing:
    """Blank a random box with the mean colour (Zhong et al., "Random erasing data augmentation", 2020).

    Attributes:
        probability: that a sample is erased.
        scale: least and greatest area, as a share of the image.
        ratio: least and greatest height / width; a box that would stick out is cut to the image's side.
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def boxes(self, u: Tensor, height: int, width: int) -> Tensor:
        """Where to erase.

        Args:
            u: shape (B, 5), in [0, 1).
            height: of the images.
            width: of the images.

        Returns:
            Shape (B, height, width), bool.
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
    """uint8 batches to normalised ones, augmented sample by sample: flip, TrivialAugment, jitter, then erasing.

    Attributes:
        flip: probability of a left-right flip; 0 in evaluation.
        jitter: colour jitter, if any.
        erasing: random erasing, if any.
        mean: of each channel, for values of 0 to 1.
        std: of each channel, for values of 0 to 1.
        dtype: of the result.
        channels_last: leave the result channels-last in memory, as it comes.
        trivial: TrivialAugmentWide, if any; it takes uint8 only.
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
        """Normalisation alone, for evaluation."""
        return cls(0.0, None, None, mean, std, dtype, channels_last)

    def __call__(self, images: Tensor, sample_seeds: Tensor) -> Tensor:
        """Augment and normalise.

        Args:
            images: shape (B, 3, H, W), uint8 or floating point of 0 to 255; fastest when channels-last.
            sample_seeds: shape (B,), int64, on the same device.

        Returns:
            Shape (B, 3, H, W) of `dtype`: (x / 255 - mean) / std.

        Raises:
            UsageError: there is a TrivialAugmentWide, and images are not uint8.
        """
        pixels = images.permute(0, 2, 3, 1)
        flipped = seeds.tensor_uniforms(sample_seeds, 1, _FLIP)[:, 0] < self.flip
        by_image = pixels.device.type == "cpu" and pixels.dtype == torch.uint8 and self.jitter is None
        if self.flip > 0 and (self.trivial is not None or not by_image):
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(2), pixels)
            flipped = torch.zeros_like(flipped)
        if self.trivial is not None:
            pixels = self.trivial(pixels.permute(0, 3, 1, 2), sample_seeds).permute(0, 2, 3, 1)
        if by_image:
            result = self._flipped_and_normalised(pixels, flipped)
        else:
            if self.jitter is not None:
                pixels = self.jitter(pixels.to(torch.float32), seeds.tensor_uniforms(sample_seeds, 4, _COLOUR))
            result = self._normalised(pixels)
        if self.erasing is not None:
            u = seeds.tensor_uniforms(sample_seeds, 5, _ERASE)
            result.masked_fill_(self.erasing.boxes(u, *result.shape[1:3])[..., None], 0.0)
        result = result.permute(0, 3, 1, 2)
        return result if self.channels_last else result.contiguous()

    def _scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        scale = [1 / (255 * std) for std in self.std]
        shift = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        return torch.tensor(scale, device=device), torch.tensor(shift, device=device)

    def _normalised(self, pixels: Tensor) -> Tensor:
        # rows of whole pixels: with three values a row the arithmetic would not be vectorised
        batch, height, width, _ = pixels.shape
        scale, shift = (values.repeat(width) for values in self._scale_and_shift(pixels.device))
        rows = pixels.reshape(batch * height, width * 3)
        result = torch.addcmul(shift, rows.to(torch.float32), scale)
        return result.to(self.dtype).view(batch, height, width, 3)

    def _flipped_and_normalised(self, pixels: Tensor, flipped: Tensor) -> Tensor:
        """On the CPU: image by image while it is in the cache, into memory of large pages; four times as fast."""
        batch, height, width, _ = pixels.shape
        scale, shift = (values.repeat(width).numpy() for values in self._scale_and_shift(pixels.device))
        result = np.empty((batch, height, width * 3), dtype=np.float32)
        for source, target, flip in zip(pixels.contiguous().numpy(), result, flipped.tolist(), strict=True):
            rows = (cv2.flip(source, 1) if flip else source).reshape(height, width * 3)
            np.multiply(rows, scale, out=target)
            target += shift
        return torch.from_numpy(result).to(self.dtype).view(batch, height, width, 3)


# -- crops of cached images ----------------------------------------------------------------------------------------


def random_boxes(
    sample_seeds: Tensor,
    aspects: Tensor,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    tries: int = 10,
) -> Tensor:
    """Boxes of random area and aspect, torchvision's distribution (`decode.RandomResizedCrop`) for a whole batch.

    Args:
        sample_seeds: shape (B,), int64.
        aspects: width / height of the images, shape (B,).
        scale: least and greatest area, as a share of the image.
        ratio: least and greatest width / height.
        tries: after which the whole image is taken, cut to the nearest aspect allowed.

    Returns:
        Left, top, width, height as shares of the image, shape (B, 4), float32.
    """
    u = seeds.tensor_uniforms(sample_seeds, 2 * tries + 2, _BOX)
    area = scale[0] + (scale[1] - scale[0]) * u[:, : 2 * tries : 2]
    least, most = (torch.tensor(bound).log() for bound in ratio)
    shape = (least + (most - least) * u[:, 1 : 2 * tries : 2]).exp() / aspects[:, None]
    widths, heights = (area * shape).sqrt(), (area / shape).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    width, height = widths.gather(1, first)[:, 0], heights.gather(1, first)[:, 0]
    none = ~fits.any(1)
    width = torch.where(none, (ratio[1] / aspects).clamp(max=1), width)
    height = torch.where(none, (aspects / ratio[0]).clamp(max=1), height)
    middle = torch.full_like(width, 0.5)
    left = (1 - width) * torch.where(none, middle, u[:, -2])
    top = (1 - height) * torch.where(none, middle, u[:, -1])
    return torch.stack((left, top, width, height), 1)


def resampled(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it, antialiased bilinear as Pillow's, in two batched matrix products.

    Args:
        images: shape (B, H, W, 3), uint8.
        boxes: left, top, width, height as shares of the image, shape (B, 4).
        size: S.

    Returns:
        Shape (B, 3, S, S), channels-last in memory, float32, 0 to 255.
    """
    batch, height, width, _ = images.shape
    across = _weights(boxes[:, 0], boxes[:, 2], width, size)
    down = _weights(boxes[:, 1], boxes[:, 3], height, size)
    values = images.to(torch.float32)
    values = torch.bmm(down, values.reshape(batch, height, width * 3)).view(batch, size, width, 3)
    return torch.matmul(across[:, None], values).permute(0, 3, 1, 2)


def _weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Rows of weights that sum to 1: how much each of `source` pixels gives to each of `size`, shape (B, S, source)."""
    step = length * source / size
    centres = start[:, None] * source + (torch.arange(size, device=start.device) + 0.5) * step[:, None]
    pixels = torch.arange(source, device=start.device) + 0.5
    reach = step.clamp(min=1)[:, None, None]
    weights = (1 - (pixels - centres[:, :, None]).abs() / reach).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)
