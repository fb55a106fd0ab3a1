"""Anime faces by a small network that comes with the package; trained with `animesion train-detector`.

It needs no other file. onnxruntime runs it if it is installed, and otherwise OpenCV, which takes three times as long. A
box in some hundreds differs between the two, in its fourth decimal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from animesion.config.settings import Section
from animesion.detectors.onnx import suppress
from animesion.errors import UsageError
from animesion.schemas import Box

OUTPUTS = {"stride8": 8, "stride16": 16, "stride32": 32}
"""Outputs of the network and the pixels between their cells; see `boxes_of`."""

_MULTIPLE = 32
"""Sides of the network's input are multiples of this."""

_CANDIDATES, _MOST = 2000, 300
"""Most boxes of an image before and after suppression."""

_DIGITS = 4
"""Decimals of a box: the two runtimes differ by less, and a crop by less than a pixel."""

Array = NDArray[np.float32]


class AnimeOptions(Section):
    """Options of the detector `anime`."""

    score: float = Field(0.2, ge=0.01, le=1, strict=False, description="least score of a box")
    iou: float = Field(0.4, ge=0, le=1, strict=False, description="boxes that overlap a better one by more are dropped")
    size: int = Field(576, ge=64, le=2048, description="longest side in pixels to which a larger image is shrunk")
    file: str = Field("", description="a network of `animesion train-detector`; empty for the one of the package")


class AnimeDetector:
    """Faces in drawn images, from the hairline or a little above it to a little below the chin.

    The score is calibrated: of the boxes with a score of 0.9 on illustrations that the network did not learn from,
    about nine in ten are faces.
    """

    summary = "faces in drawn images, by a network that comes with the package"
    Options = AnimeOptions

    def __init__(self, options: AnimeOptions | None = None) -> None:
        self._options = options = options or AnimeOptions()
        self._run = _runtime(self.file(options))

    @classmethod
    def file(cls, options: AnimeOptions | None = None) -> Path:
        """Path of the network.

        Raises:
            UsageError: there is no such file.
        """
        if options is None or not options.file:
            return Path(str(resources.files("animesion.detectors"))) / "anime.onnx"
        path = Path(options.file).expanduser()
        if not path.is_file():
            raise UsageError(
                f"file not found: {path}; the option 'file' of the detector 'anime' takes a network's path"
            )
        return path

    @staticmethod
    def runtime() -> str:
        """The library that runs the network, with its version."""
        if _installed("onnxruntime"):
            try:
                return f"onnxruntime-{version('onnxruntime')}"
            except PackageNotFoundError:  # another package has the module, such as onnxruntime-gpu
                import onnxruntime

                return f"onnxruntime-{onnxruntime.__version__}"
        import cv2

        return f"opencv-{cv2.__version__}"

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Faces of each image, by descending score."""
        return [self._faces(image) for image in images]

    def _faces(self, image: Image.Image) -> list[Box]:
        columns, rows = image.size
        pixels, scale = prepare(image, self._options.size)
        corners, scores = boxes_of(self._run(pixels), self._options.score)
        corners /= np.array([columns * scale[0], rows * scale[1]] * 2, np.float32)
        kept = suppress(corners, self._options.iou, _MOST)
        boxes = []
        for sides, score in zip(corners[kept].clip(0, 1).tolist(), scores[kept].tolist(), strict=True):
            left, top, right, bottom = (round(side, _DIGITS) for side in sides)
            if right > left and bottom > top:
                boxes.append(Box(left, top, right, bottom, round(score, _DIGITS)))
        return boxes


class TableOrAnime:
    """The boxes of the source's table where it has one, and otherwise those of `AnimeDetector`.

    An image that the table does not list has no face. The network is loaded with the first image without a table.
    """

    summary = "boxes from the source's own table, or faces by 'anime' if it has none"
    Options = AnimeOptions

    def __init__(self, options: AnimeOptions | None = None) -> None:
        self._options = options
        self._detector: AnimeDetector | None = None

    @classmethod
    def file(cls, options: AnimeOptions | None = None) -> Path:
        """Path of the network; see `AnimeDetector.file`."""
        return AnimeDetector.file(options)

    @staticmethod
    def runtime() -> str:
        """The library that runs the network; see `AnimeDetector.runtime`."""
        return AnimeDetector.runtime()

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Boxes of each image."""
        found = []
        for image, boxes in zip(images, given, strict=True):
            if boxes is None:
                self._detector = self._detector or AnimeDetector(self._options)
                [boxes] = self._detector([image], [None])
            found.append(list(boxes))
        return found


