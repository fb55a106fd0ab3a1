"""Attention-guided views: crops, drops and mixtures of images from attention maps, batched on the device.

Crops and drops are the augmentation of TGDA (Rios et al., arXiv 2507.12157), originally from WS-DAN (Hu et al., arXiv
1901.09891). Mixtures are those of CALMix (Rios et al., arXiv 2605.18700): two images of a class exchange the regions
that are attended most.
All random numbers are hashed from the seeds of samples, so a sample has the same views on any number of processes and
after resuming. `animesion_training.models.cal` computes the maps, `animesion_training.losses.distillation` the losses.

Nothing here synchronises with the device, and nothing raises on the values of maps. A map that is zero everywhere crops
to the whole image and drops all of it, as `map >= threshold * max` implies. Where no pixel reaches the threshold (NaN,
a negative maximum, a peak between the pixels of a small image), the crop is the whole image and nothing is dropped;
`check_finite` detects NaN.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.data import seeds
from animesion_training.options import in_range

#: Keeps the weight of an all-zero map above zero; the value of the original.
_EPS = 1e-6

Range = tuple[float, float]

#: How a map is upsampled to the image before it is compared with its threshold. `bilinear` with aligned corners is that
#: of TGDA; `bicubic` with aligned borders is that of CALMix, whose values may exceed those of the map.
Upsampling = Literal["bilinear", "bicubic"]


class Draws(NamedTuple):
    """The random draws of each sample of a batch, from which `views` is deterministic.

    Attributes:
        maps: (B, 2), int64, indices of the maps for crop and drop; -1 for the mean over all maps.
        crop_threshold: (B,), float32, share of the map's maximum from which a pixel is inside the crop.
        drop_threshold: (B,), float32, share of the map's maximum from which a pixel is dropped.
    """

    maps: Tensor
    crop_threshold: Tensor
    drop_threshold: Tensor


class Mixture(NamedTuple):
    """What the mixture of each image of a batch is made from.

    Attributes:
        partners: (B,), int64, index of each image's partner in the batch.
        maps: (B, 1), int64, index of the map of the region that is exchanged; -1 for the mean over all maps.
        threshold: (B,), float32, share of the map's maximum from which a pixel is inside the region.
    """

    partners: Tensor
    maps: Tensor
    threshold: Tensor


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
    """Draw maps and thresholds from the seed and attention of each sample.

    Args:
        sample_seeds: (B,), int64, from the stream, on the device of the attention.
        attention: (B, M, h, w), non-negative.
        sample_maps: whether to draw one map for the crop and one for the drop; otherwise both use the mean map.
        num_maps: draw from the first `num_maps` maps; None for all.
        crop: range [low, high) of uniform thresholds for crops, 0..1.
        drop: the same for drops.

    Raises:
        UsageError: an invalid range or number of maps.
        ValueError: shapes or types other than these.
    """
    _check_maps(attention)
    if sample_seeds.dtype != torch.int64 or sample_seeds.shape != attention.shape[:1]:
        raise ValueError(f"seeds must be int64 (B,), not {sample_seeds.dtype} {tuple(sample_seeds.shape)}")
    u = seeds.tensor_uniforms(sample_seeds, 4, seeds.VIEWS)
    maps = pick_maps(attention, u[:, :2], num_maps) if sample_maps else torch.full_like(u[:, :2], -1).long()
    return Draws(maps, _between("crop", crop, u[:, 2]), _between("drop", drop, u[:, 3]))


@torch.no_grad()
def draw_mixture(
    sample_seeds: Tensor,
    attention: Tensor,
    partners: Tensor,
    *,
    sample_maps: bool = True,
    num_maps: int | None = None,
    threshold: Range = (0.6, 0.8),
) -> Mixture:
    """Draw map and threshold of the region that each image exchanges with its partner, independently of `draw`.

    Args:
        sample_seeds: as for `draw`.
        attention: as for `draw`.
        partners: (B,), int64, index of each image's partner.
        sample_maps: as for `draw`.
        num_maps: as for `draw`.
        threshold: range [low, high) of uniform thresholds, 0..1.

    Raises:
        UsageError: an invalid range or number of maps.
    """
    u = seeds.tensor_uniforms(sample_seeds, 2, seeds.MIXTURES)
    maps = pick_maps(attention, u[:, :1], num_maps) if sample_maps else torch.full_like(u[:, :1], -1).long()
    return Mixture(partners, maps, _between("threshold", threshold, u[:, 1]))


@torch.no_grad()
def views(
    images: Tensor,
    attention: Tensor,
    draws: Draws,
    *,
    padding: float = 0.1,
    upsampling: Upsampling = "bilinear",
    pool: bool = False,
    mixture: Mixture | None = None,
    drops: bool = True,
) -> Tensor:
    """Make a crop of each image, and mixtures and drops if requested, at the size of the image.

    Args:
        images: (B, C, H, W), floating, normalised: a dropped pixel becomes 0, the mean colour.
        attention: (B, M, h, w), the maps of these images.
        draws: from `draw`.
        padding: of the crops, see `crop_boxes`; regions that are exchanged have none.
        upsampling: of maps, see `Upsampling`.
        pool: whether maps are averaged over 2x2 cells first, see `pool_map`.
        mixture: from `draw_mixture`; None for no mixtures.
        drops: whether to make drops.

    Returns:
        Crops, mixtures and drops, as far as they are made, one kind after the other: (n B, C, H, W) of the type and
        memory format of the images.

    Raises:
        UsageError: see `crop_boxes` and `pool_map`.
        ValueError: shapes or types other than these.
    """
    _check_images(images, attention)

    def selected(indices: Tensor) -> list[Tensor]:
        return [pool_map(each) if pool else each for each in select_maps(attention, indices)]

    crop_maps, drop_maps = selected(draws.maps)
    size = (images.shape[2], images.shape[3])
    made = [crop(images, crop_boxes(crop_maps, size, draws.crop_threshold, padding, upsampling))]
    if mixture is not None:
        boxes = crop_boxes(selected(mixture.maps)[0], size, mixture.threshold, 0.0, upsampling)
        made.append(exchange(images, boxes, mixture.partners))
    if drops:
        made.append(drop(images, drop_maps, draws.drop_threshold, upsampling))
    return torch.cat(made)


def check_finite(attention: Tensor) -> None:
    """Check that attention is finite. This synchronises with the device: do not call it in every step.

    Raises:
        UsageError: NaN or infinite values; the message states in how many images.
    """
    bad = int((~attention.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise UsageError(
            f"the teacher's attention is not finite for {bad} of {len(attention)} images: its weights are damaged "
            "or its precision overflows: compute it in bf16 or fp32"
        )


@torch.no_grad()
def displace(attention: Tensor, sample_seeds: Tensor) -> Tensor:
    """Move the maps of each image by a random offset, around the edges: views of the same sizes, anywhere.

    For comparison with views that follow the attention.

    Args:
        attention: (B, M, h, w).
        sample_seeds: (B,), int64; all maps of an image move together.
    """
    height, width = attention.shape[2:]
    u = seeds.tensor_uniforms(sample_seeds, 2, seeds.OFFSETS)
    down, across = (u * u.new_tensor([height, width])).long().unbind(1)
    rows = (torch.arange(height, device=u.device) + down[:, None]) % height  # (B, h)
    columns = (torch.arange(width, device=u.device) + across[:, None]) % width  # (B, w)
    batch = torch.arange(len(attention), device=u.device)[:, None, None]
    moved = attention.movedim(1, 3)[batch, rows[:, :, None], columns[:, None]]  # (B, h, w, M)
    return moved.movedim(3, 1)


# -- maps ------------------------------------------------------------------------------------------------------------


def pick_weights(attention: Tensor, num_maps: int | None = None) -> Tensor:
    """Compute the probability of each map: `sqrt(sum of the map + 1e-6)`, normalised to sum 1.

    Args:
        attention: (B, M, h, w), non-negative.
        num_maps: use the first `num_maps` maps; None for all.

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
    """Draw maps of each image with replacement, with the probabilities of `pick_weights`.

    Args:
        attention: (B, M, h, w), non-negative.
        u: (B, n), uniform in [0, 1), a number for each map to draw; equal numbers pick equal maps.
        num_maps: use the first `num_maps` maps; None for all.

    Returns:
        (B, n), int64, 0..M-1.

    Raises:
        UsageError: `num_maps` is not from 1 to M.
    """
    weights = pick_weights(attention, num_maps).double()
    count = weights.shape[1]
    # cumulative sums (B, M) by a triangular mask: cumsum is not deterministic on CUDA, and M is small
    up_to = torch.ones(count, count, dtype=weights.dtype, device=weights.device).tril()
    cumulative = (weights[:, None] * up_to).sum(2)
    maps = torch.searchsorted(cumulative, u.to(cumulative), right=True)
    return maps.clamp(max=count - 1)  # the last sum may be rounded to below 1, and NaN sorts last


