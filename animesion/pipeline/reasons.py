"""Drop reasons of single images: failed fetches and decodes, limits on size, face crops and quality.

Each rule reads one row of the joined tables. Rules on metadata alone are in `animesion.pipeline.rules`; duplicates,
classes and splits are in `animesion.pipeline.curate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from animesion.config.recipe import Recipe
from animesion.dedup.clusters import Rows
from animesion.images import codec, quality
from animesion.pipeline import rules
from animesion.schemas import DropReason


def single_image_reasons(rows: Rows, recipe: Recipe, crashed: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Drop reason and detail of each row; both are empty for an image that passes.

    Args:
        rows: the columns that `animesion.pipeline.curate.decide` takes.
        recipe: its `filter`, `crop`, `quality` and `pack` sections matter.
        crashed: keys to drop as `crashed decoder`, with a detail.
    """
    reasons, details = [], []
    names = ("key", "reason", "detail", "seen_reason", "seen_detail")
    for i, row in enumerate(zip(*(rows[name] for name in names), strict=True)):
        # In the order of the stages: fetch, then pack (a crash), then inspect, then limits on its measurements.
        key, reason, detail, seen_reason, seen_detail = row
        if not reason and key in crashed:
            reason, detail = DropReason.CRASHED_DECODER, crashed[key]
        if not reason:
            reason, detail = (seen_reason, seen_detail) if seen_reason else _limits_reason(rows, i, recipe)
        reasons.append(reason)
        details.append(detail)
    return reasons, details


def _limits_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    width, height = rows["width"][i], rows["height"][i]
    short, long = sorted((width, height))
    if short < recipe.filter.min_side:
        return DropReason.TOO_SMALL, f"{width}x{height}"
    if recipe.filter.max_aspect and long > short * recipe.filter.max_aspect:
        return DropReason.ASPECT_RATIO, f"{width}x{height}"
    # A face that is dropped anyway gets the face's reason, even if its crop would also be too large to pack.
    if recipe.crop.detector != "none":
        reason, detail = _face_reason(rows, i, recipe)
        if reason:
            return reason, detail
    crop = rows["crop"][i] or (0, 0, width, height)
    oversize = _oversize(crop, recipe)
    return (DropReason.TOO_LARGE, oversize) if oversize else _quality_reason(rows, i, recipe)


def _quality_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    measures = {name: rows[name][i] for name in quality.COLUMNS if name in rows}
    return quality.reason(measures, recipe.quality)


def _face_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    width, height = rows["width"][i], rows["height"][i]
    faces, best, second = rows["faces"][i], rows["face_score"][i], rows["second_score"][i]
    reason = rules.face_reason(faces, best, second, recipe)
    if reason:
        doubt = f", second {second:.2f} is unsure" if rules.is_perhaps(faces, best, second, recipe) else ""
        return reason, f"{faces} boxes, best score {best:.2f}{doubt}"
    left, top, right, bottom = rows["crop"][i]
    if min(right - left, bottom - top) < recipe.crop.min_side:
        return DropReason.SMALL_FACE, f"{right - left}x{bottom - top}"
    # A crop may reach out of the image; only the part inside counts towards its share.
    inner_area = (min(right, width) - max(left, 0)) * (min(bottom, height) - max(top, 0))
    if inner_area < recipe.crop.min_share * width * height:
        return DropReason.SMALL_FACE, f"{inner_area / (width * height):.2%} of the image"
    reaches_out = min(left, top) < 0 or right > width or bottom > height
    if recipe.crop.outside == "drop" and reaches_out:
        return DropReason.CUT_FACE, f"{left},{top},{right},{bottom} in {width}x{height}"
    return "", ""


def _oversize(crop: Sequence[int], recipe: Recipe) -> str:
    """The packed image's size if the encoder or the decoder's limits do not allow it, else an empty string."""
    left, top, right, bottom = crop
    crop_width, crop_height = right - left, bottom - top
    width, height = codec.target_size(crop_width, crop_height, recipe.pack.size, recipe.pack.fit)
    max_side, max_pixels = recipe.filter.max_side, recipe.filter.max_pixels
    encodes = max(width, height) <= min(codec.LONGEST_SIDE[recipe.pack.format], max_side)
    # A padded crop exists at full size in memory before it is scaled, so the limits hold for it too.
    crop_fits = max(crop_width, crop_height) <= max_side and crop_width * crop_height <= max_pixels
    fits = encodes and width * height <= max_pixels and crop_fits
    return "" if fits else f"{width}x{height}"
