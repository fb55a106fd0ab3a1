"""Stage 2: decode every image once and write its features to `features/part-*.parquet`.

All later decisions read these tables and not the pixels. The executor finds an image that kills its worker by
bisection; it is recorded as `crashed decoder`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL
import pyarrow.compute as pc
from PIL import Image, ImageOps

from animesion import detectors
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.executors import Executor
from animesion.images import codec, ends, formats, hashing, local_features, other_hashes, quality
from animesion.images.features import compute_features
from animesion.images.windows import window_phashes
from animesion.schemas import FEATURES, RAW, Box, DropReason
from animesion.storage import parquet
from animesion.storage.receipts import Receipt
from animesion.storage.workspace import Workspace

#: Includes the versions of the decoders, as another version may decode to other pixels.
CODE = f"inspect-8/pillow-{PIL.__version__}{formats.plugin_versions()}"

_COLUMNS = ("key", "reason", "offset", "bytes", "boxes", "sha256")


@dataclass(frozen=True)
class InspectJob:
    """Inspect one part.

    Attributes:
        crashed: keys known to crash the decoder.
        only: if not None, decode just these keys and write nothing.
        known: the part's features exist and have the boxes of the same detector on the same images.
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
        """The same decodes for some keys; nothing is written."""
        return replace(self, only=tuple(keys))

    def without(self, keys: Sequence[str]) -> InspectJob:
        """The same job with some keys recorded as crashed."""
        return replace(self, crashed=(*self.crashed, *keys))

    def run(self) -> dict[str, int]:
        """Inspect, write and commit; returns the number of images."""
        raw = parquet.read(self.workspace.path(f"raw/part-{self.part:05d}.parquet"), RAW, _COLUMNS)
        known = self._known_boxes() if self.known else {}
        detector: detectors.Detector | None = None
        rows: list[dict[str, Any]] = []
        followed: list[str] = []
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
                may_be_copied = image.plain and image.format in codec.LONGEST_SIDE
                if may_be_copied and ends.end_of(content, image.format) != len(content):
                    followed.append(row["sha256"])
                detected: Sequence[Box] | None
                if self.recipe.crop.detector == "none":
                    detected = None
                elif key in known:
                    detected = known[key]
                else:
                    # Only now, so that a part without new images loads no network.
                    detector = detector or _detector(self.recipe)
                    [raw_boxes] = detector([image.image], [boxes])
                    detected = as_stored(raw_boxes)
                decided = self._decided.get(key)
                rows += ({"key": key, **sample} for sample in features(image, detected, self.recipe, decided))
        if self.only is None:
            name = f"features/part-{self.part:05d}.parquet"
            outputs = {name: parquet.write(self.workspace.path(name), parquet.table(rows, FEATURES))}
            facts = {"crashed": list(self.crashed), "detections": detections(self.recipe, self.inputs)}
            # files in which something follows the image: pack does not copy them as they are
            facts["followed"] = sorted(set(followed))
            digest = params(self.recipe, self._decided)
            self.workspace.commit(self.name, CODE, digest, self.inputs, outputs, facts)
        return {"items": len(raw)}

    @property
    def _decided(self) -> dict[str, list[float]]:
        return decided_boxes(self.recipe, self.keys)

    def _known_boxes(self) -> dict[str, list[Box]]:
        """Boxes by key from the part's existing features."""
        earlier = parquet.read(
            self.workspace.path(f"features/part-{self.part:05d}.parquet"), FEATURES, ("key", "boxes")
        )
        return {
            row["key"]: [Box(**box) for box in row["boxes"]] for row in earlier.to_pylist() if row["boxes"] is not None
        }


def _detector(recipe: Recipe) -> detectors.Detector:
    """The recipe's detector, loaded once per process."""
    crop = recipe.crop
    identity = detectors.identity(crop.detector, crop.detector_options)
    return _load_detector(json.dumps([crop.detector, crop.detector_options, crop.agreement], sort_keys=True), identity)


@functools.lru_cache(maxsize=1)
def _load_detector(settings: str, identity: str) -> detectors.Detector:
    """Cached loading; `identity` distinguishes model files that share a name."""
    detector, options, agreement = json.loads(settings)
    return detectors.load(detector, options, agreement=agreement)


