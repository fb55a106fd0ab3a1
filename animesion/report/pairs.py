"""Pairs of images that the search for copies found, side by side, in one frame, with the difference lit.

The verdicts are those of `features/pairs.parquet`, and a curator's own. A pair is laid over each other by the transform
that was found, and the tones of the second image are those of the first, so that only what counts is left.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from animesion.config.decisions import image_id
from animesion.dataset.dataset import Dataset
from animesion.dedup import search
from animesion.errors import UsageError
from animesion.images import codec
from animesion.report.images import drawn_id
from animesion.schemas import PAIRS, DropReason
from animesion.storage import parquet

if TYPE_CHECKING:
    from animesion.dedup.residual import Aligned
    from animesion.report.images import Images, Rows

#: Kinds of pairs in the order of the page, and how many of each a file shows; `animesion browse` shows all.
KINDS = {"conflict": 30, "copy": 40, "alternate": 40, "part": 10}

#: Longest side of an image of a pair, in pixels: in a file, and served by `animesion browse`.
SIDE, SERVED_SIDE = 96, 256

#: Pixels between the images of a strip.
_GAP = 4

#: Area of the square that images are reduced to before they are compared, as in a build; see `dedup.compare`.
_REDUCED = 320

#: Levels beyond the noise at which a difference is lit in full, and how much light the smallest change has.
_FULL, _LEAST = 64.0, 0.45
_LIT, _OUTSIDE = (255.0, 96.0, 0.0), (110.0, 110.0, 128.0)

#: Largest and smallest enlargement of a transform that is drawn, beyond those that a search finds.
_LARGEST, _SMALLEST = 8.0, 0.05

_QUALITY = 60
_EQUAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_DUPLICATES = frozenset(
    {DropReason.LABEL_CONFLICT, DropReason.EXACT_DUPLICATE, DropReason.PIXEL_DUPLICATE, DropReason.NEAR_DUPLICATE,
     DropReason.DUPLICATE_BY_DECISION}
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A pair and the verdict on it.

    Attributes:
        first: index of the first image in `Images.rows`.
        second: index of the second image.
        kind: one of `KINDS`.
        verdict: what was found: a verdict, `equal bytes` or `equal pixels`.
        decided: what a curator decided before the build; empty for nothing.
        whole: whether the whole images were compared, not the samples.
        mirrored: whether the second image is mirrored.
        inliers: local features that agree.
        residual: largest difference beyond the noise, in levels.
        how: what was done to the second image.
        transform: see `animesion.dedup.residual.shares`.
    """

    first: int
    second: int
    kind: str
    verdict: str
    decided: str
    whole: bool = False
    mirrored: bool = False
    inliers: int = 0
    residual: float = 0.0
    how: str = ""
    transform: Sequence[float] = _EQUAL


