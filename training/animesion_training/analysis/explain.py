"""Visualise what a network attends to: attention maps, crops, drops, and patches that are kept or merged.

Each kind of network has a function from an image to titled panels; `sheet` arranges them in rows. The modules of the
methods compute maps and boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion.images import files as image_files
from animesion_training.data import Augment, Resize, views
from animesion_training.distributed import DistributedContext
from animesion_training.eval.evaluate import as_rgb
from animesion_training.eval.pieces import decode_file
from animesion_training.models.cal import CALClassifier
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.rollout import record_attention, rollout
from animesion_training.tokens.twopass import GLSim, RAMSTrans
from animesion_training.weights import load_model

Pixels = npt.NDArray[np.uint8]

_GAP = 6
_LINE = 14
#: Thresholds in the middle of the ranges that training draws from.
_CROP, _DROP = 0.5, 0.35


@dataclass(frozen=True)
class Panel:
    """One image of a row.

    Attributes:
        title: title above it.
        pixels: (S, S, 3).
    """

    title: str
    pixels: Pixels


@dataclass(frozen=True)
class Row:
    """All panels of one image.

    Attributes:
        path: the image.
        name: the most probable class and its probability.
        panels: from left to right.
    """

    path: Path
    name: str
    panels: tuple[Panel, ...]


def explain(weights: Path, paths: Sequence[Path], context: DistributedContext) -> Iterator[Row]:
    """Yield a row per image, in the order of the paths, without unreadable images.

    Args:
        weights: a file written by `save_model`.
        paths: image files and folders.
        context: device to compute on.

    Raises:
        UsageError: a kind of network without a visualisation, a path that does not exist, or an unusable weights file.
    """
    model, card = load_model(weights)
    draw_panels = _panels_of(model, str(weights))
    model = model.to(context.device)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{weights} takes images of {card.img_size}: only square inputs are supported")
    normalise = Augment.plain(as_rgb(card.mean), as_rgb(card.std))
    names = card.classes or tuple(str(i) for i in range(card.num_classes))
    for path in image_files.files(paths):
        pixels = np.zeros((card.img_size, card.img_size, 3), dtype=np.uint8)
        if decode_file(path, pixels, Resize(card.img_size, card.crop_pct)):
            continue
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).to(context.device)
        with torch.inference_mode():
            x = normalise(image, torch.zeros(1, dtype=torch.int64, device=context.device))
            logits = model(x).float()
            best = (logits.sigmoid() if card.is_tagger else logits.softmax(1))[0].max(0)
            panels = draw_panels(model, pixels, x)
        name = f"{names[int(best.indices)]} {100 * float(best.values):.0f}%"
        yield Row(path, name, (Panel("image", pixels), *panels))


def _panels_of(model: nn.Module, weights: str) -> Callable[[Any, Pixels, Tensor], list[Panel]]:
    for kind, function in _PANELS:
        if isinstance(model, kind):
            return function
    raise UsageError(
        f"{weights} is a {type(model).__name__}: there is nothing to show for it, choose a model with attention"
    )


# -- kinds of networks ------------------------------------------------------------------------------------------------


def _cal(model: CALClassifier, pixels: Pixels, x: Tensor) -> list[Panel]:
    """The mean map, the two strongest maps, the crop and the drop."""
    attention = model.forward_parts(x).attention.float()
    mean = views.mean_map(attention)
    strongest = attention.flatten(2).sum(2)[0].topk(min(2, attention.shape[1])).indices.tolist()
    panels = [Panel("mean attention", heat(pixels, mean[0, 0]))]
    panels += [Panel(f"map {i}", heat(pixels, attention[0, i])) for i in strongest]
    size = (x.shape[2], x.shape[3])
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float().to(x.device)
    panels += _box_panels(pixels, views.crop_boxes(mean, size, _CROP), x)
    panels.append(Panel("drop", _pixels(views.drop(image, mean, _DROP)[0])))
    return panels


def _glsim(model: GLSim, pixels: Pixels, x: Tensor) -> list[Panel]:
    """Similarity of each patch to the whole image, the box around the most similar patches, and its crop."""
    grid = model.trace(x)[1].grid or (1, -1)
    selection = model.select_crops(x)
    sign = 1 if model.metric == "cos" else -1  # distances are smallest for similar patches
    return [
        Panel("similarity", heat(pixels, sign * selection.similarity[0].view(grid))),
        *_box_panels(pixels, selection.boxes, x),
    ]


def _rams(model: RAMSTrans, pixels: Pixels, x: Tensor) -> list[Panel]:
    """Attention rollout over all blocks, the box around its peak, and its crop."""
    grid = model.trace(x)[1].grid or (1, -1)
    selection = model.select_crops(x)
    return [Panel("rollout", heat(pixels, selection.attention[0].view(grid))), *_box_panels(pixels, selection.boxes, x)]


def _tokens(model: TokenVisionTransformer, pixels: Pixels, x: Tensor) -> list[Panel]:
    """The remaining tokens after each stage of a token reduction; attention rollout without a reduction."""
    host: Any = model.backbone
    rows, columns = host.patch_embed.dynamic_feat_size(x.shape[-2:])
    trace = {key: value[0].cpu() for key, value in (model.trace(x)[1].trace or {}).items()}
    if panels := [Panel(title, drawn) for title, drawn in _reduction_panels(pixels, trace, (rows, columns), host)]:
        return panels
    with record_attention(model, average=True) as recorder:
        model(x)
        weights = recorder.pop_weights()
    if len({each.shape for each in weights}) > 1:
        raise UsageError("there is nothing to show for this network: its blocks have different numbers of tokens")
    rolled = rollout(weights)[0, 0, host.num_prefix_tokens :][: rows * columns]
    return [Panel("attention rollout", heat(pixels, rolled.view(rows, columns)))]


def _reduction_panels(
    pixels: Pixels, trace: Mapping[str, Tensor], grid: tuple[int, int], host: Any
) -> Iterator[tuple[str, Pixels]]:
    """Yield the patches after each stage: dropped ones dark, merged ones in the mean colour of their group."""
    # (T, P): which patches are in each of T tokens behind the class token; tokens of a cache contain none
    origin = torch.eye(grid[0] * grid[1], dtype=torch.bool)
    for key, recorded in sorted(trace.items(), key=lambda entry: _stage(entry[0])):
        kind = key.partition(".")[2]
        rows = recorded.long()
        if kind in _KEPT:
            rows = rows - host.num_prefix_tokens if kind == "sample_ids" else rows
            # methods that fuse the dropped tokens append one token, which is drawn as containing no patch
            fused = torch.zeros(int((rows < 0).any()) * (kind != "sample_ids"), origin.shape[1], dtype=torch.bool)
            # rows of -1 are the fused token; the others select the tokens that stay
            origin = torch.cat([_pad(origin, int(rows.max()) + 1)[rows[rows >= 0]], fused])
            drawn = np.where(_upsample(origin.any(0), grid, pixels)[..., None], pixels, pixels // 6)
        elif kind in _JOINED:
            joined = _pad(origin, len(rows))[: len(rows)]
            # a merged token contains the patches of all tokens that it joins
            merged = torch.zeros(int(rows.max()) + 1, origin.shape[1], dtype=torch.long)
            origin = merged.index_add_(0, rows.clamp_min(0), joined.long()) > 0
            drawn = _mean_colours(pixels, origin, grid)
        else:
            continue
        yield f"after {key.partition('.')[0]}", np.asarray(drawn, dtype=np.uint8)


#: Names in a trace: pruning methods record the rows of kept tokens, merging methods the target of each token.
_KEPT = ("kept_idx", "keep_policy", "sample_ids")
_JOINED = ("cluster_assign", "idx_cluster")


def _stage(key: str) -> int:
    return int("".join(filter(str.isdigit, key.partition(".")[0])) or -1)


def _pad(origin: Tensor, rows: int) -> Tensor:
    """Append empty rows, up to `rows`, for tokens of a cache, which contain no patches."""
    missing = max(0, rows - len(origin))
    return torch.cat([origin, torch.zeros(missing, origin.shape[1], dtype=torch.bool)])


def _upsample(values: Tensor, grid: tuple[int, int], pixels: Pixels) -> npt.NDArray[Any]:
    rows = np.arange(pixels.shape[0]) * grid[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * grid[1] // pixels.shape[1]
    upsampled: npt.NDArray[Any] = values.view(grid).numpy()[rows][:, columns]
    return upsampled


def _mean_colours(pixels: Pixels, origin: Tensor, grid: tuple[int, int]) -> Pixels:
    owner = origin.long().argmax(0)  # (P,): the token of each patch
    regions = _upsample(owner, grid, pixels)
    result = pixels.copy()
    for region in np.unique(regions):
        inside = regions == region
        result[inside] = pixels[inside].mean(0)
    return result


def _box_panels(pixels: Pixels, boxes: Tensor, x: Tensor) -> list[Panel]:
    """The box drawn on the image, and its crop."""
    y0, y1, x0, x1 = boxes[0].tolist()
    framed = Image.fromarray(pixels)
    width = max(1, pixels.shape[0] // 64)
    ImageDraw.Draw(framed).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(255, 40, 40), width=width)
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float().to(x.device)
    return [Panel("box", np.asarray(framed)), Panel("crop", _pixels(views.crop(image, boxes)[0]))]


_PANELS: list[tuple[type[nn.Module], Callable[[Any, Pixels, Tensor], list[Panel]]]] = [
    (CALClassifier, _cal),
    (GLSim, _glsim),
    (RAMSTrans, _rams),
    (TokenVisionTransformer, _tokens),
]


# -- drawing -----------------------------------------------------------------------------------------------------------


def heat(pixels: Pixels, values: Tensor) -> Pixels:
    """Overlay a map (h, w) on an image (H, W, 3), from blue at its minimum to red at its maximum."""
    from matplotlib import colormaps

    height, width = pixels.shape[:2]
    smooth = functional.interpolate(values[None, None].float(), (height, width), mode="bilinear", align_corners=True)
    scaled = smooth[0, 0] - smooth.min()  # (H, W), then to 0..1
    scaled = scaled / scaled.max().clamp_min(1e-12)
    colours = colormaps["jet"](scaled.cpu().numpy())[..., :3] * 255
    return np.asarray(0.5 * pixels + 0.5 * colours, dtype=np.uint8)


def _pixels(image: Tensor) -> Pixels:
    return image.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()


def sheet(rows: Sequence[Row], side: int = 128) -> Image.Image:
    """Arrange rows in one image, with titles above the columns and the prediction below the first panel.

    Args:
        rows: at least one row.
        side: side of a panel in pixels.
    """
    columns = max(len(row.panels) for row in rows)
    width = _GAP + columns * (side + _GAP)
    height = _LINE + _GAP + len(rows) * (side + _LINE + _GAP)
    result = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(result)
    for column, panel in enumerate(rows[0].panels):
        draw.text((_GAP + column * (side + _GAP), 2), panel.title, fill=(0, 0, 0))
    for number, row in enumerate(rows):
        top = _LINE + _GAP + number * (side + _LINE + _GAP)
        for column, panel in enumerate(row.panels):
            image = Image.fromarray(panel.pixels).resize((side, side), Image.Resampling.BICUBIC)
            result.paste(image, (_GAP + column * (side + _GAP), top))
        text = row.name.encode("ascii", "replace").decode()
        draw.text((_GAP, top + side + 1), text[: columns * side // 6], fill=(0, 0, 0))
    return result
