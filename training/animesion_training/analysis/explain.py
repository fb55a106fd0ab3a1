"""What a network looks at, as rows of images: attention maps, crops, drops, patches that are kept or merged.

Each kind of network has a function from an image to titled panels; `sheet` lays rows out. What maps and boxes are is
left to the methods' own modules.
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
from animesion_training.data import Augment, Resize, views
from animesion_training.distributed import DistributedContext
from animesion_training.eval.evaluate import as_rgb
from animesion_training.eval.predict import decoded, files
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
        title: what it shows.
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
    """Rows for images, in the order of the paths; what cannot be read is left out.

    Args:
        weights: a file of `save_model`.
        paths: files and folders.
        context: where to compute.

    Raises:
        UsageError: a network that there is nothing to show of, a path that is not there, an unusable weight file.
    """
    model, card = load_model(weights)
    shows = _shower(model, str(weights))
    model = model.to(context.device)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{weights} takes images of {card.img_size}; only square inputs are explained")
    normalise = Augment.plain(as_rgb(card.mean), as_rgb(card.std))
    names = card.classes or tuple(str(i) for i in range(card.num_classes))
    for path in files(paths):
        pixels = np.zeros((card.img_size, card.img_size, 3), dtype=np.uint8)
        if decoded(path, pixels, Resize(card.img_size, card.crop_pct)):
            continue
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).to(context.device)
        with torch.inference_mode():
            x = normalise(image, torch.zeros(1, dtype=torch.int64, device=context.device))
            best = model(x).float().softmax(1)[0].max(0)
            panels = shows(model, pixels, x)
        name = f"{names[int(best.indices)]} {100 * float(best.values):.0f}%"
        yield Row(path, name, (Panel("image", pixels), *panels))


def _shower(model: nn.Module, what: str) -> Callable[[Any, Pixels, Tensor], list[Panel]]:
    for kind, function in _SHOWERS:
        if isinstance(model, kind):
            return function
    raise UsageError(f"{what} is {type(model).__name__}: there is nothing to show of how it comes to its answer")


# -- kinds of networks ------------------------------------------------------------------------------------------------


def _cal(model: CALClassifier, pixels: Pixels, x: Tensor) -> list[Panel]:
    """The mean map, the two strongest maps, and what crop and drop leave."""
    attention = model.forward_parts(x).attention.float()
    mean = views.mean_map(attention)
    strongest = attention.flatten(2).sum(2)[0].topk(min(2, attention.shape[1])).indices.tolist()
    panels = [Panel("mean attention", heat(pixels, mean[0, 0]))]
    panels += [Panel(f"map {i}", heat(pixels, attention[0, i])) for i in strongest]
    size = (x.shape[2], x.shape[3])
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float().to(x.device)
    panels += _boxed(pixels, views.crop_boxes(mean, size, _CROP), x)
    panels.append(Panel("drop", _pixels(views.drop(image, mean, _DROP)[0])))
    return panels


def _glsim(model: GLSim, pixels: Pixels, x: Tensor) -> list[Panel]:
    """How like the whole each patch is, the box around the most alike, and the crop of it."""
    grid = model.trace(x)[1].grid or (1, -1)
    found = model.select_crops(x)
    sign = 1 if model.metric == "cos" else -1
    return [
        Panel("similarity", heat(pixels, sign * found.similarity[0].view(grid))),
        *_boxed(pixels, found.boxes, x),
    ]


def _rams(model: RAMSTrans, pixels: Pixels, x: Tensor) -> list[Panel]:
    """Attention rolled out over all blocks, the box around its peak, and the crop of it."""
    grid = model.trace(x)[1].grid or (1, -1)
    found = model.select_crops(x)
    return [Panel("rollout", heat(pixels, found.attention[0].view(grid))), *_boxed(pixels, found.boxes, x)]


def _tokens(model: TokenVisionTransformer, pixels: Pixels, x: Tensor) -> list[Panel]:
    """What each stage of a token reduction leaves; attention rollout where the number of tokens stays the same."""
    host: Any = model.backbone
    rows, columns = host.patch_embed.dynamic_feat_size(x.shape[-2:])
    trace = {key: value[0].cpu() for key, value in (model.trace(x)[1].trace or {}).items()}
    if panels := [Panel(title, shown) for title, shown in _reduced(pixels, trace, (rows, columns), host)]:
        return panels
    with record_attention(model, average=True) as recorder:
        model(x)
        weights = recorder.pop_weights()
    if len({each.shape for each in weights}) > 1:
        raise UsageError("the blocks of this network see different tokens, and there is nothing else to show of it")
    rolled = rollout(weights)[0, 0, host.num_prefix_tokens :][: rows * columns]
    return [Panel("attention rollout", heat(pixels, rolled.view(rows, columns)))]


def _reduced(
    pixels: Pixels, trace: Mapping[str, Tensor], grid: tuple[int, int], host: Any
) -> Iterator[tuple[str, Pixels]]:
    """What the stages in a trace leave: dropped patches dark, merged ones in the mean colour of what they joined."""
    # which patches are in each token behind the class token; tokens of a cache hold none
    origin = torch.eye(grid[0] * grid[1], dtype=torch.bool)
    for key, noted in sorted(trace.items(), key=lambda entry: _stage(entry[0])):
        what = key.partition(".")[2]
        rows = noted.long()
        if what in _KEPT:
            rows = rows - host.num_prefix_tokens if what == "sample_ids" else rows
            fused = torch.zeros(int((rows < 0).any()) * (what != "sample_ids"), origin.shape[1], dtype=torch.bool)
            origin = torch.cat([_padded(origin, int(rows.max()) + 1)[rows[rows >= 0]], fused])
            shown = np.where(_spread(origin.any(0), grid, pixels)[..., None], pixels, pixels // 6)
        elif what in _JOINED:
            joined = _padded(origin, len(rows))[: len(rows)]
            merged = torch.zeros(int(rows.max()) + 1, origin.shape[1], dtype=torch.long)
            origin = merged.index_add_(0, rows.clamp_min(0), joined.long()) > 0
            shown = _meaned(pixels, origin, grid)
        else:
            continue
        yield f"after {key.partition('.')[0]}", np.asarray(shown, dtype=np.uint8)


#: What pruning methods note: rows of the tokens that stay; and merging ones: for each token the one that it joins.
_KEPT = ("kept_idx", "keep_policy", "sample_ids")
_JOINED = ("cluster_assign", "idx_cluster")


def _stage(key: str) -> int:
    return int("".join(filter(str.isdigit, key.partition(".")[0])) or -1)


def _padded(origin: Tensor, rows: int) -> Tensor:
    """Tokens of a cache, which are no patches, stand behind."""
    more = max(0, rows - len(origin))
    return torch.cat([origin, torch.zeros(more, origin.shape[1], dtype=torch.bool)])


def _spread(values: Tensor, grid: tuple[int, int], pixels: Pixels) -> npt.NDArray[Any]:
    rows = np.arange(pixels.shape[0]) * grid[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * grid[1] // pixels.shape[1]
    spread: npt.NDArray[Any] = values.view(grid).numpy()[rows][:, columns]
    return spread


def _meaned(pixels: Pixels, origin: Tensor, grid: tuple[int, int]) -> Pixels:
    owner = origin.long().argmax(0)
    regions = _spread(owner, grid, pixels)
    result = pixels.copy()
    for region in np.unique(regions):
        inside = regions == region
        result[inside] = pixels[inside].mean(0)
    return result


def _boxed(pixels: Pixels, boxes: Tensor, x: Tensor) -> list[Panel]:
    """A box drawn on the image, and what is in it."""
    y0, y1, x0, x1 = boxes[0].tolist()
    framed = Image.fromarray(pixels)
    width = max(1, pixels.shape[0] // 64)
    ImageDraw.Draw(framed).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(255, 40, 40), width=width)
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float().to(x.device)
    return [Panel("box", np.asarray(framed)), Panel("crop", _pixels(views.crop(image, boxes)[0]))]


_SHOWERS: list[tuple[type[nn.Module], Callable[[Any, Pixels, Tensor], list[Panel]]]] = [
    (CALClassifier, _cal),
    (GLSim, _glsim),
    (RAMSTrans, _rams),
    (TokenVisionTransformer, _tokens),
]


# -- drawing -----------------------------------------------------------------------------------------------------------


def heat(pixels: Pixels, values: Tensor) -> Pixels:
    """Lay a map (h, w) over an image (H, W, 3), from blue at its least to red at its greatest value."""
    from matplotlib import colormaps

    height, width = pixels.shape[:2]
    smooth = functional.interpolate(values[None, None].float(), (height, width), mode="bilinear", align_corners=True)
    scaled = smooth[0, 0] - smooth.min()
    scaled = scaled / scaled.max().clamp_min(1e-12)
    colours = colormaps["jet"](scaled.cpu().numpy())[..., :3] * 255
    return np.asarray(0.5 * pixels + 0.5 * colours, dtype=np.uint8)


def _pixels(image: Tensor) -> Pixels:
    return image.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()


def sheet(rows: Sequence[Row], side: int = 128) -> Image.Image:
    """All rows in one image, with titles above the columns and the prediction below the first panel.

    Args:
        rows: at least one.
        side: of a panel in pixels.
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
