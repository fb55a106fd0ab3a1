"""What a network looks at, as rows of pictures: attention maps, crops and drops of a CAL classifier.

Each kind of network has a function from a picture to titled panels; `sheet` lays rows out. What maps and boxes are is
left to the methods' own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from animesion_training import views
from animesion_training.data import Augment, Resize
from animesion_training.distributed import Place
from animesion_training.evaluating import three
from animesion_training.models.cal import CALClassifier
from animesion_training.predicting import decoded, files
from animesion_training.weights import load_model

Pixels = npt.NDArray[np.uint8]

_GAP = 6
_LINE = 14
#: Thresholds in the middle of the ranges that training draws from.
_CROP, _DROP = 0.5, 0.35


@dataclass(frozen=True)
class Panel:
    """One picture of a row.

    Attributes:
        title: what it shows.
        pixels: (S, S, 3).
    """

    title: str
    pixels: Pixels


@dataclass(frozen=True)
class Row:
    """All panels of one picture.

    Attributes:
        path: the picture.
        name: the most probable class and its probability.
        panels: from left to right.
    """

    path: Path
    name: str
    panels: tuple[Panel, ...]


def explain(weights: Path, paths: Sequence[Path], place: Place) -> Iterator[Row]:
    """Rows for pictures, in the order of the paths; what cannot be read is left out.

    Args:
        weights: a file of `save_model`.
        paths: files and folders.
        place: where to compute.

    Raises:
        UsageError: a network that there is nothing to show of, a path that is not there, an unusable weight file.
    """
    model, card = load_model(weights)
    shows = _shower(model, str(weights))
    model = model.to(place.device)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{weights} takes pictures of {card.img_size}; only square inputs are explained")
    normalise = Augment.plain(three(card.mean), three(card.std))
    names = card.classes or tuple(str(i) for i in range(card.num_classes))
    for path in files(paths):
        pixels = np.zeros((card.img_size, card.img_size, 3), dtype=np.uint8)
        if decoded(path, pixels, Resize(card.img_size, card.crop_pct)):
            continue
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).to(place.device)
        with torch.inference_mode():
            x = normalise(image, torch.zeros(1, dtype=torch.int64, device=place.device))
            best = model(x).float().softmax(1)[0].max(0)
            panels = shows(model, pixels, x)
        name = f"{names[int(best.indices)]} {100 * float(best.values):.0f}%"
        yield Row(path, name, (Panel("picture", pixels), *panels))


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
    picture = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float().to(x.device)
    boxes = views.crop_boxes(mean, size, _CROP)
    y0, y1, x0, x1 = boxes[0].tolist()
    framed = Image.fromarray(pixels)
    ImageDraw.Draw(framed).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(255, 40, 40), width=max(1, size[0] // 64))
    panels.append(Panel("box", np.asarray(framed)))
    panels.append(Panel("crop", _pixels(views.crop(picture, boxes)[0])))
    panels.append(Panel("drop", _pixels(views.drop(picture, mean, _DROP)[0])))
    return panels


_SHOWERS: list[tuple[type[nn.Module], Callable[[Any, Pixels, Tensor], list[Panel]]]] = [(CALClassifier, _cal)]


# -- drawing -----------------------------------------------------------------------------------------------------------


def heat(pixels: Pixels, values: Tensor) -> Pixels:
    """Lay a map (h, w) over a picture (H, W, 3), from blue at its least to red at its greatest value."""
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
    """All rows in one picture, with titles above the columns and the prediction below the first panel.

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