def as_stored(boxes: Sequence[Box]) -> list[Box]:
    """Boxes rounded to float32 as in the table, highest score first.

    A crop from the detector's boxes then equals one from boxes that were read back from the table.
    """
    rounded = [Box(*(float(np.float32(value)) for value in box)) for box in boxes]
    return sorted(rounded, key=lambda box: -box.score)


def decided_boxes(recipe: Recipe, keys: Iterable[str]) -> dict[str, list[float]]:
    """The boxes that a curator decided on for some keys; none where the whole image is the sample."""
    boxes = recipe.curate.decisions.box if recipe.crop.detector != "none" else {}
    return {key: boxes[key] for key in keys if key in boxes} if boxes else {}


def features(
    decoded: codec.DecodedImage, boxes: Sequence[Box] | None, recipe: Recipe, decided: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """All features of an image: one row per sample, which is the image or, with `crop.faces = "each"`, each box.

    Args:
        decoded: the decoded image.
        boxes: boxes of the detector as `as_stored` returns them; None if no detector ran.
        recipe: its `crop` and `quality` sections matter.
        decided: left, top, right and bottom of the box that a curator decided on, relative; None for the detector's.

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
        return [{**common, "faces": -1, "face": 0, "face_score": 0.0, **_sample_features(image, crop, recipe)}]
    all_boxes = [box._asdict() for box in boxes]  # the detector's, also where a curator decided
    if decided is not None:
        left, top, right, bottom = decided
        boxes = [Box(left, top, right, bottom, 1.0)]
    rows: list[dict[str, Any]] = []
    # A box outside the image has no crop; without any other box the image counts as one without faces.
    inside = [(box, crop) for box in boxes if (crop := _crop(box, *image.size, recipe)) is not None]
    each = recipe.crop.faces == "each"
    # Boxes are sorted by score, so the first is the best. Faces are numbered from 1; 0 is the sample of an image.
    for number, (box, crop) in enumerate(inside if each else inside[:1], 1 if each else 0):
        row = {**common, "faces": len(boxes), "face": number, "face_score": box.score}
        row |= {**_sample_features(image, _visible_crop(crop, *image.size, recipe), recipe), "crop": list(crop)}
        # Once per image: `_known_boxes` reads them back from the first row.
        rows.append(row if rows else {**row, "boxes": all_boxes})
    no_face = {"boxes": all_boxes, "faces": 0, "face": 0, "face_score": 0.0}
    return rows or [{**common, **no_face, **_sample_features(image, None, recipe)}]


def _crop(box: Box, width: int, height: int, recipe: Recipe) -> tuple[int, int, int, int] | None:
    """The box with its margin as left, top, right, bottom in pixels; None if it is outside the image."""
    settings = recipe.crop
    clip = settings.outside == "shift"
    return codec.crop_pixels(box, width, height, settings.margin, square=settings.square, clip=clip)


def _sample_features(image: Image.Image, crop: tuple[int, int, int, int] | None, recipe: Recipe) -> dict[str, Any]:
    """Features of the pixels that will be packed: the crop, or the whole image."""
    sample = image if crop is None else image.crop(crop)
    computed = compute_features(sample)
    copies = recipe.duplicates.copies if recipe.duplicates.near else "off"
    whole = compute_features(image) if copies != "off" and crop is not None else None
    kind = recipe.duplicates.other_hash
    hashes = _hashes(kind, sample) if kind else (None, None)
    whole_hashes = _hashes(kind, image) if kind and whole else (None, None)
    return {
        "points": local_features.extract(sample).tobytes() if copies == "local" else None,
        "windows": window_phashes(sample.convert("L")).astype("<u8").tobytes() if copies == "hash" else None,
        "whole_phash": whole and whole.phash,
        "whole_phash_flip": whole and whole.phash_flip,
        "whole_thumbnail": whole and whole.thumbnail,
        "hash_kind": kind or None,
        "hash": hashes[0],
        "hash_flip": hashes[1],
        "whole_hash": whole_hashes[0],
        "whole_hash_flip": whole_hashes[1],
        "crop": None if crop is None else list(crop),
        "phash": computed.phash,
        "phash_flip": computed.phash_flip,
        "thumbnail": computed.thumbnail,
        **computed.figures._asdict(),
    }


def _hashes(kind: str, image: Image.Image) -> tuple[bytes, bytes]:
    """The hashes of an image and of its mirror image by another algorithm than pHash."""
    return other_hashes.compute(kind, image), other_hashes.compute(kind, ImageOps.mirror(image))


def _visible_crop(
    crop: tuple[int, int, int, int], width: int, height: int, recipe: Recipe
) -> tuple[int, int, int, int]:
    """The crop to compute features of: padded if the recipe pads, else clipped to the image."""
    crop_width, crop_height = crop[2] - crop[0], crop[3] - crop[1]
    # Curate drops a crop over these limits; padding it first could take any amount of memory.
    fits = (
        max(crop_width, crop_height) <= recipe.filter.max_side and crop_width * crop_height <= recipe.filter.max_pixels
    )
    if recipe.crop.outside == "pad" and fits:
        return crop
    return max(0, crop[0]), max(0, crop[1]), min(width, crop[2]), min(height, crop[3])


def detections(recipe: Recipe, inputs: Mapping[str, str]) -> str:
    """Digest of what boxes depend on: images, decoder and detector, but not margins and minimums."""
    crop = recipe.crop
    identity = detectors.identity(crop.detector, crop.detector_options)
    values = [CODE, _limits(recipe), dict(inputs), crop.detector, crop.detector_options, identity]
    return params_digest([*values, crop.agreement] if isinstance(crop.detector, list) else values)


def _limits(recipe: Recipe) -> dict[str, int]:
    return {"max_side": recipe.filter.max_side, "max_pixels": recipe.filter.max_pixels}


def params(recipe: Recipe, decided: Mapping[str, Sequence[float]]) -> str:
    """Digest of the values that this stage depends on: the recipe's, and a curator's boxes of the part's images."""
    rules = {"min_score", "unsure_score", "unsure", "min_side", "min_share"}
    crop = recipe.crop.model_dump(mode="json", exclude=rules)
    identity = detectors.identity(recipe.crop.detector, recipe.crop.detector_options)
    values = {"limits": _limits(recipe), "crop": crop, "trim": recipe.quality.trim, "detector": identity}
    if decided:
        values["decided"] = {key: list(box) for key, box in decided.items()}
    if recipe.duplicates.near and recipe.duplicates.copies != "off":
        values |= {"copies": recipe.duplicates.copies, "points": local_features.version()}
    if kind := recipe.duplicates.other_hash:
        values |= {"hash": kind, "library": other_hashes.library(kind)}
    return params_digest(values)


def _keys(workspace: Workspace, part: int) -> tuple[str, ...]:
    """Keys of the part's images that have bytes."""
    raw = parquet.read(workspace.path(f"raw/part-{part:05d}.parquet"), RAW, ("key", "reason"))
    return tuple(raw.filter(pc.equal(raw["reason"], ""))["key"].to_pylist())


def run(
    workspace: Workspace, recipe: Recipe, executor: Executor, parts: int, advance: Callable[[int], None]
) -> list[Receipt]:
    """Inspect every part that has no valid receipt; returns all receipts by part."""
    jobs = []
    units = [f"inspect/part-{part:05d}" for part in range(parts)]
    undecided = params(recipe, {})  # most parts have no decisions, and a detector is known by the digest of its file
    for part, unit in enumerate(units):
        fetched = workspace.receipt(f"fetch/part-{part:05d}")
        assert fetched is not None
        inputs = {name: known["sha256"] for name, known in fetched.outputs.items()}
        of_part = decided_boxes(recipe, _keys(workspace, part)) if recipe.curate.decisions.box else {}
        digest = params(recipe, of_part) if of_part else undecided
        if workspace.done(unit, CODE, digest, inputs):
            advance(fetched.facts["items"])
        else:
            earlier = workspace.receipt(unit)
            keys = _keys(workspace, part)
            # A change of margins or minimums invalidates the features but not the boxes among them.
            known = (
                earlier is not None
                and earlier.facts.get("detections") == detections(recipe, inputs)
                and workspace.intact(earlier)
            )
            jobs.append(InspectJob(workspace, recipe, part, inputs, keys, known=known))
    workspace.forget("inspect", set(units))
    executor.run(jobs, lambda job, facts: advance(facts["items"]))
    receipts = [workspace.receipt(unit) for unit in units]
    return [receipt for receipt in receipts if receipt is not None]
