"""What networks with a selection of their own select: attention maps, crops, drops, and patches kept or merged.

Each kind of network has a function from an image to titled panels, and some a single map. The modules of the methods
compute maps and boxes; `explain` chooses what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

from animesion_training.data import views
from animesion_training.models.cal import CALClassifier
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.reductions import Reduction
from animesion_training.tokens.twopass import GLSim, RAMSTrans

Pixels = npt.NDArray[np.uint8]

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


def selects(model: nn.Module) -> bool:
    """Whether a network selects parts or patches of an image itself, so that `selection` has panels for it."""
    if isinstance(model, CALClassifier | GLSim | RAMSTrans):
        return True
    plugins = model.plugins.values() if isinstance(model, TokenVisionTransformer) else ()
    return any(isinstance(plugin, Reduction) and not plugin.keeps_grid for plugin in plugins)


def selection(model: nn.Module, pixels: Pixels, x: Tensor) -> list[Panel]:
    """Draw what a network selects in an image; call it in inference mode.

    Args:
        model: a network that `selects`.
        pixels: the image, (S, S, 3).
        x: the same as the input of the network, (1, 3, S, S).
    """
    for kind, function in _PANELS:
        if isinstance(model, kind):
            return function(model, pixels, x)
    raise TypeError(type(model).__name__)


def selection_map(model: nn.Module, x: Tensor) -> Tensor | None:
    """The map (B, h, w) that a network selects parts by; None for kinds without one."""
    if isinstance(model, CALClassifier):
        return views.mean_map(model.forward_parts(x).attention.float())[:, 0]
    if isinstance(model, GLSim | RAMSTrans):
        grid = model.encoder.grid(x)
        if isinstance(model, RAMSTrans):
            return model.select_crops(x).attention.reshape(len(x), *grid)
        sign = 1 if model.metric == "cos" else -1  # distances are smallest for similar patches
        similarity = sign * model.select_crops(x).similarity
        return (similarity - similarity.amin(1, keepdim=True)).reshape(len(x), *grid)
    return None


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
    found: Any = selection_map(model, x)
    return [Panel("similarity", heat(pixels, found[0])), *_box_panels(pixels, model.select_crops(x).boxes, x)]


def _rams(model: RAMSTrans, pixels: Pixels, x: Tensor) -> list[Panel]:
    """Attention rollout over all blocks, the box around its peak, and its crop."""
    found: Any = selection_map(model, x)
    return [Panel("rollout", heat(pixels, found[0])), *_box_panels(pixels, model.select_crops(x).boxes, x)]


def _tokens(model: TokenVisionTransformer, pixels: Pixels, x: Tensor) -> list[Panel]:
    """The remaining tokens after each stage of a token reduction."""
    host: Any = model.backbone
    trace = {key: value[0].cpu() for key, value in (model.trace(x)[1].trace or {}).items()}
    return [Panel(title, drawn) for title, drawn in _reduction_panels(pixels, trace, model.grid(x), host)]


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
    smooth = functional.interpolate(values[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    scaled = smooth[0, 0] - smooth.min()  # (H, W), then to 0..1
    scaled = scaled / scaled.max().clamp_min(1e-12)
    colours = colormaps["jet"](scaled.cpu().numpy())[..., :3] * 255
    return np.asarray(0.5 * pixels + 0.5 * colours, dtype=np.uint8)


def _pixels(image: Tensor) -> Pixels:
    return image.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()
