"""Embeddings by SSCD, a network for copy detection (arXiv 2202.10261), from a file that the user installs.

Any network of the same interface serves: RGB images of shape (n, 3, height, width), normalised as for ImageNet, to
vectors of shape (n, d), as TorchScript or in ONNX form. `animesion.pipeline.embed` calls it for the images of a build.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from animesion import model_files
from animesion.errors import UsageError

SUMMARY = "copies by a network for copy detection (Meta), as TorchScript or ONNX"

#: Images per batch; fixed, because sums round differently in batches of another size.
BATCH = 32

#: Side in pixels that images are stretched to, where the file leaves it open: SSCD's own choice for batches.
_SIDE = 320

#: Mean and deviation of ImageNet, for values from 0 to 1.
_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)

_LARGEST_SIDE, _MOST_VALUES = 1024, 1 << 14
_ARCHIVE = b"PK\x03\x04"  # a TorchScript file is a zip archive
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Vectors = npt.NDArray[np.float32]


class Sscd:
    """The network.

    A TorchScript file holds a program that torch runs, so it must be from someone you trust.

    Args:
        path: the file; None for the installed one.

    Raises:
        UsageError: there is no such file, it is not a network of this interface, or torch or onnxruntime is missing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = model_files.path_of("sscd") if path is None else path
        try:
            with self._path.open("rb") as file:
                is_archive = file.read(4) == _ARCHIVE
        except OSError as error:
            raise UsageError(f"{self._path} cannot be read: {(error.strerror or str(error)).lower()}") from None
        self._size = (_SIDE, _SIDE)
        self._batch = BATCH
        self._run = self._torchscript() if is_archive else self._onnx()

    def __call__(self, images: Sequence[Image.Image]) -> Vectors:
        """Embeddings of unit length, shape (n, d), of n RGB images of any size, stretched to the network's input size.

        Raises:
            UsageError: the network fails, or does not return one finite vector per image.
        """
        batches = [self._embedded(images[i : i + self._batch]) for i in range(0, len(images), self._batch)]
        return np.concatenate(batches)

    def _embedded(self, images: Sequence[Image.Image]) -> Vectors:
        # bilinear, as torchvision's Resize of an image
        pixels = [np.asarray(each.resize(self._size, Image.Resampling.BILINEAR), dtype=np.float32) for each in images]
        batch = (np.stack(pixels) / 255 - _MEAN) / _STD
        try:
            # (n, height, width, 3) -> (n, 3, height, width)
            found = self._run(np.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32))
        except Exception as error:  # torch's and onnxruntime's own classes
            raise UsageError(f"{self._path} fails on an image: {model_files.first_line(error)}") from None
        if not isinstance(found, np.ndarray) or found.ndim != 2 or len(found) != len(images):
            raise self._refusal(f"returns {_form(found)} for {len(images)} images")
        if not 0 < found.shape[1] <= _MOST_VALUES or not np.issubdtype(found.dtype, np.floating):
            raise self._refusal(f"returns {_form(found)} for {len(images)} images")
        vectors = found.astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise self._refusal("returns a vector without a length")
        unit: Vectors = vectors / lengths
        return unit

    def _torchscript(self) -> Callable[[npt.NDArray[np.float32]], Any]:
        try:
            import torch
        except ImportError:
            raise UsageError(
                f"{self._path} is a TorchScript file, which needs torch: pip install 'animesion[train]'"
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch prefers another format to that of the file
                network: Any = torch.jit.load(str(self._path), map_location="cpu")  # type: ignore[no-untyped-call]
            network.eval()
        except Exception as error:  # torch documents no base class of its errors
            raise UsageError(
                f"{self._path} is not a TorchScript file ({model_files.first_line(error)}): of SSCD's files, take one "
                "that ends in .torchscript.pt"
            ) from None

        def run(batch: npt.NDArray[np.float32]) -> Any:
            # optimised code sums in another order after a few batches: a resumed build would get other vectors
            with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                found = network(torch.from_numpy(batch))
            return found.numpy() if isinstance(found, torch.Tensor) else found

        return run

    def _onnx(self) -> Callable[[npt.NDArray[np.float32]], Any]:
        session = model_files.onnx_session(self._path, "the embedder 'sscd'")
        inputs = session.get_inputs()
        shape = inputs[0].shape if inputs else []
        kind = _TYPES.get(inputs[0].type) if inputs else None
        if len(inputs) != 1 or len(shape) != 4 or kind is None or (_is_fixed(shape[1]) and shape[1] != 3):
            raise self._refusal("does not take RGB images of shape (n, 3, height, width)")
        if _is_fixed(shape[0]):
            if shape[0] != 1:
                raise self._refusal(f"takes batches of {shape[0]} images only")
            self._batch = 1
        height, width = (side if _is_fixed(side) else _SIDE for side in shape[2:])
        if not 8 <= min(height, width) <= max(height, width) <= _LARGEST_SIDE:
            raise self._refusal(f"takes images of {width}x{height} px")
        self._size = (width, height)
        name, output = inputs[0].name, session.get_outputs()[0].name
        return lambda batch: session.run([output], {name: batch.astype(kind)})[0]

    def _refusal(self, what: str) -> UsageError:
        return UsageError(f"{self._path} {what}; SSCD takes (n, 3, height, width) and returns (n, 512)")


def _is_fixed(side: object) -> bool:
    """Whether a dimension in the file is a number and not a name."""
    return isinstance(side, int) and side > 0


def _form(found: object) -> str:
    return f"an array of shape {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