def select_maps(attention: Tensor, maps: Tensor) -> tuple[Tensor, ...]:
    """Select the maps of each view.

    Args:
        attention: (B, M, h, w).
        maps: (B, n), see `Draws`.

    Returns:
        n maps, each (B, 1, h, w).
    """
    height, width = attention.shape[2:]
    selected = attention.gather(1, maps.clamp(min=0)[:, :, None, None].expand(-1, -1, height, width))  # (B, n, h, w)
    selected = torch.where(maps[:, :, None, None] < 0, mean_map(attention), selected)
    return tuple(each[:, None] for each in selected.unbind(1))


def mean_map(attention: Tensor) -> Tensor:
    """Compute the mean (B, 1, h, w) of maps (B, M, h, w)."""
    return attention.mean(1, keepdim=True)


def pool_map(maps: Tensor) -> Tensor:
    """Average maps (B, 1, h, w) over 2x2 cells, without an odd last row or column: (B, 1, h // 2, w // 2).

    An option of CALMix's authors, which smooths the regions. Its maximum is that of the averages.

    Raises:
        UsageError: a map with a side of 1.
    """
    if min(maps.shape[2:]) < 2:
        raise UsageError(
            f"maps of {maps.shape[2]}x{maps.shape[3]} cannot be averaged over 2x2 cells: switch pool off, or give "
            "larger images"
        )
    return functional.avg_pool2d(maps, 2)


