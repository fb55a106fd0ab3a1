"""Boxes by a trained network in ONNX form, of the YOLO or DETR family, run by onnxruntime.

Users bring the file (faces, heads, leaves). This module prepares the image and runs the network;
`animesion.detectors.onnx_outputs` reads the boxes from what it returns.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from animesion import model_files
from animesion.config.settings import Section
from animesion.detectors import onnx_outputs
from animesion.errors import AnimesionError, UsageError
from animesion.schemas import Box

_GREY = (114, 114, 114)
"""Fill colour of YOLO's own letterbox."""

_MOST_CANDIDATES, _MOST_BOXES = 30_000, 300
"""Most boxes before and after suppression; YOLO's own limits."""

_MOST_PIXELS = 4096 * 4096
"""Most pixels of the network's input."""

_LONGEST_METADATA = 1 << 20

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}

_SIZE_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}

_SIZES = "orig_target_sizes"
"""Input of RT-DETR and D-FINE for the size of the original image, in which they give boxes."""

_SCALE = 10_000
"""Side of the square that such a network is given instead, so that it does not matter whether the width comes first."""

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, for values from 0 to 1."""

Array = NDArray[np.floating[Any]]


class OnnxOptions(Section):
    """Options of the detector `onnx`."""

    file: str = Field("", description="the network; empty for the one from `animesion detectors install onnx`")
    classes: list[int | str] = Field([], description="ids or names of the classes to keep; empty for all")
    score: float = Field(0.25, ge=0, le=1, strict=False, description="least score of a box")
    iou: float = Field(
        0.45, ge=0, le=1, strict=False, description="boxes that overlap a better one by more are dropped"
    )
    size: int = Field(
        640, ge=32, le=4096, description="longest side of the network's input in pixels, if the file leaves it open"
    )
    layout: onnx_outputs.Layout = Field(
        "auto", description="what the outputs are, by default recognised: `yolov5`, `yolov8`, `boxes`, ..."
    )
    coordinates: onnx_outputs.Coordinates = Field(
        "auto", description="unit of the boxes: `pixels` of the network's input, or `relative` to it"
    )
    activation: onnx_outputs.Activation = Field(
        "auto", description="what turns class values into scores, if the network does not: `sigmoid` or `softmax`"
    )
    axes: Literal["auto", "nchw", "nhwc"] = Field("auto", description="order of the axes of the input")
    values: Literal["auto", "0-1", "0-255", "imagenet"] = Field(
        "auto",
        description="values of the input: by default 0-1 for floats and 0-255 for bytes; `imagenet` subtracts its mean",
    )
    channels: Literal["rgb", "bgr"] = Field("rgb", description="order of the colours of the input")
    resize: Literal["auto", "letterbox", "stretch"] = Field(
        "auto", description="keep the aspect ratio and pad, or stretch as the DETR family does"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the network runs")


@dataclass(frozen=True)
class _Frame:
    """Size of the network's input, and position and size of the image in it; all in pixels."""

    width: int
    height: int
    left: int
    top: int
    inner_width: int
    inner_height: int


