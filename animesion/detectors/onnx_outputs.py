"""Boxes in the outputs of detection networks in ONNX form: which exporter wrote them, and what their columns mean.

An output is recognised by its shape, its element type, its name and the number of class names in the file. What could
be read in two ways is refused, because a wrong reading gives boxes that look like boxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from animesion.errors import UsageError

Array = NDArray[np.floating[Any]]

Layout = Literal["auto", "yolov5", "yolov8", "boxes", "yolov7", "rtdetr", "queries"]
Coordinates = Literal["auto", "pixels", "relative"]
Activation = Literal["auto", "none", "sigmoid", "softmax"]

_PYRAMIDS = ((8, 16, 32), (8, 16, 32, 64), (16, 32), (4, 8, 16, 32))
"""Strides of the feature pyramids of known networks, in input pixels."""

_MASKS = 32
"""Columns of mask coefficients after the classes, in networks that segment."""

_LARGEST_SHARE = 1.5
"""Relative coordinates stay below this; coordinates in pixels exceed it wherever there is a box worth the name."""

_ENOUGH = 20
"""So many different boxes with small coordinates are relative."""

_SPREAD = 4
"""Rows of all cells reach over the input; where all are within this fraction of a side, they are no pixels."""


@dataclass(frozen=True)
class Reading:
    """How to read outputs; each `auto` is decided by the outputs.

    Attributes:
        layout: see `docs/detectors.md`.
        coordinates: whether boxes are in pixels of the network's input or relative to it, 0 to 1.
        activation: what turns the network's class values into scores.
        classes: number of class names in the file; 0 if it has none.
        scale: boxes are in units of `1 / scale` of the input, which the network was given as its size; 0 if it was not.
        score: least score of a box that is used; worse rows may hold anything.
    """

    layout: Layout = "auto"
    coordinates: Coordinates = "auto"
    activation: Activation = "auto"
    classes: int = 0
    scale: int = 0
    score: float = 0.25


@dataclass(frozen=True)
class Found:
    """Boxes of one image.

    Attributes:
        corners: left, top, right, bottom in pixels of the network's input, shape (N, 4); may not be finite.
        scores: 0 to 1, shape (N,).
        classes: class ids, shape (N,).
        suppressed: whether boxes that overlap a better one are already dropped.
    """

    corners: Array
    scores: Array
    classes: NDArray[np.int64]
    suppressed: bool


def read(outputs: Mapping[str, Any], width: int, height: int, reading: Reading) -> Found:
    """Read the boxes of one image.

    Args:
        outputs: array by name, in the order of the file, of a batch of one image.
        width: of the network's input in pixels.
        height: of the network's input in pixels.
        reading: how to read.

    Raises:
        UsageError: the outputs are none that is known, or their values contradict the layout; without the file's name.
    """
    arrays = {name: value for name, value in outputs.items() if isinstance(value, np.ndarray)}
    layout, chosen = _recognise(arrays, width, height, reading)
    with np.errstate(over="ignore", invalid="ignore"):
        if layout in ("rtdetr", "queries"):
            corners, scores, classes = _of_parts(layout, chosen, reading)
        else:
            corners, scores, classes = _of_rows(layout, chosen["rows"], reading)
        scores = np.nan_to_num(scores, nan=0.0)
        if len(scores) and (scores.min() < -0.01 or scores.max() > 1.01):
            raise UsageError(
                f"returns scores from {scores.min():.3g} to {scores.max():.3g} instead of 0 to 1, read as layout "
                f"'{layout}': set the option 'layout' if that is wrong, or 'activation' if they are no scores yet"
            )
        raw = layout in ("yolov5", "yolov8", "queries")
        corners = _in_pixels(corners, scores, width, height, reading, raw=raw)
        _check_sides(corners, scores, layout, reading)
    return Found(corners, scores.clip(0, 1), classes, layout in ("boxes", "yolov7", "rtdetr"))


def shapes(outputs: Mapping[str, Any]) -> str:
    """Names and shapes of outputs, for messages."""
    named = [f"{name[:60]} {tuple(getattr(value, 'shape', ()))}" for name, value in list(outputs.items())[:6]]
    return ", ".join(named) or "nothing"


def _recognise(
    outputs: Mapping[str, NDArray[Any]], width: int, height: int, reading: Reading
) -> tuple[str, dict[str, NDArray[Any]]]:
    """The layout, and the arrays that it needs by their meaning: `rows`, or `boxes`, `scores` and `labels`."""
    wanted = reading.layout
    # feature maps and masks beside the boxes
    flat = {name: value for name, value in outputs.items() if value.ndim <= 3}
    parts = _parts(flat)
    if parts and wanted in ("auto", "rtdetr", "queries"):
        layout = "rtdetr" if "labels" in parts else "queries"
        if wanted in ("auto", layout):
            return layout, parts
    if wanted not in ("rtdetr", "queries"):
        tables = [value for value in flat.values() if value.ndim >= 2 and np.issubdtype(value.dtype, np.floating)]
        if len(tables) == 1 or (tables and wanted != "auto"):
            table = tables[0]
            if table.ndim == 2 or table.shape[0] == 1:
                layout = _row_layout(table.shape, width, height, reading)
                if layout:
                    rows = table.reshape(table.shape[-2:]).astype(np.float32)
                    return layout, {"rows": _columns_last(rows, layout, width, height, reading)}
    has = f" and has {reading.classes} class names" if reading.classes else " and has no class names"
    asked = "set the option 'layout'" if wanted == "auto" else f"the option 'layout' is '{wanted}'"
    raise UsageError(
        f"returns {shapes(outputs)}{has}, which are not recognised: {asked}; layouts are yolov8 (1, 4+C, N) or "
        "(1, N, 4+C), yolov5 (1, N, 5+C), boxes (N, 6) or (1, N, 6), yolov7 (N, 7), rtdetr (labels, boxes, scores), "
        "queries (logits, pred_boxes)"
    )


def _parts(outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Boxes, scores and labels (or class values alone) where they are outputs of their own; empty if they are not."""
    boxes = [name for name, value in outputs.items() if value.ndim >= 2 and value.shape[-1] == 4]
    boxes = [name for name in boxes if np.issubdtype(outputs[name].dtype, np.floating)]
    boxes = [name for name in boxes if "box" in name.lower()] or boxes
    if len(boxes) != 1 or len(outputs) < 2:
        return {}
    [name] = boxes
    table = outputs[name]
    if table.ndim == 3 and table.shape[0] != 1:
        return {}
    rows = table.shape[-2]
    lists, values = {}, []
    for other, value in outputs.items():
        if other == name:
            continue
        if value.ndim == 3 and value.shape[:2] == (1, rows) and np.issubdtype(value.dtype, np.floating):
            values.append(value)
        elif value.ndim == table.ndim - 1 and value.shape[-1] == rows and value.size == rows:
            lists[other] = value
    found = {"boxes": table.reshape(rows, 4).astype(np.float32)}
    counted = [value for other, value in outputs.items() if value.size == 1 and "num" in other.lower()]
    lists = {other: value for other, value in lists.items() if "num" not in other.lower()}
    scores = [v for o, v in lists.items() if "score" in o.lower() or "conf" in o.lower()]
    labels = [v for o, v in lists.items() if "label" in o.lower() or "class" in o.lower()]
    if not (len(scores) == len(labels) == 1) and len(lists) == 2:
        scores = [v for v in lists.values() if np.issubdtype(v.dtype, np.floating)]
        labels = [v for v in lists.values() if np.issubdtype(v.dtype, np.integer)]
    if len(scores) == len(labels) == 1 and np.issubdtype(scores[0].dtype, np.floating):
        count = rows if not counted else min(rows, max(0, int(counted[0].reshape(-1)[0])))
        found |= {"scores": scores[0].reshape(rows).astype(np.float32), "labels": labels[0].reshape(rows)}
        return {meaning: value[:count] for meaning, value in found.items()}
    # `pred_boxes` is DETR's own name: centre and size, relative
    if len(values) == 1 and not lists and name == "pred_boxes":
        return {**found, "scores": values[0].reshape(rows, -1).astype(np.float32)}
    return {}


