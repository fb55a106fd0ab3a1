"""Boxes by a trained network: any YOLO model in ONNX form whose output boxes are in pixels, run by onnxruntime.

Users bring the file (faces, heads, leaves). The image is letterboxed: scaled to the network's input with its aspect
ratio kept and the rest filled with grey, as in YOLOv5 and YOLOv8. The layout of the output is inferred from its shape.
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

from animesion.config.settings import Section
from animesion.detectors import model_files
from animesion.errors import AnimesionError, UsageError
from animesion.schemas import Box

_GREY = (114, 114, 114)
"""Fill colour of YOLO's own letterbox."""

_MOST_CANDIDATES, _MOST_BOXES = 30_000, 300
"""Most boxes before and after suppression; YOLO's own limits."""

_MOST_PIXELS = 4096 * 4096
"""Most pixels of the network's input."""

_LONGEST_METADATA = 1 << 20

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

_PYRAMIDS = ((8, 16, 32), (8, 16, 32, 64), (16, 32), (4, 8, 16, 32))
"""Strides of the feature pyramids of known networks, in input pixels."""

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
    layout: Literal["auto", "yolov5", "yolov8", "boxes"] = Field(
        "auto",
        description="layout of the output, by default inferred from its shape: (1, N, 5+C), (1, 4+C, N), or (N, 6)",
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
    """A network of the YOLO family.

    The score of a box is its class score, times objectness if the network has it. Non-maximum suppression ignores
    classes, as a crop is one sample whatever the class of its box.
    """

    summary = "a YOLO network of your own in ONNX form (onnxruntime)"
    Options = OnnxOptions

    def __init__(self, options: OnnxOptions | None = None) -> None:
        self._options = options = options or OnnxOptions()
        self._path = self.file(options)
        self._session = _session(self._path, options.device)
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if inputs else []
        if len(inputs) != 1 or len(shape) != 4 or shape[0] in range(2, 1 << 31) or not _open_or(shape[1], 3):
            raise self._refusal("does not take one RGB image of shape (1, 3, height, width)")
        if inputs[0].type not in _TYPES:
            raise self._refusal(f"takes {inputs[0].type}, not floats")
        self._input: str = inputs[0].name
        self._type = _TYPES[inputs[0].type]
        self._height, self._width = (side if isinstance(side, int) and side > 0 else 0 for side in shape[2:])
        if (self._height or options.size) * (self._width or options.size) > _MOST_PIXELS:
            raise self._refusal(f"takes images of {self._width}x{self._height} px, which is too large")
        self._output: str = self._session.get_outputs()[0].name
        metadata = self._session.get_modelmeta().custom_metadata_map
        stride = _literal(metadata.get("stride", ""))
        self._stride = stride if isinstance(stride, int) and 1 <= stride <= 256 else 32
        self._names = _names(_literal(metadata.get("names", "")))
        self._wanted = frozenset(map(self._class_id, options.classes))  # empty: every class

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
        try:
            [output] = self._session.run([self._output], {self._input: _letterbox(image, frame, self._type)})
        except Exception as error:  # onnxruntime's own classes, which differ by version
            raise AnimesionError(f"{self._path} fails on an image: {_first_line(error)}") from None
        # corners (N, 4) in input pixels, scores (N,), classes (N,); boxes that are not finite are dropped below
        with np.errstate(over="ignore", invalid="ignore"):
            corners, scores, classes, suppressed = self._decode(output, frame)
        good = np.isfinite(corners).all(1) & (scores >= self._options.score)
        if self._wanted:
            good &= np.isin(classes, list(self._wanted))
        corners, scores = corners[good].astype(np.float64), scores[good]
        order = np.argsort(-scores, kind="stable")[:_MOST_CANDIDATES]
        corners, scores = corners[order], scores[order]
        if not suppressed:
            kept = suppress(corners, self._options.iou, _MOST_BOXES)
            corners, scores = corners[kept], scores[kept]
        return list(_relative(corners[:_MOST_BOXES], scores, frame))

    def _frame(self, width: int, height: int) -> _Frame:
        """The input frame for an image: of the file's size if that is fixed, else the smallest multiple of the stride.

        Args:
            width: of the image in pixels.
            height: of the image in pixels.
        """
        size = self._options.size
        scale = min((self._width or size) / width, (self._height or size) / height)
        inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
        # ceil to a multiple of the stride
        outer_width = self._width or -(-inner_width // self._stride) * self._stride
        outer_height = self._height or -(-inner_height // self._stride) * self._stride
        left, top = (outer_width - inner_width) // 2, (outer_height - inner_height) // 2
        return _Frame(outer_width, outer_height, left, top, inner_width, inner_height)

    def _decode(self, output: Any, frame: _Frame) -> tuple[Array, Array, NDArray[np.int64], bool]:
        """Corners (N, 4) in input pixels, scores (N,), class ids (N,), and whether NMS was already applied."""
        if not isinstance(output, np.ndarray) or not np.issubdtype(output.dtype, np.floating):
            raise self._refusal(f"returns {getattr(output, 'dtype', type(output).__name__)}, not an array of floats")
        layout = self._layout(output.shape, frame)
        rows = output.reshape(output.shape[-2:]).astype(np.float32)
        if layout == "boxes":
            corners, scores, classes = rows[:, :4], rows[:, 4], np.nan_to_num(rows[:, 5], nan=-1).astype(np.int64)
        else:
            if layout == "yolov8":
                rows = rows.T
            first = 4 if layout == "yolov8" else 5
            # columns after the classes are masks or key points
            of_classes = rows[:, first : first + len(self._names) if self._names else None]
            classes = of_classes.argmax(1).astype(np.int64) if len(of_classes) else np.zeros(0, np.int64)
            scores = np.take_along_axis(of_classes, classes[:, None], 1)[:, 0]
            if layout == "yolov5":
                scores = scores * rows[:, 4]
            half = rows[:, 2:4] / 2  # rows start with centre x, centre y, width, height
            corners = np.concatenate([rows[:, :2] - half, rows[:, :2] + half], 1)
        scores = np.nan_to_num(scores, nan=0.0)
        if len(scores) and (scores.min() < -0.01 or scores.max() > 1.01):
            raise self._refusal(
                f"returns scores from {scores.min():.3g} to {scores.max():.3g} instead of 0 to 1, "
                f"read as layout '{layout}': set the option 'layout' if that is wrong"
            )
        return corners, scores.clip(0, 1), classes, layout == "boxes"

    def _layout(self, shape: tuple[int, ...], frame: _Frame) -> str:
        """The layout of an output: `yolov5`, `yolov8` or `boxes`.

        The number of predictions decides it: YOLOv8 has one per cell of its feature pyramid, YOLOv5 three (anchors).
        """
        batched = len(shape) == 3 and shape[0] == 1
        if not batched and len(shape) != 2:
            raise self._unknown(shape)
        rows, columns = shape[-2:]
        cells = {sum(-(-frame.width // s) * -(-frame.height // s) for s in strides) for strides in _PYRAMIDS}
        layout = self._options.layout
        if layout == "auto":
            if not batched:
                layout = "boxes"
            elif columns in cells and rows > 4:
                layout = "yolov8"
            elif rows % 3 == 0 and rows // 3 in cells and columns > 5:
                layout = "yolov5"
            elif columns == 6:
                layout = "boxes"
            else:
                layout = "yolov8" if rows < columns else "yolov5"
        known = len(self._names)
        fits = {"boxes": columns == 6, "yolov8": rows >= 4 + (known or 1), "yolov5": columns >= 5 + (known or 1)}
        if not fits[layout]:
            raise self._unknown(shape)
        return layout

    def _class_id(self, wanted: int | str) -> int:
        named = {name: number for number, name in self._names.items()}
        if isinstance(wanted, str) and wanted in named:
            return named[wanted]
        if isinstance(wanted, int) and (not self._names or wanted in self._names) and wanted >= 0:
            return wanted
        has = ", ".join(f"{number} ({name})" for number, name in list(self._names.items())[:20])
        raise UsageError(f"the option 'classes' lists {wanted!r}, but {self._path} has {has or 'no class names'}")

    def _unknown(self, shape: tuple[int, ...]) -> UsageError:
        return self._refusal(
            f"returns an output of shape {shape}; supported are (1, 4+C, N) of YOLOv8, (1, N, 5+C) of YOLOv5, "
            "and (N, 6) or (1, N, 6) after suppression"
        )

    def _refusal(self, what: str) -> UsageError:
        return UsageError(f"{self._path} {what}; export the network with YOLO's own exporter")


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


def _letterbox(image: Image.Image, frame: _Frame, dtype: Any) -> NDArray[Any]:
    """The image in its frame as the network's input: (1, 3, height, width), 0 to 1."""
    canvas = Image.new("RGB", (frame.width, frame.height), _GREY)
    inner = image.resize((frame.inner_width, frame.inner_height), Image.Resampling.BILINEAR)
    canvas.paste(inner, (frame.left, frame.top))
    pixels = np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    return np.ascontiguousarray(pixels, dtype=dtype)


def _relative(corners: Array, scores: Array, frame: _Frame) -> Iterator[Box]:
    """Boxes relative to the image, clipped to it; boxes outside the image are dropped."""
    start = np.array([frame.left, frame.top] * 2, dtype=np.float64)
    extent = np.array([frame.inner_width, frame.inner_height] * 2, dtype=np.float64)
    for (left, top, right, bottom), score in zip(
        ((corners - start) / extent).clip(0, 1).tolist(), scores.tolist(), strict=False
    ):
        if right > left and bottom > top:
            yield Box(left, top, right, bottom, score)


def _session(path: Path, device: str) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(
            "the detector 'onnx' needs onnxruntime, which is not installed; "
            "install it with: pip install 'animesion[detect]'"
        ) from None
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1  # worker processes already use every core
    settings.log_severity_level = 4
    try:
        if provider in onnxruntime.get_available_providers():
            session = onnxruntime.InferenceSession(str(path), settings, providers=[provider])
            if provider in session.get_providers():  # without the CUDA libraries it silently falls back to the CPU
                return session
    except Exception as error:  # onnxruntime's own classes, which differ by version
        raise UsageError(f"{path} is not a network that onnxruntime can load: {_first_line(error)}") from None
    raise UsageError(
        "device 'cuda' of the detector 'onnx' needs a GPU and onnxruntime-gpu; leave the option out to use the CPU"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def _open_or(side: object, value: int) -> bool:
    """Whether a dimension in the file is dynamic or equals a value."""
    return side == value or not isinstance(side, int)


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
