"""Explain single predictions: the image, what the network looks at, its guesses, and the nearest training images.

`saliency`, `tokens.token_flow` and `panels` have the methods; here the one that fits a network is chosen.
`explain_page` and `sheet` arrange the results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.analysis import panels
from animesion_training.analysis.neighbours import Neighbour, Neighbours
from animesion_training.analysis.panels import Panel, Pixels, heat
from animesion_training.analysis.saliency import Recorded
from animesion_training.data import Resize
from animesion_training.distributed import DistributedContext
from animesion_training.eval.pieces import Piece
from animesion_training.eval.reading import Reading
from animesion_training.models.create import bare, input_config
from animesion_training.models.embedding import FeatureTap
from animesion_training.tokens.token_flow import rollout_map
from animesion_training.weights import WeightsCard

#: Method -> what it shows.
METHODS = {
    "selection": "what the network selects itself: attention maps of CAL, crops of GLSim and RAMS-Trans, tokens kept",
    "rollout": "attention rollout: the share of each patch in what is classified",
    "gradcam": "Grad-CAM: which places of a feature map speak for the class",
    "layercam": "LayerCAM: the same, with a weight for each place",
}

_GAP = 6
_LINE = 14


@dataclass(frozen=True)
class Explained:
    """An explained image.

    Attributes:
        name: path or key of the image.
        panels: from left to right, the image first.
        guesses: class names and probabilities, most probable first.
        target: name of the class that the map is of; empty where it is of none.
        label: name of its class, if it is known.
        neighbours: the most similar training images, most similar first.
        problem: why it cannot be read; then there is nothing else.
    """

    name: str
    panels: tuple[Panel, ...] = ()
    guesses: tuple[tuple[str, float], ...] = ()
    target: str = ""
    label: str = ""
    neighbours: tuple[Neighbour, ...] = field(default=())
    problem: str = ""


def available(model: nn.Module) -> list[str]:
    """Methods that a network has a map for, found by trying them on noise."""
    found = []
    x = _noise(model)
    for method in METHODS:
        if method == "selection":
            if panels.selects(bare(model)):
                found.append(method)
            continue
        with contextlib.suppress(UsageError):
            if method == "rollout":
                rollout_map(bare(model), x)
            elif "gradcam" not in found:  # both read the same maps
                _heard(model, x)
            found.append(method)
    return found


def _noise(model: nn.Module) -> Tensor:
    channels = getattr(bare(model), "in_chans", 3)
    noise = torch.randn(1, channels, *input_config(model).size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).device)


def _heard(model: nn.Module, x: Tensor) -> None:
    """Check that classes depend on a feature map.

    Raises:
        UsageError: the network has none, or its classifier is zero.
    """
    if Recorded(model, x).silent:
        raise UsageError(
            f"the classes of {type(bare(model)).__name__} do not depend on its feature maps: train it first"
        )


def choose(model: nn.Module, method: str = "auto") -> tuple[str, str]:
    """Return the method for a network, and a sentence that says why.

    Args:
        model: the network, in evaluation mode.
        method: one of `METHODS`; `auto` for the first of them that fits: what the network selects itself, rollout for a
            transformer that classifies a class token, and Grad-CAM for all others.

    Raises:
        UsageError: the method, or any method, does not fit the network.
    """
    name = type(bare(model)).__name__
    fits = available(model)
    if method != "auto":
        if method not in fits:
            _refuse(model, method, fits)
        return method, f"{method}: {METHODS[method]}"
    if "selection" in fits:
        return "selection", f"selection: {METHODS['selection']}"
    if "rollout" in fits and _has_class_token(model):
        return "rollout", f"rollout: {name} classifies a class token, which attends to patches"
    if "gradcam" in fits:
        return "gradcam", f"gradcam: {name} has a feature map that its classes depend on"
    if "rollout" in fits:
        return "rollout", f"rollout: {METHODS['rollout']}"
    raise UsageError(
        f"there is nothing to show for {name}: it has no feature map with a gradient, no attention over all patches, "
        "and selects no parts"
    )


def _refuse(model: nn.Module, method: str, fits: list[str]) -> None:
    """Raise the reason why a method does not fit."""
    x = _noise(model)
    others = f"; there is {', '.join(fits)}" if fits else ""
    try:
        if method == "rollout":
            rollout_map(bare(model), x)
        elif method != "selection":
            _heard(model, x)
    except UsageError as error:
        raise UsageError(f"--method {method}: {error}{others}") from None
    raise UsageError(f"--method {method}: {type(bare(model)).__name__} selects no parts or patches itself{others}")


def _has_class_token(model: nn.Module) -> bool:
    network: Any = bare(model)
    while not hasattr(network, "cls_token"):
        inner = getattr(network, "encoder", None) or getattr(network, "backbone", None)
        if not isinstance(inner, nn.Module):
            return False
        network = inner
    return network.cls_token is not None and getattr(network, "global_pool", "token") == "token"


def saliency_map(model: nn.Module, x: Tensor, targets: Tensor | int | None, method: str) -> Tensor:
    """The map of an image, (h, w), >= 0, of a method other than panels; or (B, h, w) for several images.

    Args:
        model: in evaluation mode.
        x: normalised images, (B, 3, H, W).
        targets: the class, or that of each image (B,); None for the most probable. Rollout is of no class.
        method: one of `METHODS`.

    Raises:
        UsageError: the method does not fit the network.
    """
    if isinstance(targets, int):
        targets = torch.full((len(x),), targets, dtype=torch.int64, device=x.device)
    if method == "rollout":
        maps = rollout_map(bare(model), x)
    elif method == "selection":
        with torch.inference_mode():
            found = panels.selection_map(bare(model), x)
        if found is None:
            raise UsageError(f"{type(bare(model)).__name__} selects patches, and has no map: use rollout or gradcam")
        maps = found
    else:
        recorded = Recorded(model, x, targets)
        maps = recorded.grad_cam() if method == "gradcam" else recorded.layer_cam()
    return maps[0] if len(x) == 1 else maps


class Explainer:
    """Explains images with one network.

    Args:
        model: in evaluation mode, on the device of the context.
        card: of its weights.
        context: device to compute on.
        method: as for `choose`.
        target: name of the class that maps are of; None for the most probable one.
        top: number of guesses.
        neighbours: the training images that are searched; None for none.

    Attributes:
        method: the chosen method.
        reason: the sentence that says why.

    Raises:
        UsageError: a network that cannot be explained, an unknown class, or images that are not square.
    """

    def __init__(
        self,
        model: nn.Module,
        card: WeightsCard,
        context: DistributedContext,
        *,
        method: str = "auto",
        target: str | None = None,
        top: int = 5,
        neighbours: Neighbours | None = None,
    ) -> None:
        reading = Reading.of(card, "the network")
        self.model, self.card, self.context = model, card, context
        self.size, self._normalise = reading.img_size, reading.normalise
        self.method, self.reason = choose(model, method)
        self.names = card.classes or tuple(str(i) for i in range(card.num_classes))
        if target is not None and target not in self.names:
            from animesion.config.settings import nearest

            raise UsageError(f"the network has no class '{target}'{nearest(target, self.names)}")
        self.target = None if target is None else self.names.index(target)
        self.top = min(top, card.num_classes)
        self.neighbours = neighbours

    def __call__(self, pieces: Iterable[Piece], labels: Iterable[str] | None = None) -> Iterator[Explained]:
        """Explain images in their order; those that cannot be read have a problem.

        Args:
            pieces: the images.
            labels: name of the class of each; None if they are unknown.
        """
        known = iter(labels) if labels is not None else None
        for piece in pieces:
            label = next(known) if known is not None else ""
            pixels = np.zeros((self.size, self.size, 3), dtype=np.uint8)
            if problem := piece.into(pixels, Resize(self.size, self.card.crop_pct)):
                yield Explained(piece.name, label=label, problem=problem)
                continue
            yield self.explain(piece.name, pixels, label)

    def explain(self, name: str, pixels: Pixels, label: str = "") -> Explained:
        """Explain an image (S, S, 3) of the size of the network."""
        x = self._input(pixels)
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            tap = None
            if self.neighbours is not None and self.neighbours.taps:
                tap = stack.enter_context(FeatureTap(self.model))
            logits = self.model(x).float()
            probabilities = (logits.sigmoid() if self.card.is_tagger else logits.softmax(1))[0]
        best = probabilities.topk(self.top)
        guesses = tuple((self.names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        similar: tuple[Neighbour, ...] = ()
        if self.neighbours is not None:
            similar = self.neighbours.of(self.model, x, None if tap is None else tap.take())
        target = self.target if self.target is not None else int(best.indices[0])
        drawn = self._panels(pixels, x, target)
        of = self.names[target] if self.method in ("gradcam", "layercam") else ""
        return Explained(name, (Panel("image", pixels), *drawn), guesses, of, label, similar)

    def _panels(self, pixels: Pixels, x: Tensor, target: int) -> list[Panel]:
        if self.method == "selection":
            with torch.inference_mode():
                return panels.selection(bare(self.model), pixels, x)
        titles = {"rollout": "attention rollout", "gradcam": "Grad-CAM", "layercam": "LayerCAM"}
        return [Panel(titles[self.method], heat(pixels, saliency_map(self.model, x, target, self.method)))]

    def _input(self, pixels: Pixels) -> Tensor:
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).to(self.context.device)
        return self._normalise(image, torch.zeros(1, dtype=torch.int64, device=self.context.device))


# -- one image of all rows -------------------------------------------------------------------------------------------


def sheet(rows: Sequence[Explained], side: int = 128) -> Image.Image:
    """Arrange rows in one image: panels with their titles, guesses below the first, and training images at the right.

    Args:
        rows: at least one row without a problem; others are left out.
        side: side of a panel in pixels.
    """
    rows = [row for row in rows if not row.problem]
    count = max(len(row.panels) for row in rows)
    columns = count + max(len(row.neighbours) for row in rows)
    lines = min(3, max(len(row.guesses) for row in rows))
    below = _LINE * lines
    width = _GAP + columns * (side + _GAP)
    height = _LINE + _GAP + len(rows) * (side + below + _GAP)
    result = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(result)

    def put(column: int, top: int, pixels: Pixels, texts: Sequence[str]) -> None:
        left = _GAP + column * (side + _GAP)
        image = Image.fromarray(pixels)
        image.thumbnail((side, side)) if max(image.size) > side else None
        scale = side / max(image.size)
        shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        result.paste(image.resize(shape, Image.Resampling.BICUBIC), (left, top))
        for line, text in enumerate(texts):
            # the font that Pillow has has Latin letters only; the page shows all
            ascii_ = text.encode("ascii", "replace").decode()
            draw.text((left, top + side + 1 + line * _LINE), ascii_[: side // 6], fill=(0, 0, 0))

    for column, panel in enumerate(rows[0].panels):
        draw.text((_GAP + column * (side + _GAP), 2), panel.title[: side // 6], fill=(0, 0, 0))
    if columns > count:
        draw.text((_GAP + count * (side + _GAP), 2), "nearest in training", fill=(0, 0, 0))
    for number, row in enumerate(rows):
        top = _LINE + _GAP + number * (side + below + _GAP)
        for column, panel in enumerate(row.panels):
            guesses = [f"{100 * p:.0f}% {name}" for name, p in row.guesses[:lines]]
            put(column, top, panel.pixels, guesses if not column else [row.target] if column == 1 else [])
        for i, each in enumerate(row.neighbours):
            put(count + i, top, each.pixels, [each.label, f"{each.similarity:.2f}"][:lines])
    return result
