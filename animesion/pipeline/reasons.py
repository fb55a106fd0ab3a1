"""Drop reasons of single images: failed fetches and decodes, limits on size, face crops and quality.

Arrays tell which rows a limit may apply to; the rules read those one by one. Rules on metadata alone are in
`animesion.pipeline.rules`; duplicates, classes and splits are in `animesion.pipeline.curate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.config.recipe import Recipe
from animesion.dedup import search
from animesion.dedup.clusters import Rows
from animesion.images import codec, quality
from animesion.pipeline import rules
from animesion.pipeline.columns import BATCH, Coded, IntArray, Texts
from animesion.schemas import DropReason


def single_image_reasons(rows: Rows, recipe: Recipe, crashed: Mapping[str, str]) -> tuple[Coded, Texts]:
    """Drop reason and detail of each row; both are empty for an image that passes.

    Args:
        rows: the columns that `animesion.pipeline.curate.decide` takes.
        recipe: its `filter`, `crop`, `quality` and `pack` sections matter.
        crashed: keys to drop as `crashed decoder`, with a detail.
    """
    # In the order of the stages: fetch, then pack (a crash), then inspect, then limits on its measurements.
    fetched, seen = rows["reason"], rows["seen_reason"]
    failed, not_seen = ~fetched.has(""), ~seen.has("")
    reasons = Coded(fetched.codes.copy(), fetched.names)
    codes = np.array([reasons.code(name) for name in seen.names], dtype=np.int32)
    later = not_seen & ~failed
    reasons.codes[later] = codes[seen.codes[later]]
    nothing = pa.scalar("", rows["detail"].type)
    detail = pc.if_else(not_seen, rows["seen_detail"].cast(rows["detail"].type), nothing)
    details = Texts(pc.if_else(failed, rows["detail"], detail))
    pending = ~failed & ~not_seen
    for key, i in search.rows_of(rows["key"], crashed).items():
        if not failed[i]:
            reasons[i], details[i] = DropReason.CRASHED_DECODER, crashed[key]
            pending[i] = False
    chosen = np.flatnonzero(pending)
    for start in range(0, len(chosen), BATCH):
        some = chosen[start : start + BATCH]
        for i in some[_may_exceed(rows, some, recipe)].tolist():
            reason, why = _limits_reason(rows, i, recipe)
            if reason:
                reasons[i], details[i] = reason, why
    return reasons, details


def _may_exceed(rows: Rows, chosen: IntArray, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Which of some rows `_limits_reason` may have a reason for; no other row has one.

    Args:
        rows: the columns.
        chosen: shape (c,).
        recipe: the recipe.

    Returns:
        Shape (c,).
    """
    width, height = (rows[name][chosen].astype(np.int64) for name in ("width", "height"))
    short, long = np.minimum(width, height), np.maximum(width, height)
    found = short < recipe.filter.min_side
    if recipe.filter.max_aspect:
        found |= long > short * recipe.filter.max_aspect
    left, top, right, bottom = rows["crop"][chosen].astype(np.int64).T
    crop_width, crop_height = right - left, bottom - top
    if (crop := recipe.crop).detector != "none":
        faces = rows["faces"][chosen]
        best, second = (rows[name][chosen].astype(np.float64) for name in ("face_score", "second_score"))
        # the lowest of the limits on each figure: which one counts is for `rules.face_reason` to say
        found |= (faces == 0) | (best < max(crop.min_score, crop.unsure_score))
        found |= (faces > 1) & (second >= min(crop.min_score, crop.unsure_score) - rules.SLACK)
        found |= np.minimum(crop_width, crop_height) < crop.min_side
        inner = (np.minimum(right, width) - np.maximum(left, 0)) * (np.minimum(bottom, height) - np.maximum(top, 0))
        found |= inner < crop.min_share * width * height
        found |= (np.minimum(left, top) < 0) | (right > width) | (bottom > height)
    limits, side = recipe.filter, recipe.pack.size
    target_width, target_height = crop_width, crop_height
    if side and recipe.pack.fit == "stretch":
        target_width = target_height = np.full(len(chosen), side)
    elif side:  # as `codec.target_size`
        fitted = np.minimum(crop_width, crop_height)
        fitted = np.maximum(fitted if recipe.pack.fit == "short-side" else np.maximum(crop_width, crop_height), 1)
        target_width, target_height = ((2 * each * side + fitted) // (2 * fitted) for each in (crop_width, crop_height))
    longest = min(codec.LONGEST_SIDE[recipe.pack.format], limits.max_side)
    found |= np.maximum(target_width, target_height) > longest
    found |= target_width * target_height > limits.max_pixels
    found |= np.maximum(crop_width, crop_height) > limits.max_side
    found |= crop_width * crop_height > limits.max_pixels
    for check in quality.checks(recipe.quality):
        if check.column in rows:
            figures = rows[check.column].take(pa.array(chosen))
            values = figures.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
            found |= check.beyond(values)
    exceeding: npt.NDArray[np.bool_] = found
    return exceeding


def _limits_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    width, height = rows["width"][i].item(), rows["height"][i].item()
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
    oversize = _oversize(rows["crop"][i].tolist(), recipe)
    return (DropReason.TOO_LARGE, oversize) if oversize else _quality_reason(rows, i, recipe)


def _quality_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    measures = {name: rows[name][i].as_py() for name in quality.COLUMNS if name in rows}
    return quality.reason(measures, recipe.quality)


def _face_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    width, height = rows["width"][i].item(), rows["height"][i].item()
    faces, best, second = (rows[name][i].item() for name in ("faces", "face_score", "second_score"))
    reason = rules.face_reason(faces, best, second, recipe)
    if reason:
        doubt = f", second {second:.2f} is unsure" if rules.is_perhaps(faces, best, second, recipe) else ""
        return reason, f"{faces} boxes, best score {best:.2f}{doubt}"
    left, top, right, bottom = rows["crop"][i].tolist()
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
