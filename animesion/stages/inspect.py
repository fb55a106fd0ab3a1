"""Stage 2: one decode of every picture gives all that is ever asked of its pixels: `features/part-*.parquet`.

A picture that kills the worker is found by the engine's bisection and recorded as `crashed decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL
import pyarrow.compute as pc

from animesion import detectors, digests, images, tables
from animesion.engine import Engine
from animesion.recipe import Recipe
from animesion.records import FEATURES, RAW, Box
from animesion.settings import params_digest
from animesion.workspace import Receipt, Workspace

#: The decoder's version is part of the code: another one may give other pixels.
CODE = f"inspect-2/pillow-{PIL.__version__}"

_COLUMNS = ("key", "reason", "offset", "bytes", "boxes")


@dataclass(frozen=True)
class InspectJob:
    """Inspect one part.

    Attributes:
        crashed: keys that are known to kill the decoder.
        only: when not None, decode just these keys and write nothing.
    """

    workspace: Workspace
    recipe: Recipe
    part: int
    inputs: dict[str, str]
    keys: tuple[str, ...] = ()
    crashed: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

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
        raw = tables.read(self.workspace.path(f"raw/part-{self.part:05d}.parquet"), RAW, _COLUMNS)
        detector = detectors.load(self.recipe.crop.detector, self.recipe.crop.detector_options)
        rows: list[dict[str, Any]] = []
        with self.workspace.path(f"raw/part-{self.part:05d}.tar").open("rb") as tar:
            for row in raw.filter(pc.equal(raw["reason"], "")).to_pylist():
                key = row["key"]
                if self.only is not None and key not in self.only:
                    continue
                if key in self.crashed:
                    rows.append({"key": key, "reason": "crashed decoder", "detail": "the worker process died"})
                    continue
                tar.seek(row["offset"])
                boxes = None if row["boxes"] is None else [Box(**box) for box in row["boxes"]]
                rows.append({"key": key, **features(tar.read(row["bytes"]), boxes, detector, self.recipe)})
        if self.only is None:
            name = f"features/part-{self.part:05d}.parquet"
            outputs = {name: tables.write(self.workspace.path(name), tables.table(rows, FEATURES))}
            self.workspace.commit(
                self.name, CODE, params(self.recipe), self.inputs, outputs, {"crashed": list(self.crashed)}
            )
        return {"items": len(raw)}


def features(
    content: bytes, given: Sequence[Box] | None, detector: detectors.Detector, recipe: Recipe
) -> dict[str, Any]:
    """All features of one picture, or the reason why it has none.

    Args:
        content: bytes of the file.
        given: boxes of the source's table, None without a table.
        detector: finds the boxes.
        recipe: its `crop` and `filter` sections matter.

    Returns:
        Fields of `animesion.records.FEATURES` besides the key.
    """
    limits = images.Limits(recipe.filter.max_side, recipe.filter.max_pixels)
    try:
        picture = images.decode(content, limits)
    except images.RejectedImageError as error:
        return {"reason": error.reason, "detail": error.detail}
    image = picture.image
    [boxes] = detector([image], [given])
    crop = None
    if recipe.crop.detector != "none" and boxes:
        best = max(boxes, key=lambda box: box.score)
        crop = images.crop_pixels(best, *image.size, recipe.crop.margin, square=recipe.crop.square)
    phash, phash_flip = digests.phashes(image if crop is None else image.crop(crop))
    return {
        "reason": "",
        "detail": "",
        "format": picture.format,
        "mode": picture.mode,
        "width": image.width,
        "height": image.height,
        "plain": picture.plain,
        "pixels_sha256": digests.of_pixels(image).hex(),
        # a box that lies outside the picture is no face
        "faces": -1 if recipe.crop.detector == "none" else len(boxes) if crop or not boxes else 0,
        "face_score": max((box.score for box in boxes), default=0.0),
        "crop": None if crop is None else list(crop),
        "phash": phash,
        "phash_flip": phash_flip,
        "thumbnail": digests.thumbnail(image, crop),
    }


def params(recipe: Recipe) -> str:
    """Digest of what the stage takes from the recipe."""
    values = recipe.model_dump(mode="json", include={"filter", "crop"})
    limits = {name: values["filter"][name] for name in ("max_side", "max_pixels")}
    identity = detectors.identity(recipe.crop.detector, recipe.crop.detector_options)
    return params_digest({"limits": limits, "crop": values["crop"], "detector": identity})


def run(
    workspace: Workspace, recipe: Recipe, engine: Engine, parts: int, advance: Callable[[int], None]
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
            raw = tables.read(workspace.path(f"raw/part-{part:05d}.parquet"), RAW, ("key", "reason"))
            keys = tuple(raw.filter(pc.equal(raw["reason"], ""))["key"].to_pylist())
            jobs.append(InspectJob(workspace, recipe, part, inputs, keys))
    workspace.forget("inspect", set(units))
    engine.run(jobs, lambda job, facts: advance(facts["items"]))
    receipts = [workspace.receipt(unit) for unit in units]
    return [receipt for receipt in receipts if receipt is not None]
