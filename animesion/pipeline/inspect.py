"""Stage 2: one decode of every image gives all that is ever asked of its pixels: `features/part-*.parquet`.

An image that kills the worker is found by the engine's bisection and recorded as `crashed decoder`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL
import pyarrow.compute as pc
from PIL import Image

from animesion import detectors
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.executors import Executor
from animesion.images import codec, hashing, quality
from animesion.images.features import compute_features
from animesion.schemas import FEATURES, RAW, Box, DropReason
from animesion.storage import parquet
from animesion.storage.workspace import Receipt, Workspace

#: The decoder's version is part of the code: another one may give other pixels.
CODE = f"inspect-5/pillow-{PIL.__version__}"

_COLUMNS = ("key", "reason", "offset", "bytes", "boxes")


@dataclass(frozen=True)
class InspectJob:
    """Inspect one part.

    Attributes:
        crashed: keys that are known to kill the decoder.
        only: when not None, decode just these keys and write nothing.
        known: the boxes of an earlier run with the same detector lie in the part's features.
    """

    workspace: Workspace
    recipe: Recipe
    part: int
    inputs: dict[str, str]
    keys: tuple[str, ...] = ()
    crashed: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    known: bool = False

    @property
    def name(self) -> str:
        """Unit of the receipt."""
        return f"inspect/part-{self.part:05d}"

    def probe(self, keys: Sequence[str]) -> InspectJob:
        """The same decodes for some keys, nothing written."""
        return replace(self, only=tuple(keys))

    def without(self, keys: Sequence[str]) -> InspectJob:
        """The job with some keys recorded as crashing."""
        return replace(self, crashed=(*self.crashed, *keys))

    def run(self) -> dict[str, int]:
        """Inspect, write, commit."""
        raw = parquet.read(self.workspace.path(f"raw/part-{self.part:05d}.parquet"), RAW, _COLUMNS)
        known = self._known_boxes() if self.known else {}
        detector: detectors.Detector | None = None
        rows: list[dict[str, Any]] = []
        limits = codec.Limits(self.recipe.filter.max_side, self.recipe.filter.max_pixels)
        with self.workspace.path(f"raw/part-{self.part:05d}.tar").open("rb") as tar:
            for row in raw.filter(pc.equal(raw["reason"], "")).to_pylist():
                key = row["key"]
                if self.only is not None and key not in self.only:
                    continue
                if key in self.crashed:
                    rows.append({"key": key, "reason": DropReason.CRASHED_DECODER, "detail": "the worker process died"})
                    continue
                tar.seek(row["offset"])
                boxes = None if row["boxes"] is None else [Box(**box) for box in row["boxes"]]
                content = tar.read(row["bytes"])
                try:
                    image = codec.decode(content, limits)
                except codec.RejectedImageError as error:
                    rows.append({"key": key, "reason": error.reason, "detail": error.detail})
                    continue
                if self.recipe.crop.detector == "none":
                    found = None
                elif key in known:
                    found = known[key]
                else:
                    detector = detector or _detector(self.recipe)
                    [given] = detector([image.image], [boxes])
                    found = stored(given)
                rows += ({"key": key, **sample} for sample in features(image, found, self.recipe))
        if self.only is None:
            name = f"features/part-{self.part:05d}.parquet"
            outputs = {name: parquet.write(self.workspace.path(name), parquet.table(rows, FEATURES))}
            facts = {"crashed": list(self.crashed), "detections": detections(self.recipe, self.inputs)}
            self.workspace.commit(self.name, CODE, params(self.recipe), self.inputs, outputs, facts)
        return {"items": len(raw)}

    def _known_boxes(self) -> dict[str, list[Box]]:
        """The boxes that an earlier run found, by key."""
        earlier = parquet.read(
            self.workspace.path(f"features/part-{self.part:05d}.parquet"), FEATURES, ("key", "boxes")
        )
        return {
            row["key"]: [Box(**box) for box in row["boxes"]] for row in earlier.to_pylist() if row["boxes"] is not None
        }


def _detector(recipe: Recipe) -> detectors.Detector:
    """The recipe's detector, made once a process: networks take a while to load."""
    name, options = recipe.crop.detector, recipe.crop.detector_options
    identity = detectors.identity(name, options)
    return _made_detector(name, json.dumps(options, sort_keys=True), identity)


@functools.lru_cache(maxsize=1)
def _made_detector(name: str, options: str, identity: str) -> detectors.Detector:
    """`identity` tells another file under the same name."""
    return detectors.load(name, json.loads(options))


def stored(boxes: Sequence[Box]) -> list[Box]:
    """Boxes as the table holds them, the surest first: a crop is the same whether they come from it or the detector."""
    rounded = [Box(*(float(np.float32(value)) for value in box)) for box in boxes]
    return sorted(rounded, key=lambda box: -box.score)