class OnnxDetector:
    """A network of the YOLO or DETR family.

    The score of a box is its class score, times objectness if the network has it. Non-maximum suppression ignores
    classes, as a crop is one sample whatever the class of its box.
    """

    summary = "a YOLO or DETR network of your own in ONNX form (onnxruntime)"
    Options = OnnxOptions

    def __init__(self, options: OnnxOptions | None = None) -> None:
        self._options = options = options or OnnxOptions()
        self._path = self.file(options)
        self._session = model_files.onnx_session(self._path, "the detector 'onnx'", options.device)
        image, sizes = self._inputs()
        self._input: str = image.name
        self._type = _TYPES[image.type]
        if self._type is np.uint8 and options.values not in ("auto", "0-255"):
            raise self._refusal(f"takes bytes, which have no values of the option 'values' ({options.values})")
        self._nhwc = self._is_nhwc(image.shape)
        sides = image.shape[1:3] if self._nhwc else image.shape[2:]
        self._height, self._width = (side if isinstance(side, int) and side > 0 else 0 for side in sides)
        if (self._height or options.size) * (self._width or options.size) > _MOST_PIXELS:
            raise self._refusal(f"takes images of {self._width}x{self._height} px, which is too large")
        self._constant = {} if sizes is None else {sizes.name: np.full((1, 2), _SCALE, _SIZE_TYPES[sizes.type])}
        outputs = {output.name for output in self._session.get_outputs()}
        detr = sizes is not None or {"labels", "boxes", "scores"} <= outputs or {"logits", "pred_boxes"} <= outputs
        self._stretch = options.resize == "stretch" or (options.resize == "auto" and detr)
        metadata = self._session.get_modelmeta().custom_metadata_map
        if metadata.get("task") == "obb":
            raise self._refusal("returns rotated boxes (task 'obb'), of which crops cannot be cut: export another one")
        stride = _literal(metadata.get("stride", ""))
        self._stride = stride if isinstance(stride, int) and 1 <= stride <= 256 else 32
        self._names = _names(_literal(metadata.get("names", "")))
        self._wanted = frozenset(map(self._class_id, options.classes))  # empty: every class
        self._reading = onnx_outputs.Reading(
            options.layout,
            options.coordinates,
            options.activation,
            len(self._names),
            0 if sizes is None else _SCALE,
            options.score,
        )

    def _inputs(self) -> tuple[Any, Any]:
        """The input for the image, and the one for its size, None if there is none."""
        inputs = self._session.get_inputs()
        images = [each for each in inputs if len(each.shape) == 4]
        sizes = [each for each in inputs if len(each.shape) == 2 and each.type in _SIZE_TYPES and each.name == _SIZES]
        if len(images) != 1 or len(inputs) != 1 + len(sizes):
            raise self._refusal(
                f"takes {self._described(inputs)}; supported are one image of shape (1, 3, height, width) or "
                f"(1, height, width, 3), and '{_SIZES}' of shape (1, 2) beside it: export it without others"
            )
        [image] = images
        if image.type not in _TYPES:
            raise self._refusal(f"takes {self._described(inputs)}, not floats or bytes: export it in float32 or uint8")
        for each in (image, *sizes):
            if isinstance(each.shape[0], int) and each.shape[0] > 1:
                raise self._refusal(
                    f"takes batches of {each.shape[0]} images: export it with batch size 1 or an open one"
                )
        return image, sizes[0] if sizes else None

    def _is_nhwc(self, shape: Sequence[object]) -> bool:
        """Whether the input has its channels last."""
        first, last = (shape[at] == 3 or not isinstance(shape[at], int) for at in (1, 3))
        if self._options.axes != "auto":
            fits = last if self._options.axes == "nhwc" else first
            if fits:
                return self._options.axes == "nhwc"
        elif shape[1] == 3 and shape[3] == 3:
            raise self._refusal(f"takes an input of shape {_shape(shape)}: set the option 'axes' to nchw or nhwc")
        elif shape[1] == 3 or shape[3] == 3:
            return shape[3] == 3
        elif first and last:  # a convolution fails on the wrong number of channels, so this is no guess
            return False
        raise self._refusal(
            f"takes an input of shape {_shape(shape)}, which has not three channels where the option 'axes' "
            f"({self._options.axes}) has them"
        )

    def _described(self, inputs: Sequence[Any]) -> str:
        return ", ".join(f"{each.name[:60]} {_shape(each.shape)} of {each.type}" for each in inputs[:6]) or "nothing"

    @classmethod
    def file(cls, options: OnnxOptions | None = None) -> Path:
        """Path of the network.

        Raises:
            UsageError: there is no such file.
        """
        if options is None or not options.file:
            return model_files.path_of("onnx")
        path = Path(options.file).expanduser()
        if not path.is_file():
            raise UsageError(f"file not found: {path}; the option 'file' of the detector 'onnx' takes a network's path")
        return path

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Boxes of each image, by descending score.

        Raises:
            AnimesionError: the network fails, or its output has an unknown layout.
        """
        return [self._boxes(image) for image in images]

    def _boxes(self, image: Image.Image) -> list[Box]:
        frame = self._frame(*image.size)
        given = {self._input: self._prepared(image, frame), **self._constant}
        try:
            values = self._session.run(None, given)
        except Exception as error:  # onnxruntime's own classes, which differ by version
            raise AnimesionError(f"{self._path} fails on an image: {model_files.first_line(error)}") from None
        outputs = {output.name: value for output, value in zip(self._session.get_outputs(), values, strict=True)}
        try:
            found = onnx_outputs.read(outputs, frame.width, frame.height, self._reading)
        except UsageError as error:
            raise UsageError(f"{self._path} {error}") from None
        corners, scores = found.corners, found.scores
        good = np.isfinite(corners).all(1) & (scores >= self._options.score)
        if self._wanted:
            good &= np.isin(found.classes, list(self._wanted))
        corners, scores = corners[good].astype(np.float64), scores[good]
        order = np.argsort(-scores, kind="stable")[:_MOST_CANDIDATES]
        corners, scores = corners[order], scores[order]
        if not found.suppressed:
            kept = suppress(corners, self._options.iou, _MOST_BOXES)
            corners, scores = corners[kept], scores[kept]
        return list(_relative(corners[:_MOST_BOXES], scores, frame))

    def _prepared(self, image: Image.Image, frame: _Frame) -> NDArray[Any]:
        """The image in its frame as the network's input, a batch of one."""
        pixels = np.asarray(_in_frame(image, frame))
        if self._options.channels == "bgr":
            pixels = pixels[..., ::-1]
        values = self._options.values
        if values == "auto":
            values = "0-255" if self._type is np.uint8 else "0-1"
        if values != "0-255":
            pixels = pixels.astype(np.float32) / 255
        if values == "imagenet":
            mean, deviation = (
                np.array(each[:: -1 if self._options.channels == "bgr" else 1], np.float32)
                for each in (_MEAN, _DEVIATION)
            )
            pixels = (pixels - mean) / deviation
        if not self._nhwc:
            pixels = pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(pixels[None], dtype=self._type)

    def _frame(self, width: int, height: int) -> _Frame:
        """The input frame for an image: of the file's size if that is fixed, else the smallest multiple of the stride.

        Args:
            width: of the image in pixels.
            height: of the image in pixels.
        """
        size = self._options.size
        if self._stretch:
            outer_width, outer_height = self._width or size, self._height or size
            return _Frame(outer_width, outer_height, 0, 0, outer_width, outer_height)
        scale = min((self._width or size) / width, (self._height or size) / height)
        inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
        # ceil to a multiple of the stride
        outer_width = self._width or -(-inner_width // self._stride) * self._stride
        outer_height = self._height or -(-inner_height // self._stride) * self._stride
        left, top = (outer_width - inner_width) // 2, (outer_height - inner_height) // 2
        return _Frame(outer_width, outer_height, left, top, inner_width, inner_height)

    def _class_id(self, wanted: int | str) -> int:
        named = {name: number for number, name in self._names.items()}
        if isinstance(wanted, str) and wanted in named:
            return named[wanted]
        if isinstance(wanted, int) and (not self._names or wanted in self._names) and wanted >= 0:
            return wanted
        has = ", ".join(f"{number} ({name})" for number, name in list(self._names.items())[:20])
        raise UsageError(f"the option 'classes' lists {wanted!r}, but {self._path} has {has or 'no class names'}")

    def _refusal(self, what: str) -> UsageError:
        return UsageError(f"{self._path} {what}")


def suppress(corners: Array, iou: float, most: int) -> list[int]:
    """Greedy non-maximum suppression.

    Args:
        corners: left, top, right, bottom of each box, by descending score, shape (N, 4).
        iou: boxes whose intersection over union with a better, kept box is above this are dropped.
        most: most boxes to keep.

    Returns:
        Indices of the kept boxes, in order.
    """
    sides = (corners[:, 2:] - corners[:, :2]).clip(0)
    areas = sides[:, 0] * sides[:, 1]
    rest = np.arange(len(corners))
    kept: list[int] = []
    while len(rest) and len(kept) < most:
        best, rest = int(rest[0]), rest[1:]
        kept.append(best)
        shared = np.minimum(corners[best, 2:], corners[rest, 2:]) - np.maximum(corners[best, :2], corners[rest, :2])
        intersection = shared.clip(0).prod(1)
        union = areas[best] + areas[rest] - intersection
        rest = rest[intersection <= iou * union]
    return kept


def _in_frame(image: Image.Image, frame: _Frame) -> Image.Image:
    """The image scaled and placed in its frame."""
    inner = image.resize((frame.inner_width, frame.inner_height), Image.Resampling.BILINEAR)
    if inner.size == (frame.width, frame.height):
        return inner
    canvas = Image.new("RGB", (frame.width, frame.height), _GREY)
    canvas.paste(inner, (frame.left, frame.top))
    return canvas


def _relative(corners: Array, scores: Array, frame: _Frame) -> Iterator[Box]:
    """Boxes relative to the image, clipped to it; boxes outside the image are dropped."""
    start = np.array([frame.left, frame.top] * 2, dtype=np.float64)
    extent = np.array([frame.inner_width, frame.inner_height] * 2, dtype=np.float64)
    for (left, top, right, bottom), score in zip(
        ((corners - start) / extent).clip(0, 1).tolist(), scores.tolist(), strict=False
    ):
        if right > left and bottom > top:
            yield Box(left, top, right, bottom, score)


def _shape(shape: Sequence[object]) -> str:
    return f"({', '.join(str(side) if side is not None else '?' for side in shape)})"[:200]


def _literal(text: str) -> object:
    """A value of the file's metadata, which YOLO's exporter writes as a Python literal; None for anything else."""
    if len(text) > _LONGEST_METADATA:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _names(found: object) -> dict[int, str]:
    """Class names by id; empty unless ids are 0, 1, 2, ..."""
    if isinstance(found, (list, tuple)):
        found = dict(enumerate(found))
    if not isinstance(found, dict) or list(found) != list(range(len(found))):
        return {}
    return {number: str(name) for number, name in found.items()}