def prepare(image: Image.Image, size: int) -> tuple[Array, tuple[float, float]]:
    """The network's input.

    Args:
        image: mode RGB.
        size: longest side in pixels; a smaller image is not enlarged.

    Returns:
        The pixels from -1 to 1, shape (1, 3, height, width), filled with grey at the right and at the bottom; and
        pixels of the input per pixel of the image along x and y.
    """
    import cv2

    pixels = np.asarray(image)
    columns, rows = image.size
    shrink = min(1.0, size / max(columns, rows))
    inner = max(1, round(columns * shrink)), max(1, round(rows * shrink))
    if inner != image.size:
        cv2.setNumThreads(1)  # worker processes already use every core
        pixels = cv2.resize(pixels, inner, interpolation=cv2.INTER_AREA)
    width, height = (-(-side // _MULTIPLE) * _MULTIPLE for side in inner)
    canvas = np.zeros((1, 3, height, width), np.float32)
    place = canvas[0, :, : inner[1], : inner[0]]
    np.multiply(pixels.transpose(2, 0, 1), np.float32(1 / 127.5), out=place, casting="unsafe")
    place -= 1
    return canvas, (inner[0] / columns, inner[1] / rows)


def boxes_of(outputs: Sequence[Array], least: float) -> tuple[Array, Array]:
    """Boxes by descending score.

    Args:
        outputs: for each of `OUTPUTS` an array (1, 5, rows, columns): the score's logit, and the logarithms of the
            distances from the cell's centre to the left, top, right and bottom edge in strides.
        least: least score of a box.

    Returns:
        Corners in pixels of the input, shape (N, 4), and scores, shape (N,). Values that are not finite are left out.
    """
    corners, scores = [], []
    threshold = np.log(least / (1 - least)) if least < 1 else np.inf
    for output, stride in zip(outputs, OUTPUTS.values(), strict=True):
        rows, columns = np.nonzero(output[0, 0] >= threshold)
        found = output[0][:, rows, columns].astype(np.float32)  # (5, N)
        left, top, right, bottom = np.exp(found[1:].clip(-6, 4)) * stride
        x, y = (columns + np.float32(0.5)) * stride, (rows + np.float32(0.5)) * stride
        corners.append(np.stack([x - left, y - top, x + right, y + bottom], 1))
        scores.append(1 / (1 + np.exp(-found[0].clip(-30, 30))))
    box, score = np.concatenate(corners), np.concatenate(scores)
    good = np.isfinite(box).all(1) & np.isfinite(score)
    box, score = box[good], score[good]
    order = np.argsort(-score, kind="stable")[:_CANDIDATES]
    return box[order], score[order]


def _runtime(path: Path) -> Callable[[Array], list[Array]]:
    """A function that runs the network on an input.

    Raises:
        UsageError: the file is no network of this kind.
    """
    names = list(OUTPUTS)
    try:
        run = _onnxruntime(path, names) if _installed("onnxruntime") else _opencv(path, names)
        shapes = [output.shape for output in run(np.zeros((1, 3, 64, 96), np.float32))]
    except Exception as error:  # the runtimes' own classes, which differ by version
        first = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise UsageError(f"{path} is not a network that the detector 'anime' can load: {first}") from None
    if shapes != [(1, 5, 64 // stride, 96 // stride) for stride in OUTPUTS.values()]:
        raise UsageError(f"{path} is not a network of `animesion train-detector`: its outputs have other shapes")
    return run


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # the module is blocked: `sys.modules[module]` is None
        return False


def _onnxruntime(path: Path, names: list[str]) -> Callable[[Array], list[Array]]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1  # worker processes already use every core
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    [only] = session.get_inputs()
    name: str = only.name
    return lambda pixels: list(session.run(names, {name: pixels}))


def _opencv(path: Path, names: list[str]) -> Callable[[Array], list[Array]]:
    import cv2

    cv2.setNumThreads(1)
    found: Any = cv2.dnn.readNetFromONNX(str(path))

    def run(pixels: Array) -> list[Array]:
        found.setInput(pixels)
        return list(found.forward(names))

    return run
