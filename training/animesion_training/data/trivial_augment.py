"""TrivialAugmentWide on the device: one random operation of random strength per image, for batches of uint8.

Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021 (arXiv 2103.10158),
with the operations and strengths of torchvision's `TrivialAugmentWide`. Colours are computed as in Pillow, in integers
as far as possible, so that an image has the same result in any batch. `augment` combines it with other augmentations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.data import seeds

#: The operations, in torchvision's order.
OPERATIONS = (
    "identity",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)

#: Number of strengths of each operation; 0 is the weakest.
LEVELS = 31

_TRIVIAL = 106

# bytes of images that a CPU processes in one call, so that they and all temporaries stay in its cache
_CACHED = 2**20

_SHEAR, _DEGREES, _CHANGE, _LEAST_BITS = 0.99, 135.0, 0.99, 2
# largest translation is side / 7: 32 of 224 pixels
_TRANSLATE_PART = 7


class OperationDraws(NamedTuple):
    """The drawn operation of each image of a batch.

    Attributes:
        operations: index in `OPERATIONS`, shape (B,), int64.
        levels: strength, 0 to `LEVELS` - 1, shape (B,), int64; ignored by identity, autocontrast and equalize.
        negative: whether the direction is reversed, shape (B,), bool; used by shears, translations, rotation,
            brightness, color, contrast and sharpness.
    """

    operations: Tensor
    levels: Tensor
    negative: Tensor


@dataclass(frozen=True)
class TrivialAugmentWide:
    """Apply one of 14 operations at one of 31 strengths to each image, all equally likely.

    The strongest are: shears by 0.99 pixels per row (column), translation by `translate`, rotation by 135 degrees,
    brightness, color, contrast and sharpness by a factor of 0.01 or 1.99, posterize to 2 bits, solarize from 0 on.
    Geometric operations sample the nearest pixel.

    Attributes:
        fill: value of pixels from outside the image, 0 to 255: one integer, or one each for red, green and blue.
        translate: largest translation in pixels. None is a seventh of the side, which is the 32 pixels of torchvision
            at 224, and proportionally less for smaller images. An integer applies at any size, as in torchvision.

    Raises:
        UsageError: a value outside its range.
    """

    fill: int | tuple[int, int, int] = 0
    translate: int | None = None

    def __post_init__(self) -> None:
        values = self.fill if isinstance(self.fill, tuple) else (self.fill,)
        if len(values) not in (1, 3) or not all(isinstance(value, int) and 0 <= value <= 255 for value in values):
            raise UsageError(f"fill must be an integer of 0 to 255, or a tuple of three, not {self.fill!r}")
        if self.translate is not None and (not isinstance(self.translate, int) or self.translate < 0):
            raise UsageError(f"translate must be a whole number of pixels, 0 or more, or None, not {self.translate!r}")

    @staticmethod
    def draw(sample_seeds: Tensor) -> OperationDraws:
        """Draw operation, strength and direction for each seed.

        Args:
            sample_seeds: shape (B,), int64.

        Returns:
            Shapes (B,), on the seeds' device.
        """
        u = seeds.tensor_uniforms(sample_seeds, 3, _TRIVIAL)
        return OperationDraws((u[:, 0] * len(OPERATIONS)).long(), (u[:, 1] * LEVELS).long(), u[:, 2] < 0.5)

    def __call__(self, images: Tensor, sample_seeds: Tensor) -> Tensor:
        """Draw an operation for each image and apply it.

        Args:
            images: shape (B, 3, H, W), uint8; fastest when channels-last in memory.
            sample_seeds: shape (B,), int64, on the same device.

        Returns:
            A new tensor of the same shape and type, channels-last.

        Raises:
            UsageError: images of another shape or type, or not as many seeds as images.
        """
        return self.apply(images, self.draw(sample_seeds))

    def apply(self, images: Tensor, drawn: OperationDraws) -> Tensor:
        """Apply drawn operations.

        Args:
            images: shape (B, 3, H, W), uint8; fastest when channels-last in memory.
            drawn: for the B images, on the same device.

        Returns:
            A new tensor of the same shape and type, channels-last.

        Raises:
            UsageError: images of another shape or type, or not as many operations as images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            actual = f"{images.dtype} of shape {tuple(images.shape)}"
            raise UsageError(
                f"TrivialAugmentWide takes uint8 images of shape (B, 3, H, W), not {actual}: normalise afterwards"
            )
        if len(drawn.operations) != len(images):
            raise UsageError(
                f"TrivialAugmentWide: {len(images)} images, {len(drawn.operations)} seeds: give one seed per image"
            )
        # sorted by kind, so that each kind is one call over its images; the counts synchronise with the device once
        kinds = _constants(images.device).kinds[drawn.operations]
        order = kinds.argsort(stable=True)
        counts = torch.bincount(kinds, minlength=len(_KINDS)).tolist()
        pixels = images.permute(0, 2, 3, 1).index_select(0, order)
        operations, settings = drawn.operations[order], (drawn.levels * 2 + drawn.negative)[order]
        # images per call
        most = max(1, _CACHED // math.prod(pixels.shape[1:]) if pixels.device.type == "cpu" else len(pixels))
        for change, end, count in zip(_KINDS, accumulate(counts), counts, strict=True):
            if change is None:
                continue
            for start in range(end - count, end, most):
                rows = slice(start, min(start + most, end))
                part = _Part(pixels[rows], operations[rows], settings[rows], self)
                part.pixels.copy_(change(part))
        return pixels.index_select(0, order.argsort()).permute(0, 3, 1, 2)


# -- operations -----------------------------------------------------------------------------------------------------
#
# Products and sums of floats are separate calls: with fused ones, the last bit of a value would depend on its position
# in the batch.


class _Part(NamedTuple):
    """Images (n, H, W, 3), uint8, contiguous, that share a kind of operation.

    `operations` (n,) are indices in `OPERATIONS`. `settings` (n,) are 2 * level + negative, 0 to 61.
    """

    pixels: Tensor
    operations: Tensor
    settings: Tensor
    options: TrivialAugmentWide


def _warp(part: _Part) -> Tensor:
    """Shears, translations and rotation: sample the nearest pixel of the image, framed with the fill colour."""
    pixels, device = part.pixels, part.pixels.device
    count, height, width, _ = pixels.shape
    fill = torch.tensor(part.options.fill, dtype=torch.uint8, device=device).expand(3)
    framed = fill.repeat(width + 2).expand(count, height + 2, -1).contiguous().view(count, height + 2, width + 2, 3)
    framed[:, 1:-1, 1:-1] = pixels
    warps = part.operations - OPERATIONS.index("shear-x")
    matrices = _matrices(height, width, part.options.translate, device)[warps, part.settings]  # (n, 6)
    ax, bx, cx, ay, by, cy = matrices[:, :, None, None].unbind(1)
    x = torch.arange(width, device=device, dtype=torch.float32)
    y = torch.arange(height, device=device, dtype=torch.float32)[:, None]
    # source positions (n, H, W); outside ones are clamped to the frame. None is below 0, so int32 takes the floor
    columns = (ax * x + (bx * y + cx)).clamp_(0, width + 1).to(torch.int32)
    rows = (ay * x + (by * y + cy)).clamp_(0, height + 1).to(torch.int32)
    firsts = torch.arange(count, device=device, dtype=torch.int32)[:, None, None] * ((height + 2) * (width + 2))
    positions = rows.mul_(width + 2).add_(columns).add_(firsts)
    return framed.view(-1, 3).index_select(0, positions.view(-1)).view_as(pixels)


def _apply_map(part: _Part) -> Tensor:
    """Brightness, posterize and solarize: precomputed maps of values."""
    constants = _constants(part.pixels.device)
    return _look_up(part.pixels, constants.maps[constants.map_rows[part.operations], part.settings])


def _contrast(part: _Part) -> Tensor:
    """Contrast: blend with the mean grey, rounded."""
    grey = _grey(_planes(part.pixels)).flatten(1)  # (n, H * W)
    mean = (grey.sum(1) * 2 + grey.shape[1]) // (2 * grey.shape[1])
    values = torch.arange(256, device=grey.device)
    return _look_up(part.pixels, _blend(mean[:, None].float(), values, _factors(part)[:, None]))


def _autocontrast(part: _Part) -> Tensor:
    """Autocontrast: stretch each channel, so that its darkest value becomes 0 and its lightest 255."""
    keys = _keys(part.pixels)
    values = torch.arange(256, device=keys.device, dtype=torch.int32)
    occurs = _histogram(keys, len(part.pixels)) > 0  # (n, 3, 256)
    least = values.where(occurs, 255).amin(2, keepdim=True)
    most = values.where(occurs, 0).amax(2, keepdim=True)
    spread = (values - least) * 255 // (most - least).clamp(min=1)
    return _take(part.pixels, keys, spread.where(most > least, values))


def _equalize(part: _Part) -> Tensor:
    """Equalize: map each value of a channel to the share of pixels below it, in Pillow's integer arithmetic."""
    keys = _keys(part.pixels)
    histogram = _histogram(keys, len(part.pixels))
    up_to = histogram.cumsum(2, dtype=torch.int32)
    # pixels of the lightest value that occurs: the first that reaches the total
    lightest = histogram.gather(2, up_to.argmax(2, keepdim=True))
    step = (up_to[..., -1:] - lightest) // 255
    ranks = (up_to - histogram + step // 2) // step.clamp(min=1)
    values = torch.arange(256, device=keys.device, dtype=torch.int32)
    return _take(part.pixels, keys, ranks.where(step > 0, values))


def _color(part: _Part) -> Tensor:
    """Color: blend with the grey image."""
    planes = _planes(part.pixels)
    changed = _blend(_grey(planes).float()[:, None], planes, _factors(part)[:, None, None, None])
    return changed.permute(0, 2, 3, 1)


def _sharpen(part: _Part) -> Tensor:
    """Sharpness: blend with the mean of 3x3 pixels, in which the centre counts five times; the border is unchanged."""
    wide = part.pixels.to(torch.int16)
    inner = wide[:, 1:-1, 1:-1]
    # sums over three rows, then over three columns, plus four times the centre
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
    # a thirteenth is never halfway between two integers, so rounding errors cannot change the result
    smooth = (sums * (1 / 13)).round_()
    result = part.pixels.clone()
    result[:, 1:-1, 1:-1] = _blend(smooth, inner, _factors(part)[:, None, None, None])
    return result


_CHANGES: dict[str, Callable[[_Part], Tensor] | None] = {
    "identity": None,
    "shear-x": _warp,
    "shear-y": _warp,
    "translate-x": _warp,
    "translate-y": _warp,
    "rotate": _warp,
    "brightness": _apply_map,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpen,
    "posterize": _apply_map,
    "solarize": _apply_map,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
_KINDS = tuple(dict.fromkeys(_CHANGES.values()))
_MAPPED = tuple(name for name, change in _CHANGES.items() if change is _apply_map)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _factors(part: _Part) -> Tensor:
    return _constants(part.pixels.device).factors[part.settings]


def _planes(pixels: Tensor) -> Tensor:
    """Channels first in memory, (n, 3, H, W): on a CPU this makes arithmetic over channels faster than it costs."""
    return pixels.permute(0, 3, 1, 2).contiguous()


def _grey(planes: Tensor) -> Tensor:
    """Luma of ITU-R BT.601 with the rounding of Pillow, (n, H, W), int32."""
    red, green, blue = planes.unbind(1)
    luma = red.to(torch.int32).mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(0x8000).bitwise_right_shift_(16)


def _blend(start: Tensor, end: Tensor, factors: Tensor) -> Tensor:
    """Blend `start` (factor 0) and `end` (factor 1), clamped to 0 to 255 and truncated to uint8."""
    return (end - start).mul_(factors).add_(start).clamp_(0, 255).to(torch.uint8)


def _keys(pixels: Tensor) -> Tensor:
    """Index of each value in a histogram of shape (n, 3, 256), (n * H * W * 3,), int32."""
    count, height, width, _ = pixels.shape
    firsts = torch.arange(count * 3, device=pixels.device, dtype=torch.int32).view(count, 1, 3) * 256
    return (pixels.view(count, height, width * 3) + firsts.repeat(1, 1, width)).view(-1)


def _histogram(keys: Tensor, count: int) -> Tensor:
    """Count the pixels of each value per image and channel, (n, 3, 256), int32."""
    histogram = torch.zeros(count * 3 * 256, device=keys.device, dtype=torch.int32)
    one = torch.ones(1, device=keys.device, dtype=torch.int32)
    return histogram.index_add_(0, keys, one.expand_as(keys)).view(count, 3, 256)


def _take(pixels: Tensor, keys: Tensor, maps: Tensor) -> Tensor:
    """Look up each key in maps of shape (n, 3, 256), clamped to 0 to 255."""
    return maps.clamp(0, 255).to(torch.uint8).view(-1).index_select(0, keys).view_as(pixels)


def _look_up(pixels: Tensor, maps: Tensor) -> Tensor:
    """Map values by one map per image, (n, 256)."""
    return _take(pixels, _keys(pixels), maps[:, None].expand(-1, 3, -1).contiguous())


# -- strengths -------------------------------------------------------------------------------------------------------


class _Constants(NamedTuple):
    """Tables on a device: kind (14,), row of the map (14,), factors (62,), maps (3, 62, 256)."""

    kinds: Tensor
    map_rows: Tensor
    factors: Tensor
    maps: Tensor


def _strengths(most: float) -> Tensor:
    """Signed strengths up to `most` for each setting, shape (62,), float64."""
    # float32 steps as in torchvision: after truncation to integers, the last bit matters
    steps = torch.linspace(0.0, most, LEVELS, dtype=torch.float32).double()
    return torch.stack((steps, -steps), 1).view(-1)


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> _Constants:
    values, level = torch.arange(256), torch.arange(LEVELS).repeat_interleave(2)[:, None]
    factors = (1 + _strengths(_CHANGE)).float()
    # bits that posterize drops, and the threshold of solarize
    lost = (level * (8 - _LEAST_BITS) / (LEVELS - 1)).round().long()
    threshold = (255 * torch.linspace(1.0, 0.0, LEVELS, dtype=torch.float32).double()).float()
    maps = {
        "brightness": (values * factors[:, None]).clamp(0, 255),
        "posterize": values >> lost << lost,
        "solarize": torch.where(values >= threshold[level], 255 - values, values),
    }
    return _Constants(
        torch.tensor([_KINDS.index(_CHANGES[name]) for name in OPERATIONS], device=device),
        torch.tensor([_MAPPED.index(name) if name in _MAPPED else -1 for name in OPERATIONS], device=device),
        factors.to(device),
        torch.stack([maps[name].to(torch.uint8) for name in _MAPPED]).to(device),
    )


@lru_cache(maxsize=32)
def _matrices(height: int, width: int, translate: int | None, device: torch.device) -> Tensor:
    """Affine maps from output to source pixels, for each warp and setting, shape (5, 62, 6), float32.

    The source column and row, in an image with a frame of one pixel, are floor(ax x + bx y + cx) and
    floor(ay x + by y + cy).
    """
    most_x, most_y = (side / _TRANSLATE_PART if translate is None else translate for side in (width, height))
    shear, angle = _strengths(_SHEAR), _strengths(_DEGREES) * (math.pi / 180)
    none, one = torch.zeros_like(shear), torch.ones_like(shear)
    cos, sin = angle.cos(), angle.sin()
    # of pixel centres; shears fix the top left corner, rotation fixes the centre
    maps = [
        (one, shear, none, none, one, none),
        (one, none, none, shear, one, none),
        (one, none, -_strengths(most_x).trunc(), none, one, none),
        (one, none, none, none, one, -_strengths(most_y).trunc()),
        (
            cos,
            -sin,
            (width - cos * width + sin * height) / 2,
            sin,
            cos,
            (height - sin * width - cos * height) / 2,
        ),
    ]
    rows = torch.stack([torch.stack(row, 1) for row in maps])
    # from pixel centres to indices: half a pixel in, and one pixel of frame out
    for offset in (2, 5):
        rows[..., offset] += (rows[..., offset - 2] + rows[..., offset - 1]) / 2 + 1
    return rows.float().to(device)
