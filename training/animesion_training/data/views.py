"""Views that a teacher makes of its own input: attention maps to crops and drops, batched on the device.

The augmentation of TGDA (Rios et al., arXiv 2507.12157), which takes it from WS-DAN (Hu et al., arXiv 1901.09891). All
chance is a hash of each sample's seed, so a sample gets the same views on any number of processes and after a resume.
Where maps come from is `models.cal`'s, what the student makes of the views `distillation`'s.

Nothing here waits for the device, and nothing raises on the values of maps. A map that is zero everywhere crops to the
whole image and drops all of it, as `map >= threshold * max` has it. Where no pixel reaches the threshold (NaN, a
negative maximum, a peak between the pixels of a small image) the crop is the whole image and nothing is dropped;
`check_finite` finds the NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.data import seeds
from animesion_training.options import in_range

#: Keeps the weight of a map that is zero above zero; of the original.
_EPS = 1e-6

Range = tuple[float, float]


class Draws(NamedTuple):
    """What chance decided for each sample of a batch; enough to make the same views again.

    Attributes:
        maps: (B, 2), int64, the maps that drive crop and drop; -1 for the mean over all maps.
        crop_threshold: (B,), float32, share of the map's maximum from which a pixel is inside the crop.
        drop_threshold: (B,), float32, share of the map's maximum from which a pixel is dropped.
    """

    maps: Tensor
    crop_threshold: Tensor
    drop_threshold: Tensor


@torch.no_grad()
def draw(
    sample_seeds: Tensor,
    attention: Tensor,
    *,
    sample_maps: bool = True,
    num_maps: int | None = None,
    crop: Range = (0.4, 0.6),
    drop: Range = (0.2, 0.5),
) -> Draws:
    """Draw maps and thresholds, a function of each sample's seed and attention alone.

    Args:
        sample_seeds: (B,), int64, as the stream gives them, on the attention's device.
        attention: (B, M, h, w), not negative.
        sample_maps: draw one map for the crop and one for the drop; else both use the mean over the maps.
        num_maps: draw from the first so many maps; all when None.
        crop: thresholds are uniform in [low, high), 0..1.
        drop: the same for drops.

    Raises:
        UsageError: a range or number of maps that cannot be.
        ValueError: shapes or types other than these.
    """
    _check_maps(attention)
    if sample_seeds.dtype != torch.int64 or sample_seeds.shape != attention.shape[:1]:
        raise ValueError(f"seeds must be int64 (B,), not {sample_seeds.dtype} {tuple(sample_seeds.shape)}")
    u = seeds.tensor_uniforms(sample_seeds, 4, seeds.VIEWS)
    maps = pick_maps(attention, u[:, :2], num_maps) if sample_maps else torch.full_like(u[:, :2], -1).long()
    return Draws(maps, _between("crop", crop, u[:, 2]), _between("drop", drop, u[:, 3]))


@torch.no_grad()
def views(images: Tensor, attention: Tensor, draws: Draws, *, padding: float = 0.1) -> Tensor:
    """One crop and one drop of each image, at its own size.

    Args:
        images: (B, C, H, W), floating, normalised: a dropped pixel becomes 0, the mean colour.
        attention: (B, M, h, w), the maps of these images.
        draws: of `draw`.
        padding: of the crops, as `crop_boxes` takes it.

    Returns:
        (2 B, C, H, W) of the images' type and memory format: the crops, then the drops.

    Raises:
        ValueError: shapes or types other than these.
    """
    _check_images(images, attention)
    crop_maps, drop_maps = picked(attention, draws.maps)
    boxes = crop_boxes(crop_maps, (images.shape[2], images.shape[3]), draws.crop_threshold, padding)
    return torch.cat((crop(images, boxes), drop(images, drop_maps, draws.drop_threshold)))


def check_finite(attention: Tensor) -> None:
    """Refuse attention that is not finite; waits for the device, so call it now and then rather than every step.

    Raises:
        UsageError: NaN or infinite values, and in how many images.
    """
    bad = int((~attention.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise UsageError(
            f"the teacher's attention is not finite for {bad} of {len(attention)} images: its weights are damaged "
            "or its precision overflows; compute it in bf16 or fp32"
        )


# -- maps ------------------------------------------------------------------------------------------------------------


def pick_weights(attention: Tensor, num_maps: int | None = None) -> Tensor:
    """How likely each map is picked: `sqrt(sum of the map + 1e-6)`, normalised to sum 1.

    Args:
        attention: (B, M, h, w), not negative.
        num_maps: only the first so many maps; all when None.

    Returns:
        (B, M) or (B, num_maps), float32.

    Raises:
        UsageError: `num_maps` is not from 1 to M.
    """
    _check_maps(attention)
    if num_maps is not None and not 1 <= num_maps <= attention.shape[1]:
        raise UsageError(f"num_maps must be from 1 to {attention.shape[1]}, the maps of the teacher, not {num_maps}")
    weights = (attention[:, :num_maps].float().sum((2, 3)) + _EPS).sqrt()
    return functional.normalize(weights, p=1.0, dim=1)


def pick_maps(attention: Tensor, u: Tensor, num_maps: int | None = None) -> Tensor:
    """Two maps of each image, drawn with replacement by `pick_weights`.

    Args:
        attention: (B, M, h, w), not negative.
        u: (B, 2), uniform in [0, 1); the same number gives the same map.
        num_maps: draw from the first so many maps; all when None.

    Returns:
        (B, 2), int64, 0..M-1: the map for the crop and the map for the drop.

    Raises:
        UsageError: `num_maps` is not from 1 to M.
    """
    weights = pick_weights(attention, num_maps).double()
    count = weights.shape[1]
    # not cumsum, which has no deterministic form on CUDA; M is small
    up_to = torch.ones(count, count, dtype=weights.dtype, device=weights.device).tril()
    shares = (weights[:, None] * up_to).sum(2)
    places = torch.searchsorted(shares, u.to(shares), right=True)
    return places.clamp(max=count - 1)  # shares may end a rounding below 1, and NaN sorts last


def picked(attention: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """The maps for the crop and for the drop.

    Args:
        attention: (B, M, h, w).
        maps: (B, 2), as in `Draws`.

    Returns:
        Two of (B, 1, h, w).
    """
    height, width = attention.shape[2:]
    taken = attention.gather(1, maps.clamp(min=0)[:, :, None, None].expand(-1, -1, height, width))
    taken = torch.where(maps[:, :, None, None] < 0, mean_map(attention), taken)
    return taken[:, :1], taken[:, 1:]


def mean_map(attention: Tensor) -> Tensor:
    """Maps (B, M, h, w) to their mean (B, 1, h, w), which drives crops and drops where none is sampled."""
    return attention.mean(1, keepdim=True)


def class_map(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Class activation map (CAM), not normalised; the ablation of TGDA puts it in the place of attention.

    `sum_c w[k, c] F[c]`; Zhou et al., CVPR 2016 (arXiv 1512.04150), eq. 2.

    Args:
        features: (B, C, h, w), what the pooling before the classifier is given.
        weight: (K, C), of the linear classifier.
        classes: (B,), int64: k of each image; in the ablation the class of the largest logit.

    Returns:
        (B, 1, h, w); negative values speak against the class.
    """
    return torch.einsum("bc,bchw->bhw", weight[classes], features)[:, None]


