"""TrivialAugmentWide on the device: one random operation of random strength an image, for a whole batch of uint8.

Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021 (arXiv 2103.10158),
with the operations and strengths of torchvision's `TrivialAugmentWide`. Colours are computed as Pillow does, in whole
numbers as far as possible, so that an image comes out the same in any batch. When it is applied, before or after what
else, is left to `augment`.
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

#: Strengths of each operation, counted from 0, which is the weakest.
LEVELS = 31

_TRIVIAL = 106

# bytes of images that a CPU changes in one call: what that takes beside them must stay in its cache
_CACHED = 2**20

_SHEAR, _DEGREES, _CHANGE, _LEAST_BITS = 0.99, 135.0, 0.99, 2
# of a side: 32 pixels of 224
_TRANSLATE_PART = 7


class Drawn(NamedTuple):
    """What happens to each image of a batch.

    Attributes:
        operations: place in `OPERATIONS`, shape (B,), int64.
        levels: strength, 0 to `LEVELS` - 1, shape (B,), int64; of no effect on identity, autocontrast and equalize.
        negative: the opposite direction, shape (B,), bool; of effect on shears, translations, rotation, brightness,
            color, contrast and sharpness.
    """

    operations: Tensor
    levels: Tensor
    negative: Tensor


@dataclass(frozen=True)
class TrivialAugmentWide:
    """One of 14 operations at one of 31 strengths for each image, all equally likely.

    The strongest are: shears by 0.99 of a pixel a row (column), translation by `translate`, rotation by 135 degrees,
    brightness, color, contrast and sharpness by a factor of 0.01 or 1.99, posterize to 2 bits, solarize from 0 on.
    Geometry takes the nearest pixel.

    Attributes:
        fill: of pixels from outside the image, 0 to 255: one value, or red, green and blue.
        translate: pixels of the strongest translation. None takes a seventh of the side: the 32 pixels of torchvision
            at 224, and no more of a small image. An int is taken at any size, as torchvision does with its 32.

    Raises:
        UsageError: a value outside its range.
    """

    fill: int | tuple[int, int, int] = 0
    translate: int | None = None

    def __post_init__(self) -> None:
        values = self.fill if isinstance(self.fill, tuple) else (self.fill,)
        if len(values) not in (1, 3) or not all(isinstance(value, int) and 0 <= value <= 255 for value in values):
            raise UsageError(f"fill is an integer of 0 to 255, or three of them in a tuple, not {self.fill!r}")
        if self.translate is not None and (not isinstance(self.translate, int) or self.translate < 0):
            raise UsageError(f"translate is a number of whole pixels, 0 or more, or None, not {self.translate!r}")

    @staticmethod
    def draw(sample_seeds: Tensor) -> Drawn:
        """Draw operation, strength and direction for each seed.

        Args:
            sample_seeds: shape (B,), int64.

        Returns:
            Shapes (B,), on the seeds' device.
        """
        u = seeds.tensor_uniforms(sample_seeds, 3, _TRIVIAL)
        return Drawn((u[:, 0] * len(OPERATIONS)).long(), (u[:, 1] * LEVELS).long(), u[:, 2] < 0.5)

    def __call__(self, images: Tensor, sample_seeds: Tensor) -> Tensor:
        """Draw, and apply.

        Args:
            images: shape (B, 3, H, W), uint8; fastest when channels-last in memory.
            sample_seeds: shape (B,), int64, on the same device.

        Returns:
            New memory of the same shape and type, channels-last.

        Raises:
            UsageError: images of another shape or type, or not as many seeds as images.
        """
        return self.apply(images, self.draw(sample_seeds))

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Do to each image what was drawn for it.

        Args:
            images: shape (B, 3, H, W), uint8; fastest when channels-last in memory.
            drawn: for the B images, on the same device.

        Returns:
            New memory of the same shape and type, channels-last.

        Raises:
            UsageError: images of another shape or type, or not as many operations as images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise UsageError(
                f"TrivialAugmentWide takes uint8 images of shape (B, 3, H, W), not {given}; give it them unnormalised"
            )
        if len(drawn.operations) != len(images):
            raise UsageError(f"TrivialAugmentWide: {len(images)} images, {len(drawn.operations)} seeds; give one each")
        # sorted by kind, so that each is one call over its images; a device is waited for once, for the counts
        kinds = _on(images.device).kinds[drawn.operations]
        order = kinds.argsort(stable=True)
        counts = torch.bincount(kinds, minlength=len(_KINDS)).tolist()
        pixels = images.permute(0, 2, 3, 1).index_select(0, order)
        operations, settings = drawn.operations[order], (drawn.levels * 2 + drawn.negative)[order]
        most = max(1, _CACHED // math.prod(pixels.shape[1:]) if pixels.device.type == "cpu" else len(pixels))
        for change, end, count in zip(_KINDS, accumulate(counts), counts, strict=True):
            if change is None:
                continue
            for start in range(end - count, end, most):
                rows = slice(start, min(start + most, end))
                part = _Part(pixels[rows], operations[rows], settings[rows], self)
                part.pixels.copy_(change(part))
        return pixels.index_select(0, order.argsort()).permute(0, 3, 1, 2)


# -- the operations, on the images that drew them -------------------------------------------------------------------
#
# Products and sums of floats are separate calls: fused, the last bit of a value would depend on its place in the batch.


class _Part(NamedTuple):
    """Images (n, H, W, 3) of uint8, contiguous; their places in `OPERATIONS` and their settings, (n,).

    A setting is 2 * level + negative.
    """

    pixels: Tensor
    operations: Tensor
    settings: Tensor
    options: TrivialAugmentWide


def _warped(part: _Part) -> Tensor:
    """Shears, translations and rotation: of an image framed with the fill, the pixel at the nearest place."""
    pixels, device = part.pixels, part.pixels.device
    count, height, width, _ = pixels.shape
    fill = torch.tensor(part.options.fill, dtype=torch.uint8, device=device).expand(3)
    framed = fill.repeat(width + 2).expand(count, height + 2, -1).contiguous().view(count, height + 2, width + 2, 3)
    framed[:, 1:-1, 1:-1] = pixels
    warps = part.operations - OPERATIONS.index("shear-x")
    matrices = _matrices(height, width, part.options.translate, device)[warps, part.settings]
    ax, bx, cx, ay, by, cy = matrices[:, :, None, None].unbind(1)
    x = torch.arange(width, device=device, dtype=torch.float32)
    y = torch.arange(height, device=device, dtype=torch.float32)[:, None]
    # what lies outside is cut to the frame; nothing is below 0, so that int32 takes the floor
    columns = (ax * x + (bx * y + cx)).clamp_(0, width + 1).to(torch.int32)
    rows = (ay * x + (by * y + cy)).clamp_(0, height + 1).to(torch.int32)
    firsts = torch.arange(count, device=device, dtype=torch.int32)[:, None, None] * ((height + 2) * (width + 2))
    places = rows.mul_(width + 2).add_(columns).add_(firsts)
    return framed.view(-1, 3).index_select(0, places.view(-1)).view_as(pixels)


def _mapped(part: _Part) -> Tensor:
    """Brightness, posterize and solarize: a new value for each value, known beforehand."""
    constants = _on(part.pixels.device)
    return _looked_up(part.pixels, constants.maps[constants.map_rows[part.operations], part.settings])


def _contrasted(part: _Part) -> Tensor:
    """Contrast: away from the mean grey, rounded."""
    grey = _grey(_planes(part.pixels)).flatten(1)
    mean = (grey.sum(1) * 2 + grey.shape[1]) // (2 * grey.shape[1])
    values = torch.arange(256, device=grey.device)
    return _looked_up(part.pixels, _blended(mean[:, None].float(), values, _factors(part)[:, None]))


def _autocontrasted(part: _Part) -> Tensor:
    """Autocontrast: the darkest value of a channel becomes 0, its lightest 255."""
    keys = _keys(part.pixels)
    values = torch.arange(256, device=keys.device, dtype=torch.int32)
    occurs = _histogram(keys, len(part.pixels)) > 0
    least = values.where(occurs, 255).amin(2, keepdim=True)
    most = values.where(occurs, 0).amax(2, keepdim=True)
    spread = (values - least) * 255 // (most - least).clamp(min=1)
    return _found(part.pixels, keys, spread.where(most > least, values))


def _equalized(part: _Part) -> Tensor:
    """Equalize: values of a channel in proportion to the pixels below them, by Pillow's rule of whole numbers."""
    keys = _keys(part.pixels)
    histogram = _histogram(keys, len(part.pixels))
    up_to = histogram.cumsum(2, dtype=torch.int32)
    lightest = histogram.gather(2, up_to.argmax(2, keepdim=True))
    step = (up_to[..., -1:] - lightest) // 255
    ranks = (up_to - histogram + step // 2) // step.clamp(min=1)
    values = torch.arange(256, device=keys.device, dtype=torch.int32)
    return _found(part.pixels, keys, ranks.where(step > 0, values))


def _colored(part: _Part) -> Tensor:
    """Color: away from the image's grey."""
    planes = _planes(part.pixels)
    changed = _blended(_grey(planes).float()[:, None], planes, _factors(part)[:, None, None, None])
    return changed.permute(0, 2, 3, 1)


def _sharpened(part: _Part) -> Tensor:
    """Sharpness: away from the mean of 3x3 pixels in which the middle one counts five times; the border stays."""
    wide = part.pixels.to(torch.int16)
    inner = wide[:, 1:-1, 1:-1]
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
    # a thirteenth is never halfway between two whole numbers: no rounding error can tip it over
    smooth = (sums * (1 / 13)).round_()
    result = part.pixels.clone()
    result[:, 1:-1, 1:-1] = _blended(smooth, inner, _factors(part)[:, None, None, None])
    return result


_CHANGES: dict[str, Callable[[_Part], Tensor] | None] = {
    "identity": None,
    "shear-x": _warped,
    "shear-y": _warped,
    "translate-x": _warped,
    "translate-y": _warped,
    "rotate": _warped,
    "brightness": _mapped,
    "color": _colored,
    "contrast": _contrasted,
    "sharpness": _sharpened,
    "posterize": _mapped,
    "solarize": _mapped,
    "autocontrast": _autocontrasted,
    "equalize": _equalized,
}
_KINDS = tuple(dict.fromkeys(_CHANGES.values()))
_MAPPED = tuple(name for name, change in _CHANGES.items() if change is _mapped)


# -- what they share -------------------------------------------------------------------------------------------------


def _factors(part: _Part) -> Tensor:
    return _on(part.pixels.device).factors[part.settings]


def _planes(pixels: Tensor) -> Tensor:
    """Channels first in memory, (n, 3, H, W): on a CPU, arithmetic that mixes channels is faster by more than this."""
    return pixels.permute(0, 3, 1, 2).contiguous()


def _grey(planes: Tensor) -> Tensor:
    """Luma of ITU-R BT.601 as Pillow rounds it, (n, H, W), int32."""
    red, green, blue = planes.unbind(1)
    luma = red.to(torch.int32).mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(0x8000).bitwise_right_shift_(16)


def _blended(start: Tensor, end: Tensor, factors: Tensor) -> Tensor:
    """From `start` by `factors` of the way to `end`, cut to 0 to 255 and to whole numbers, uint8."""
    return (end - start).mul_(factors).add_(start).clamp_(0, 255).to(torch.uint8)


def _keys(pixels: Tensor) -> Tensor:
    """256 * (3 * image + channel) + value, for each value of the images in turn, int32."""
    count, height, width, _ = pixels.shape
    firsts = torch.arange(count * 3, device=pixels.device, dtype=torch.int32).view(count, 1, 3) * 256
    return (pixels.view(count, height, width * 3) + firsts.repeat(1, 1, width)).view(-1)


def _histogram(keys: Tensor, count: int) -> Tensor:
    """How many pixels of each image and channel have each value, (n, 3, 256), int32."""
    histogram = torch.zeros(count * 3 * 256, device=keys.device, dtype=torch.int32)
    one = torch.ones(1, device=keys.device, dtype=torch.int32)
    return histogram.index_add_(0, keys, one.expand_as(keys)).view(count, 3, 256)


def _found(pixels: Tensor, keys: Tensor, maps: Tensor) -> Tensor:
    """The value of its map for each key; maps have shape (n, 3, 256), and are cut to 0 to 255."""
    return maps.clamp(0, 255).to(torch.uint8).view(-1).index_select(0, keys).view_as(pixels)


def _looked_up(pixels: Tensor, maps: Tensor) -> Tensor:
    """A new value for each value, by maps of shape (n, 256)."""
    return _found(pixels, _keys(pixels), maps[:, None].expand(-1, 3, -1).contiguous())


# -- strengths -------------------------------------------------------------------------------------------------------


class _Constants(NamedTuple):
    """On a device: kind (14,), row of the map (14,), factors (62,), maps (3, 62, 256)."""

    kinds: Tensor
    map_rows: Tensor
    factors: Tensor
    maps: Tensor


def _signed(most: float) -> Tensor:
    """A strength of 0 to `most`, with its sign, for each setting: shape (62,), float64."""
    # in float32 as torchvision's: what is cut to whole numbers afterwards shows the last bit
    steps = torch.linspace(0.0, most, LEVELS, dtype=torch.float32).double()
    return torch.stack((steps, -steps), 1).view(-1)


@lru_cache(maxsize=8)
def _on(device: torch.device) -> _Constants:
    values, level = torch.arange(256), torch.arange(LEVELS).repeat_interleave(2)[:, None]
    factors = (1 + _signed(_CHANGE)).float()
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
    """Where pixels come from, for each warp and setting, shape (5, 62, 6), float32.

    Column and row in an image with a frame of one pixel are floor(ax x + bx y + cx) and floor(ay x + by y + cy).
    """
    most_x, most_y = (side / _TRANSLATE_PART if translate is None else translate for side in (width, height))
    shear, angle = _signed(_SHEAR), _signed(_DEGREES) * (math.pi / 180)
    none, one = torch.zeros_like(shear), torch.ones_like(shear)
    cos, sin = angle.cos(), angle.sin()
    # of pixel centres; shears keep the top left corner, the rotation the middle
    maps = [
        (one, shear, none, none, one, none),
        (one, none, none, shear, one, none),
        (one, none, -_signed(most_x).trunc(), none, one, none),
        (one, none, none, none, one, -_signed(most_y).trunc()),
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
    for offset in (2, 5):
        rows[..., offset] += (rows[..., offset - 2] + rows[..., offset - 1]) / 2 + 1
    return rows.float().to(device)