class Pairs:
    """The pairs of a build, by kind.

    Args:
        images: the images of the build.

    Raises:
        UsageError: the table of pairs is damaged.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        recipe = images.dataset.recipe
        self._faces = recipe.crop.detector != "none" and recipe.crop.faces == "each"
        self._decided = {frozenset(each.images): each.verdict for each in recipe.curate.decisions.pairs}
        #: Pairs with an image of a published dataset, which are not shown.
        self.published = 0
        every = [*_equal_pairs(images.rows, faces=self._faces), *self._compared(images.dataset)]
        by_kind: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
        for pair in every:
            by_kind[pair.kind].append(pair)
        # the doubtful ones first: copies that differ most, alternates that differ least
        by_kind["copy"].sort(key=lambda pair: -pair.residual)
        by_kind["alternate"].sort(key=lambda pair: pair.residual)
        by_kind["part"].sort(key=lambda pair: pair.inliers)
        self.every = [pair for pairs in by_kind.values() for pair in pairs]

    def ids(self, i: int) -> str:
        """What a decision names the image of a row by."""
        rows = self.images.rows
        return image_id(rows.value("sha256", i), rows.value("crop", i) if self._faces else None)

    @functools.cached_property
    def of_kind(self) -> dict[str, list[int]]:
        """Positions in `every` of each kind."""
        found: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for i, pair in enumerate(self.every):
            found[pair.kind].append(i)
        return found

    def _compared(self, dataset: Dataset) -> Iterator[Pair]:
        """The pairs whose pixels a build compared; none if it did not, or if the table is not there."""
        path = dataset.path / "features" / "pairs.parquet"
        duplicates = dataset.recipe.duplicates
        if duplicates.copies == "off" or not duplicates.near or not path.is_file():
            return
        try:
            rows = parquet.read(path, PAIRS).to_pylist()
        except UsageError:
            raise UsageError(f"{path} is damaged: delete it, or run `animesion build` again") from None
        for row in rows:
            first, second = (self.images.places.get(row[name]) for name in ("first", "second"))
            if first is None or second is None or first == second:
                self.published += 1
                continue
            pair = self._pair(first, second, row)
            if pair is not None:
                yield pair

    def _pair(self, first: int, second: int, row: Mapping[str, Any]) -> Pair | None:
        decided = self._decided.get(frozenset({self.ids(first), self.ids(second)}), "")
        now = decided if decided in ("copy", "alternate") else row["verdict"]
        kind = {"copy with overlay": "copy"}.get(now, now)
        if kind not in KINDS or any(row[name] is None for name in row) or not _is_drawable(row):
            return None
        labels = {self.images.rows.value("label", i) for i in (first, second)}
        if kind == "copy" and len(labels) > 1:
            kind = "conflict"
        values = {name: row[name] for name in ("whole", "mirrored", "inliers", "residual", "how", "transform")}
        return Pair(first, second, kind, row["verdict"], decided, **values)

    def strip(self, pair: Pair, side: int) -> bytes | None:
        """The two images of a pair and their difference, side by side, as WebP; None if one cannot be read.

        Args:
            pair: the pair.
            side: longest side of each of the three, in pixels.
        """
        rows = [self.images.rows[i] for i in (pair.first, pair.second)]
        name = drawn_id(rows, pair.whole, pair.mirrored, list(pair.transform), side)
        return self.images.once(name, lambda: self._strip(pair, rows, side))

    def _strip(self, pair: Pair, rows: Sequence[Mapping[str, Any]], side: int) -> bytes | None:
        from animesion.dedup import residual

        both = [self._image(row, whole=pair.whole) for row in rows]
        if both[0] is None or both[1] is None:
            return None
        first, second = (residual.reduced(each, _REDUCED) for each in both if each is not None)
        aligned = residual.laid(first, second, pair.transform, mirrored=pair.mirrored)
        panels = [Image.fromarray(each) for each in _panels(aligned)]
        scale = side / max(panels[0].size)
        width, height = (max(1, round(scale * each)) for each in panels[0].size)
        whole = Image.new("RGB", (3 * width + 2 * _GAP, height), (255, 255, 255))
        for i, panel in enumerate(panels):
            whole.paste(panel.resize((width, height), Image.Resampling.BICUBIC), (i * (width + _GAP), 0))
        out = io.BytesIO()
        whole.save(out, "WEBP", quality=_QUALITY, method=4)
        return out.getvalue()

    def _image(self, row: Mapping[str, Any], *, whole: bool) -> Image.Image | None:
        """The sample as it was compared, or the whole image; a packed image if that has the shape of the sample."""
        left, top, right, bottom = row["crop"]
        width, height = right - left, bottom - top
        limits = codec.Limits()
        if not (0 < width <= limits.max_side and 0 < height <= limits.max_side and width * height <= limits.max_pixels):
            return None
        image = self.images.original(row)
        if image is not None:
            return image if whole or (left, top, width, height) == (0, 0, *image.size) else image.crop(row["crop"])
        if whole or not row["kept"]:
            return None
        try:
            packed = self.images.dataset[row["key"]].decode()
        except (KeyError, UsageError):
            return None
        # an image that was padded has no place for a transform in shares of the sample
        return packed if abs(packed.width * height - packed.height * width) <= 0.02 * packed.width * height else None


def _equal_pairs(rows: Rows, *, faces: bool) -> Iterator[Pair]:
    """Pairs with equal bytes or pixels under two labels; of each label, the first image.

    Args:
        rows: `Images.rows`.
        faces: whether each face of an image is a sample.
    """
    chosen = rows.numbers("kept").copy()
    for reason in _DUPLICATES:
        chosen |= rows.equal("reason", reason)
    repeated = np.unique(search.equal_pairs(rows.column("pixels_blake3"), np.flatnonzero(chosen)))
    firsts: dict[str, dict[str, int]] = {}
    for i in repeated.tolist():
        sample = image_id(rows.value("pixels_blake3", i), rows.value("crop", i) if faces else None)
        firsts.setdefault(sample, {}).setdefault(rows.value("label", i), i)
    for of_label in firsts.values():
        first, *others = of_label.values()
        for other in others:
            same = rows.value("sha256", first) == rows.value("sha256", other)
            yield Pair(first, other, "conflict", "equal bytes" if same else "equal pixels", "")


def _is_drawable(row: Mapping[str, Any]) -> bool:
    """Whether a transform and a difference are such as a search may have found: `features/` is untrusted."""
    values = np.array(row["transform"], dtype=np.float64)
    if not np.isfinite([*values, row["residual"]]).all() or np.abs(values).max() > _LARGEST:
        return False
    return bool(_SMALLEST**2 < abs(values[0] * values[4] - values[1] * values[3]) < _LARGEST**2)


def _panels(aligned: Aligned) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """The first image, the second one in its frame, and the difference, each of shape (h, w, 3)."""
    from animesion.dedup import residual

    first, second, inside = aligned.first, aligned.second, aligned.inside[..., None]
    grey = first.mean(axis=2, keepdims=True)
    excess = residual.beyond_noise(aligned) if aligned.inside.any() else np.zeros(first.shape[:2], dtype=np.float32)
    light = np.where(excess > residual.LEVELS, _LEAST + (1 - _LEAST) * np.minimum(excess / _FULL, 1), 0)[..., None]
    ground = 0.4 * grey + 30
    lit = light * np.array(_LIT) + (1 - light) * ground
    outside = np.array(_OUTSIDE)
    for panel in (first, np.where(inside, second, outside), np.where(inside, lit, outside)):
        yield np.clip(np.rint(panel), 0, 255).astype(np.uint8)
