"""Anime faces and heads by the networks of deepghs, through their package dghs-imgutils.

The package downloads a network from the Hugging Face Hub at first use and keeps it in the Hub's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image
from pydantic import Field

from animesion import model_files
from animesion.config.settings import Section
from animesion.errors import AnimesionError, UsageError
from animesion.schemas import Box


class ImgutilsOptions(Section):
    """Options of the detector `imgutils`."""

    part: Literal["face", "head"] = Field("face", description="what to detect; a head includes the hair")
    model: str = Field("", description="name of the network, such as `face_detect_v1.4_n`; empty for the default")
    score: float = Field(0.25, ge=0, le=1, strict=False, description="least score of a box")
    iou: float = Field(0.7, ge=0, le=1, strict=False, description="boxes that overlap a better one by more are dropped")


class ImgutilsDetector:
    """Boxes and scores of deepghs' networks."""

    summary = "anime faces or heads by deepghs' networks (dghs-imgutils), downloaded at first use"
    Options = ImgutilsOptions

    def __init__(self, options: ImgutilsOptions | None = None) -> None:
        self._options = options or ImgutilsOptions()
        self._find = _function(self._options.part)

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Boxes of each image, by descending score.

        Raises:
            AnimesionError: the network cannot be downloaded, or fails.
        """
        return [self._boxes(image) for image in images]

    def _boxes(self, image: Image.Image) -> list[Box]:
        settings: dict[str, Any] = {"conf_threshold": self._options.score, "iou_threshold": self._options.iou}
        if self._options.model:
            settings["model_name"] = self._options.model
        try:
            found = self._find(image, **settings)
        except Exception as error:  # the Hub client, its HTTP library and onnxruntime raise classes of their own
            raise AnimesionError(self._failure(error)) from None
        width, height = image.size
        boxes = []
        for (left, top, right, bottom), _, score in found:
            box = Box(
                min(1.0, max(0.0, left / width)),
                min(1.0, max(0.0, top / height)),
                min(1.0, max(0.0, right / width)),
                min(1.0, max(0.0, bottom / height)),
                float(score),
            )
            if box.right > box.left and box.bottom > box.top:
                boxes.append(box)
        return sorted(boxes, key=lambda box: (-box.score, box))

    def _failure(self, error: Exception) -> str:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "Timeout"}:
            return (
                "the detector 'imgutils' cannot download its network from the Hugging Face Hub: run it once with a "
                f"connection, or copy the Hub's cache from another machine ({reason})"
            )
        return f"the detector 'imgutils' fails on an image: {reason}"


def _function(part: str) -> Callable[..., Any]:
    try:
        if part == "head":
            from imgutils.detect import detect_heads

            return detect_heads  # type: ignore[no-any-return]
        from imgutils.detect import detect_faces

        return detect_faces  # type: ignore[no-any-return]
    except ImportError as error:
        raise UsageError(
            f"the detector 'imgutils' needs dghs-imgutils, which cannot be imported ({error}); "
            f"install it with: {model_files.IMGUTILS}"
        ) from None