# -- crops -----------------------------------------------------------------------------------------------------------


def crop_boxes(maps: Tensor, size: tuple[int, int], thresholds: Tensor | float, padding: float = 0.1) -> Tensor:
    """The box around what a map attends to.

    The map is upsampled to the image (bilinear, corners aligned). The box bounds the pixels with at least
    `threshold` times the maximum of the given map, and grows by `padding` of the image on each side; as in the
    original, its last row and column are left out before it grows. It always has a pixel.

    Args:
        maps: (B, 1, h, w), floating.
        size: (H, W) of the images.
        thresholds: (B,) or one for all, shares of each map's maximum.
        padding: share of the image's side, >= 0.

    Returns:
        (B, 4), int64: y0, y1, x0, x1 in pixels, the ends exclusive.

    Raises:
        UsageError: a negative padding.
        ValueError: shapes or types other than these.
    """
    padding = in_range("padding", padding, low=0.0)
    inside = _attended(maps, size, thresholds)
    return torch.stack((*_extent(inside.any(2), padding), *_extent(inside.any(1), padding)), dim=1)


def _extent(hit: Tensor, padding: float) -> tuple[Tensor, Tensor]:
    """Start and end of the hits (B, L) along one side, padded; the whole side without a hit."""
    length = hit.shape[1]
    marks = hit.to(torch.uint8)
    first, last = marks.argmax(1), length - 1 - marks.flip(1).argmax(1)
    margin = padding * length
    # float64 and towards zero, as Python's int() of the original
    start = (first.double() - margin).clamp(min=0).long()
    end = torch.maximum((last.double() + margin).clamp(max=length).long(), start + 1)
    anything = hit.any(1)
    return torch.where(anything, start, 0), torch.where(anything, end, length)