def _row_layout(shape: tuple[int, ...], width: int, height: int, reading: Reading) -> str:
    """The layout of one table (N, columns), (columns, N) or (1, ...) of them; empty if it is not certain.

    The number of rows tells most: YOLOv8 has one per cell of its feature pyramid, YOLOv5 three (anchors).
    """
    rows, columns = shape[-2:]
    batched, known, least = len(shape) == 3, reading.classes, 4 + (reading.classes or 1)
    if reading.layout != "auto":
        fits = {
            "boxes": columns == 6,
            "yolov7": columns == 7,
            "yolov5": batched and columns > least,
            "yolov8": batched and max(rows, columns) >= least and min(rows, columns) >= 5,
        }
        return reading.layout if fits[reading.layout] else ""
    if not batched:
        return {6: "boxes", 7: "yolov7"}.get(columns, "")
    cells = _cells(width, height)
    if columns in cells:
        return "yolov8" if rows >= least else ""
    if rows % 3 == 0 and rows // 3 in cells:
        return "yolov5" if columns > least else ""
    if columns == 6 and rows not in cells:
        return "boxes"
    if not known:
        return ""
    # Not a grid that is known, or one row per cell or query: only the number of classes tells whether there is
    # objectness (YOLOX) or not (RT-DETR of Ultralytics, YOLOv8 turned).
    if rows in cells or rows > columns:
        return "yolov8" if _has(known, columns, 4) else "yolov5" if _has(known, columns, 5) else ""
    return "yolov8" if _has(known, rows, 4) else ""