def class_map(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Compute class activation maps (CAM), not normalised; an ablation of TGDA uses them instead of attention.

    `sum_c w[k, c] F[c]`; Zhou et al., CVPR 2016 (arXiv 1512.04150), eq. 2.

    Args:
        features: (B, C, h, w), input of the pooling before the classifier.
        weight: (K, C), of the linear classifier.
        classes: (B,), int64: k of each image; in the ablation the class of the largest logit.

    Returns:
        (B, 1, h, w); negative values are evidence against the class.
    """
    return torch.einsum("bc,bchw->bhw", weight[classes], features)[:, None]


# -- crops -----------------------------------------------------------------------------------------------------------


def crop_boxes(
    maps: Tensor,
    size: tuple[int, int],
    thresholds: Tensor | float,
    padding: float = 0.1,
    upsampling: Upsampling = "bilinear",
    *,
    absolute: bool = False,
) -> Tensor:
    """Compute the box around the attended region of a map.

    The map is upsampled to the image. The box bounds the pixels with at least `threshold` times the maximum of the
    given map, without its last row and column as in the original, and is padded by `padding` of the image on each side.
    It contains at least one pixel.

    Args:
        maps: (B, 1, h, w), floating.
        size: (H, W) of the images.
        thresholds: (B,) or one for all, shares of the maximum of each map.
        padding: share of the side of the image, >= 0.
        upsampling: see `Upsampling`.
        absolute: whether thresholds are values of the map instead of shares of its maximum.

    Returns:
        (B, 4), int64: y0, y1, x0, x1 in pixels, the ends exclusive.

    Raises:
        UsageError: a negative padding.
        ValueError: shapes or types other than these.
    """
    padding = in_range("padding", padding, low=0.0)
    inside = _attended(maps, size, thresholds, upsampling, absolute=absolute)  # (B, H, W)
    return torch.stack((*_extent(inside.any(2), padding), *_extent(inside.any(1), padding)), dim=1)


def _extent(hit: Tensor, padding: float) -> tuple[Tensor, Tensor]:
    """Start and end (B,) of the hits (B, L) along one side, padded; the whole side without hits."""
    length = hit.shape[1]
    marks = hit.to(torch.uint8)
    first, last = marks.argmax(1), length - 1 - marks.flip(1).argmax(1)
    margin = padding * length
    # float64 and truncated, as int() in the original
    start = (first.double() - margin).clamp(min=0).long()
    end = torch.maximum((last.double() + margin).clamp(max=length).long(), start + 1)
    any_hit = hit.any(1)
    return torch.where(any_hit, start, 0), torch.where(any_hit, end, length)


def crop(images: Tensor, boxes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Crop a box from each image and resize it, bilinear with aligned corners.

    This equals `interpolate(image[box], size, mode="bilinear", align_corners=True)` for each image up to the last bit,
    in a few calls for the whole batch. Sampling positions are rounded in the same way, which `grid_sample` and RoIAlign
    do not offer.

    Args:
        images: (B, C, H, W), floating.
        boxes: (B, 4), int64, from `crop_boxes`: inside the images, with at least one pixel.
        size: (height, width) of the result; None for the size of the images.

    Returns:
        (B, C, height, width) of the type and memory format of the images.

    Raises:
        ValueError: shapes or types other than these.
    """
    _check_boxes(images, boxes)
    height, width = size or (images.shape[2], images.shape[3])
    y0, y1, x0, x1 = boxes.unbind(1)
    return _resample(images, _sources(y0, y1, height), _sources(x0, x1, width))


def exchange(images: Tensor, boxes: Tensor, partners: Tensor) -> Tensor:
    """Give each image the region of its partner: the mixtures of CALMix (arXiv 2605.18700).

    What is in the partner's box is resized to the image's own box, bilinear with aligned corners and without keeping
    its aspect, and replaces what is there. The rest of the image stays. Regions are those of the original images.

    Args:
        images: (B, C, H, W), floating.
        boxes: (B, 4), int64, from `crop_boxes`.
        partners: (B,), int64; an image whose partner is itself does not change.

    Returns:
        (B, C, H, W) of the type and memory format of the images.

    Raises:
        ValueError: shapes or types other than these.
    """
    _check_boxes(images, boxes)
    if partners.shape != (len(images),) or partners.dtype != torch.int64:
        raise ValueError(f"partners must be int64 ({len(images)},), not {partners.dtype} {tuple(partners.shape)}")
    inside, sources = [], []
    others = boxes[partners]
    for axis, at in ((2, 0), (3, 2)):  # y0 and y1, then x0 and x1
        start, end = boxes[:, at, None], boxes[:, at + 1, None]
        steps = torch.arange(images.shape[axis], device=images.device) - start  # (B, L): 0 at the start of the own box
        inside.append((steps >= 0) & (steps < end - start))
        steps = steps.clamp(min=0).float()
        sources.append(_between_pixels(others[:, at], others[:, at + 1], steps, (end - start - 1).clamp(min=1)))
    region = inside[0][:, None, :, None] & inside[1][:, None, None]  # (B, 1, H, W)
    mixed = torch.where(region, _resample(images[partners], *sources), images)
    return mixed.contiguous(memory_format=_format(images))


_Sources = tuple[Tensor, Tensor, Tensor]


def _resample(images: Tensor, rows: _Sources, columns: _Sources) -> Tensor:
    """Interpolate between two rows and two columns of images for each pixel of the result; see `_sources`."""
    exact = torch.promote_types(images.dtype, torch.float32)
    width = columns[0].shape[1]
    # between rows, (B, C, height, W), then between columns, (B, C, height, width)
    low, high, share = rows
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None]
    above, below = (images[batch, channels, rows[:, None]].to(exact) for rows in (low, high))
    result = torch.lerp(above, below, share[:, None, :, None].to(exact))
    low, high, share = columns
    left, right = (result.gather(3, at[:, None, None].expand(*result.shape[:3], width)) for at in (low, high))
    result = torch.lerp(left, right, share[:, None, None].to(exact)).to(images.dtype)
    return result.contiguous(memory_format=_format(images))