def features(decoded: codec.DecodedImage, boxes: Sequence[Box] | None, recipe: Recipe) -> list[dict[str, Any]]:
    """All features of an image, one row a sample: one, or with `crop.faces = "each"` one a box.

    Args:
        decoded: decoded.
        boxes: what the detector found, the surest first, as `stored` gives them; None when it was not asked.
        recipe: its `crop` and `quality` sections matter.

    Returns:
        Fields of `animesion.schemas.FEATURES` besides the key.
    """
    image = decoded.image
    common = {
        "reason": "",
        "detail": "",
        "format": decoded.format,
        "mode": decoded.mode,
        "width": image.width,
        "height": image.height,
        "plain": decoded.plain,
        "pixels_blake3": hashing.of_pixels(image).hex(),
        "jpeg_quality": decoded.jpeg_quality,
    }
    if boxes is None:
        crop = quality.trimmed(image) if recipe.quality.trim else None
        return [{**common, "faces": -1, "face": 0, "face_score": 0.0, **_looks(image, crop)}]
    kept = [box._asdict() for box in boxes]
    rows: list[dict[str, Any]] = []
    # a box that lies outside the image is no face
    inside = [(box, crop) for box in boxes if (crop := _crop(box, *image.size, recipe)) is not None]
    each = recipe.crop.faces == "each"
    for number, (box, crop) in enumerate(inside if each else inside[:1], 1 if each else 0):
        row = {**common, "faces": len(boxes), "face": number, "face_score": box.score}
        row |= {**_looks(image, _seen(crop, *image.size, recipe)), "crop": list(crop)}
        rows.append(row if rows else {**row, "boxes": kept})
    none = {"boxes": kept, "faces": 0, "face": 0, "face_score": 0.0}
    return rows or [{**common, **none, **_looks(image, None)}]


def _crop(box: Box, width: int, height: int, recipe: Recipe) -> tuple[int, int, int, int] | None:
    settings = recipe.crop
    clip = settings.outside == "shift"
    return codec.crop_pixels(box, width, height, settings.margin, square=settings.square, clip=clip)


def _looks(image: Image.Image, crop: tuple[int, int, int, int] | None) -> dict[str, Any]:
    """What is told of the pixels that will be packed."""
    cut = image if crop is None else image.crop(crop)
    found = compute_features(cut)
    return {
        "crop": None if crop is None else list(crop),
        "phash": found.phash,
        "phash_flip": found.phash_flip,
        "thumbnail": found.thumbnail,
        **found.figures._asdict(),
    }


def _seen(crop: tuple[int, int, int, int], width: int, height: int, recipe: Recipe) -> tuple[int, int, int, int]:
    """The crop to look at: one that curate will drop for reaching out, or for its size, is not filled up first."""
    wide, tall = crop[2] - crop[0], crop[3] - crop[1]
    fits = max(wide, tall) <= recipe.filter.max_side and wide * tall <= recipe.filter.max_pixels
    if recipe.crop.outside == "pad" and fits:
        return crop
    return max(0, crop[0]), max(0, crop[1]), min(width, crop[2]), min(height, crop[3])


def detections(recipe: Recipe, inputs: Mapping[str, str]) -> str:
    """Digest of all that boxes depend on: the images, the decoder and the detector, not margins and minimums."""
    crop = recipe.crop
    identity = detectors.identity(crop.detector, crop.detector_options)
    return params_digest([CODE, _limits(recipe), dict(inputs), crop.detector, crop.detector_options, identity])


def _limits(recipe: Recipe) -> dict[str, int]:
    return {"max_side": recipe.filter.max_side, "max_pixels": recipe.filter.max_pixels}


def params(recipe: Recipe) -> str:
    """Digest of what the stage takes from the recipe."""
    crop = recipe.crop.model_dump(mode="json", exclude={"min_score", "min_side", "min_share"})
    identity = detectors.identity(recipe.crop.detector, recipe.crop.detector_options)
    return params_digest({"limits": _limits(recipe), "crop": crop, "trim": recipe.quality.trim, "detector": identity})


def run(
    workspace: Workspace, recipe: Recipe, engine: Executor, parts: int, advance: Callable[[int], None]
) -> list[Receipt]:
    """Inspect every part that has no valid receipt; returns all receipts by part."""
    jobs = []
    units = [f"inspect/part-{part:05d}" for part in range(parts)]
    for part, unit in enumerate(units):
        fetched = workspace.receipt(f"fetch/part-{part:05d}")
        assert fetched is not None
        inputs = {name: known["sha256"] for name, known in fetched.outputs.items()}
        if workspace.done(unit, CODE, params(recipe), inputs):
            advance(fetched.facts["items"])
        else:
            earlier = workspace.receipt(unit)
            raw = parquet.read(workspace.path(f"raw/part-{part:05d}.parquet"), RAW, ("key", "reason"))
            keys = tuple(raw.filter(pc.equal(raw["reason"], ""))["key"].to_pylist())
            known = (
                earlier is not None
                and earlier.facts.get("detections") == detections(recipe, inputs)
                and workspace.intact(earlier)
            )
            jobs.append(InspectJob(workspace, recipe, part, inputs, keys, known=known))
    workspace.forget("inspect", set(units))
    engine.run(jobs, lambda job, facts: advance(facts["items"]))
    receipts = [workspace.receipt(unit) for unit in units]
    return [receipt for receipt in receipts if receipt is not None]