def _has(known: int, columns: int, first: int) -> bool:
    """Whether columns are `first` numbers, the known classes, and the mask's or nothing."""
    return columns - known - first in (0, _MASKS)


def _columns_last(rows: Array, layout: str, width: int, height: int, reading: Reading) -> Array:
    """The table with one row per box: YOLOv8 writes one column per box, and some exporters turn it."""
    if layout != "yolov8":
        return rows
    cells, (first, second) = _cells(width, height), rows.shape
    turned = [_has(reading.classes, side, 4) for side in (first, second)]
    if not reading.classes or turned[0] == turned[1]:
        turned = [second in cells or (first not in cells and second > first)]
    return rows.T if turned[0] else rows


def _cells(width: int, height: int) -> set[int]:
    """Number of cells of the known feature pyramids on an input."""
    return {sum(-(-width // stride) * -(-height // stride) for stride in strides) for strides in _PYRAMIDS}


def _of_rows(layout: str, rows: Array, reading: Reading) -> tuple[Array, Array, NDArray[np.int64]]:
    """Corners in the network's own units, scores and classes of a table with one row per box."""
    if layout == "boxes":
        return rows[:, :4], rows[:, 4], _ids(rows[:, 5], rows[:, 4], layout, reading)
    if layout == "yolov7":
        used = rows[:, 6] >= reading.score
        if (rows[used, 0] != 0).any():
            raise UsageError("returns boxes of several images for one: export it for a batch of one image")
        return rows[:, 1:5], rows[:, 6], _ids(rows[:, 5], rows[:, 6], layout, reading)
    first = 4 if layout == "yolov8" else 5
    # columns after the classes are masks or key points
    scores, classes = _best(rows[:, first : first + reading.classes if reading.classes else None], layout, reading)
    if layout == "yolov5":
        scores = scores * rows[:, 4]
    return _centred(rows[:, :4]), scores, classes


def _of_parts(
    layout: str, parts: Mapping[str, NDArray[Any]], reading: Reading
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Corners in the network's own units, scores and classes of outputs of their own."""
    if layout == "queries":
        scores, classes = _best(parts["scores"], layout, reading)
        return _centred(parts["boxes"]), scores, classes
    return parts["boxes"], parts["scores"], _ids(parts["labels"], parts["scores"], layout, reading)


def _best(values: Array, layout: str, reading: Reading) -> tuple[Array, NDArray[np.int64]]:
    """Score and id of each row's best class, from class values of shape (N, C)."""
    if not values.size:
        return np.zeros(len(values), np.float32), np.zeros(len(values), np.int64)
    outside = bool((np.nan_to_num(values, nan=0.0) < -0.01).any() or (np.nan_to_num(values, nan=0.0) > 1.01).any())
    if reading.activation == "softmax":
        shifted = np.exp(values - values.max(1, keepdims=True))
        values = (shifted / shifted.sum(1, keepdims=True))[:, :-1]  # the last class is no object
        if not values.size:
            raise UsageError("returns one class value per box, of which softmax leaves none: activation is 'sigmoid'")
    elif reading.activation == "sigmoid":
        values = 1 / (1 + np.exp(-values.clip(-60, 60)))
    elif outside and reading.activation == "auto" and layout == "queries":
        raise UsageError(
            f"returns class values from {np.nanmin(values):.3g} to {np.nanmax(values):.3g} instead of 0 to 1: "
            "set the option 'activation' to sigmoid (RT-DETR, D-FINE) or softmax (DETR), or 'layout' if it is wrong"
        )
    classes = values.argmax(1).astype(np.int64)
    return np.take_along_axis(values, classes[:, None], 1)[:, 0], classes


def _ids(values: NDArray[Any], scores: Array, layout: str, reading: Reading) -> NDArray[np.int64]:
    """Class ids from a column; a column of something else is refused."""
    # Also where the score is low: a column of scores has whole numbers there only by chance. -1 fills unused rows.
    all_values = np.asarray(values, np.float64)
    wrong = (all_values != np.round(all_values)) | (all_values < -1)
    wrong |= (scores >= reading.score) & ((all_values < 0) | (all_values >= (reading.classes or np.inf)))
    if wrong.any():
        shown = ", ".join(f"{value:.3g}" for value in all_values[wrong][:3])
        raise UsageError(
            f"returns {shown} where layout '{layout}' has class ids"
            f"{f' below {reading.classes}' if reading.classes else ''}: set the option 'layout'"
        )
    return all_values.clip(-1, 2**31).astype(np.int64)


def _centred(rows: Array) -> Array:
    """Corners of rows of centre x, centre y, width, height."""
    half = rows[:, 2:4] / 2
    return np.concatenate([rows[:, :2] - half, rows[:, :2] + half], 1)


def _in_pixels(corners: Array, scores: Array, width: int, height: int, reading: Reading, *, raw: bool) -> Array:
    """Corners in pixels of the network's input.

    Args:
        corners: in the network's own units.
        scores: of each box.
        width: of the input in pixels.
        height: of the input in pixels.
        reading: how to read.
        raw: whether every cell or query has a row, however unlikely: then all rows tell the unit.
    """
    sides = np.array([width, height] * 2, np.float32)
    if reading.scale:
        return corners * (sides / reading.scale)
    if reading.coordinates != "auto":
        return corners * sides if reading.coordinates == "relative" else corners
    finite = np.isfinite(corners).all(1)
    used = corners[finite & (raw | (scores >= reading.score))]
    if not len(used):
        return corners
    far = float(np.abs(used).max())
    if far > _LARGEST_SHARE and not (raw and far < min(width, height) / _SPREAD):
        return corners
    # one box near the corner of the image may look relative; that many different ones do not
    distinct = np.unique(corners[finite & (corners != 0).any(1)], axis=0)
    if far <= _LARGEST_SHARE and len(distinct) >= _ENOUGH and np.abs(distinct).max() <= _LARGEST_SHARE:
        return corners * sides
    raise UsageError(
        f"returns boxes whose largest coordinate is {far:.3g} for an input of {width}x{height} px: set the option "
        "'coordinates' to pixels or relative, or export the network with its boxes decoded"
    )


def _check_sides(corners: Array, scores: Array, layout: str, reading: Reading) -> None:
    """Refuse boxes that end before they start: columns in another order, or a network cut off before its decoder."""
    used = corners[(scores >= reading.score) & np.isfinite(corners).all(1)]
    if (used[:, 2:] < used[:, :2] - 1).any():
        raise UsageError(
            f"returns boxes whose right or bottom is before their left or top, read as layout '{layout}': "
            "set the option 'layout', or export the network with its boxes decoded"
        )