def _sources(start: Tensor, end: Tensor, size: int) -> _Sources:
    """The two source pixels of each of `size` results, and the weight of the second; each (B, size)."""
    return _between_pixels(start, end, torch.arange(size, dtype=torch.float32, device=start.device), max(size - 1, 1))


def _between_pixels(start: Tensor, end: Tensor, steps: Tensor, most: Tensor | int) -> _Sources:
    """The two source pixels from `start` to `end`, (B,), of results numbered by `steps`, up to `most`."""
    last = (end - start - 1)[:, None]
    # in float32, with the rounding of interpolate()
    positions = last.float() / most * steps
    low = torch.minimum(positions.long(), last)
    high = torch.minimum(low + 1, last)
    return start[:, None] + low, start[:, None] + high, (positions - low).clamp(max=1)


# -- drops -----------------------------------------------------------------------------------------------------------


def drop(images: Tensor, maps: Tensor, thresholds: Tensor | float, upsampling: Upsampling = "bilinear") -> Tensor:
    """Set the attended region to 0: images (B, C, H, W) times `drop_mask`.

    Raises:
        ValueError: shapes or types other than these and those of `drop_mask`.
    """
    _check_images(images, maps)
    return images * drop_mask(maps, (images.shape[2], images.shape[3]), thresholds, upsampling)