def crop(images: Tensor, boxes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Cut a box out of each image and resize it, bilinear with aligned corners.

    Equals `interpolate(image[box], size, mode="bilinear", align_corners=True)` image by image up to rounding of
    the last bit, in a few calls for the whole batch. Sampling positions are rounded as there, which `grid_sample` and
    RoIAlign cannot do.

    Args:
        images: (B, C, H, W), floating.
        boxes: (B, 4), int64, as `crop_boxes` gives them; inside the images, with a pixel at least.
        size: (height, width) of the result; that of the images when None.

    Returns:
        (B, C, height, width) of the images' type and memory format.

    Raises:
        ValueError: shapes or types other than these.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating (B, C, H, W), not {images.dtype} {tuple(images.shape)}")
    if boxes.shape != (len(images), 4) or boxes.dtype != torch.int64:
        raise ValueError(f"boxes must be int64 ({len(images)}, 4), not {boxes.dtype} {tuple(boxes.shape)}")
    height, width = size or (images.shape[2], images.shape[3])
    y0, y1, x0, x1 = boxes.unbind(1)
    exact = torch.promote_types(images.dtype, torch.float32)
    low, high, share = _sources(y0, y1, height)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None]
    above, below = (images[batch, channels, rows[:, None]].to(exact) for rows in (low, high))
    result = torch.lerp(above, below, share[:, None, :, None].to(exact))
    low, high, share = _sources(x0, x1, width)
    left, right = (result.gather(3, at[:, None, None].expand(*result.shape[:3], width)) for at in (low, high))
    result = torch.lerp(left, right, share[:, None, None].to(exact)).to(images.dtype)
    return result.contiguous(memory_format=_format(images))


def _sources(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels that each of `size` results lies between, and the share of the second; each (B, size)."""
    last = (end - start - 1)[:, None]
    steps = torch.arange(size, dtype=torch.float32, device=start.device)
    # in float32, as interpolate() rounds them
    positions = last.float() / max(size - 1, 1) * steps
    low = torch.minimum(positions.long(), last)
    high = torch.minimum(low + 1, last)
    return start[:, None] + low, start[:, None] + high, (positions - low).clamp(max=1)


# -- drops -----------------------------------------------------------------------------------------------------------


def drop(images: Tensor, maps: Tensor, thresholds: Tensor | float) -> Tensor:
    """Set to 0 what a map attends to: the images (B, C, H, W) times `drop_mask`.

    Raises:
        ValueError: shapes or types other than these and those of `drop_mask`.
    """
    _check_images(images, maps)
    return images * drop_mask(maps, (images.shape[2], images.shape[3]), thresholds)


def drop_mask(maps: Tensor, size: tuple[int, int], thresholds: Tensor | float) -> Tensor:
    """Which pixels are kept.

    Args:
        maps: (B, 1, h, w), floating.
        size: (H, W) of the images.
        thresholds: (B,) or one for all; a pixel with at least this share of the given map's maximum is dropped.

    Returns:
        (B, 1, H, W), bool, true for what is kept.

    Raises:
        ValueError: shapes or types other than these.
    """
    return ~_attended(maps, size, thresholds)[:, None]


def _attended(maps: Tensor, size: tuple[int, int], thresholds: Tensor | float) -> Tensor:
    """(B, H, W), true where the upsampled map has its threshold's share of the maximum before upsampling."""
    _check_maps(maps, 1)
    maps = maps.detach().float()
    if isinstance(thresholds, Tensor):
        if thresholds.shape != maps.shape[:1]:
            raise ValueError(f"thresholds must be ({len(maps)},), one for each image, not {tuple(thresholds.shape)}")
        thresholds = thresholds.to(maps)[:, None, None, None]
    limits = thresholds * maps.amax((2, 3), keepdim=True)
    upsampled = functional.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    return (upsampled >= limits)[:, 0]


def _between(option: str, bounds: Range, u: Tensor) -> Tensor:
    low = in_range(f"{option}[0]", bounds[0], low=0.0, high=1.0)
    high = in_range(f"{option}[1]", bounds[1], low=low, high=1.0)
    return low + (high - low) * u


def _format(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _check_images(images: Tensor, maps: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or images.shape[0] != maps.shape[0]:
        raise ValueError(f"images must be floating ({len(maps)}, C, H, W), not {images.dtype} {tuple(images.shape)}")


def _check_maps(maps: Tensor, count: int | None = None) -> None:
    if maps.ndim != 4 or not maps.is_floating_point() or count not in (None, maps.shape[1]):
        wanted = "M" if count is None else count
        raise ValueError(f"maps must be floating (B, {wanted}, h, w), not {maps.dtype} {tuple(maps.shape)}")