def drop_mask(
    maps: Tensor, size: tuple[int, int], thresholds: Tensor | float, upsampling: Upsampling = "bilinear"
) -> Tensor:
    """Compute the mask of pixels that are kept.

    Args:
        maps: (B, 1, h, w), floating.
        size: (H, W) of the images.
        thresholds: (B,) or one for all; pixels with at least this share of the maximum of the given map are dropped.
        upsampling: see `Upsampling`.

    Returns:
        (B, 1, H, W), bool, true for kept pixels.

    Raises:
        ValueError: shapes or types other than these.
    """
    return ~_attended(maps, size, thresholds, upsampling)[:, None]


def _attended(
    maps: Tensor,
    size: tuple[int, int],
    thresholds: Tensor | float,
    upsampling: Upsampling = "bilinear",
    *,
    absolute: bool = False,
) -> Tensor:
    """Mask (B, H, W) of pixels where the upsampled map reaches its threshold's share of the original map's maximum."""
    if upsampling not in ("bilinear", "bicubic"):
        raise UsageError(f"upsampling of maps is bilinear or bicubic, not {upsampling!r}")
    _check_maps(maps, 1)
    maps = maps.detach().float()
    if isinstance(thresholds, Tensor):
        if thresholds.shape != maps.shape[:1]:
            raise ValueError(f"thresholds must be ({len(maps)},), one per image, not {tuple(thresholds.shape)}")
        thresholds = thresholds.to(maps)[:, None, None, None]
    limits = thresholds if absolute else thresholds * maps.amax((2, 3), keepdim=True)
    upsampled = functional.interpolate(maps, size=size, mode=upsampling, align_corners=upsampling == "bilinear")
    return (upsampled >= limits)[:, 0]


def _between(option: str, bounds: Range, u: Tensor) -> Tensor:
    low = in_range(f"{option}[0]", bounds[0], low=0.0, high=1.0)
    high = in_range(f"{option}[1]", bounds[1], low=low, high=1.0)
    return low + (high - low) * u


def _format(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _check_boxes(images: Tensor, boxes: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating (B, C, H, W), not {images.dtype} {tuple(images.shape)}")
    if boxes.shape != (len(images), 4) or boxes.dtype != torch.int64:
        raise ValueError(f"boxes must be int64 ({len(images)}, 4), not {boxes.dtype} {tuple(boxes.shape)}")


def _check_images(images: Tensor, maps: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or images.shape[0] != maps.shape[0]:
        raise ValueError(f"images must be floating ({len(maps)}, C, H, W), not {images.dtype} {tuple(images.shape)}")


def _check_maps(maps: Tensor, count: int | None = None) -> None:
    if maps.ndim != 4 or not maps.is_floating_point() or count not in (None, maps.shape[1]):
        expected = "M" if count is None else count
        raise ValueError(f"maps must be floating (B, {expected}, h, w), not {maps.dtype} {tuple(maps.shape)}")
