"""What `animesion browse` shows of a build: filters of its images, and their places on a map.

The map puts images that look alike near one another: the first two principal components of the embeddings of a build
that has them, else of the 16 px thumbnails that every build stores.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import tomli_w
from pydantic import Field, StringConstraints

from animesion import schemas
from animesion.config import settings
from animesion.config.settings import Section
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.report.images import Rows
from animesion.storage import parquet
from animesion.storage.workspace import write_atomic

#: Most corners of an area of the map, and most characters of a text to search for.
CORNERS, MOST_TEXT = 400, 500

#: Images by which the axes of the map are chosen.
_FITTED = 10_000

#: Share of the images at either end of an axis that are drawn at the edge of the map.
_OUTER = 0.005

#: Share of the map between its edge and the outermost images.
_MARGIN = 0.015

_DECIDED = ("", "yes", "no")


@dataclass(frozen=True)
class Filter:
    """Which images are shown; an empty value accepts all, but for `status`.

    Attributes:
        status: `dropped`, a drop reason, `all`, or empty for those that are kept.
        split: name of a split.
        label: a label, in full.
        text: part of a key, a label or a source id, in any case.
        decided: `yes` for images with a decision, `no` for those without.
        area: corners of a polygon on the map, in shares of its width and height.
    """

    status: str = ""
    split: str = ""
    label: str = ""
    text: str = ""
    decided: str = ""
    area: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Self:
        """Read a filter from the parameters of an address; others than the attributes are left alone.

        Args:
            query: by name; an area is written `x,y x,y x,y`.

        Raises:
            ValueError: an area that is no polygon, an unknown value of `decided`, or a text that is too long.
        """
        values = {name: query.get(name, "") for name in ("status", "split", "label", "text", "decided")}
        if values["decided"] not in _DECIDED:
            raise ValueError("decided is 'yes', 'no' or empty")
        if len(values["text"]) > MOST_TEXT:
            raise ValueError(f"a text to search for has at most {MOST_TEXT} characters")
        return cls(**values, area=_corners(query.get("area", "")))


class Places:
    """The places of a build's images on the map.

    Attributes:
        kind: what they come from: `embeddings`, `thumbnails`, or empty if the build has no `features/`.
        at: x and y of each row, in shares of the map from 0 to 1, shape (rows, 2); NaN for an image without a place.
    """

    def __init__(self, dataset: Dataset, rows: Rows) -> None:
        """Compute the places.

        Args:
            dataset: the build.
            rows: `Images.rows` of the build.

        Raises:
            UsageError: a table of `features/` is damaged.
        """
        folder = dataset.path / "features"
        self.at = np.full((len(rows), 2), np.nan, dtype=np.float32)
        paths = sorted(folder.glob("part-*.parquet"))
        embedded = [path.with_name(f"embeddings-{path.name}") for path in paths]
        wanted = bool(dataset.recipe.duplicates.embedding.model) and all(path.is_file() for path in embedded)
        self.kind = ("embeddings" if wanted else "thumbnails") if paths else ""
        read = functools.partial(_vectors, embedded if wanted else paths, rows.column("key"), embedded=wanted)
        every = -(-len(rows) // _FITTED) or 1
        some = [vectors[::every] for _, vectors in read() if len(vectors)]
        if not some:
            self.kind = ""
            return
        mean, axes = _principal(np.concatenate(some).astype(np.float32))
        for found, vectors in read():
            self.at[found] = (vectors.astype(np.float32) - mean) @ axes
        seen = np.isfinite(self.at[:, 0])
        low, high = np.quantile(self.at[seen], [_OUTER, 1 - _OUTER], axis=0)
        scaled = (self.at - low) / np.maximum(high - low, 1e-12) * (1 - 4 * _MARGIN) + 2 * _MARGIN
        self.at = np.clip(scaled, _MARGIN, 1 - _MARGIN).astype(np.float32)


def matching(
    rows: Rows, chosen: Filter, decided: Collection[str], at: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.int64]:
    """Indices of the rows that a filter accepts, ascending.

    Args:
        rows: `Images.rows` of the build.
        chosen: the filter.
        decided: keys with a decision.
        at: `Places.at`; only a filter with an area needs it.
    """
    found = np.ones(len(rows), dtype=np.bool_)
    kept = rows.numbers("kept")
    if not chosen.status:
        found &= kept
    elif chosen.status == "dropped":
        found &= ~kept
    elif chosen.status != "all":
        found &= ~kept & rows.equal("reason", chosen.status)
    if chosen.split:
        found &= rows.equal("split", chosen.split)
    if chosen.label:
        found &= rows.equal("label", chosen.label)
    if chosen.text:
        labels = rows.column("label")
        inside = _contains(labels.dictionary, chosen.text)[labels.indices.to_numpy()]
        found &= inside | _contains(rows.column("key"), chosen.text) | _contains(rows.column("source_id"), chosen.text)
    if chosen.decided:
        named = pc.is_in(rows.column("key"), value_set=pa.array(sorted(decided), pa.string()))
        found &= named.to_numpy(zero_copy_only=False) == (chosen.decided == "yes")
    if chosen.area and at is not None:
        found &= inside_polygon(at, chosen.area)
    return np.flatnonzero(found)


def inside_polygon(points: npt.NDArray[np.float32], corners: Collection[tuple[float, float]]) -> npt.NDArray[np.bool_]:
    """Which points are inside a polygon, by the even-odd rule.

    Args:
        points: x and y, shape (n, 2); NaN is outside.
        corners: of the polygon, in order.
    """
    found = np.zeros(len(points), dtype=np.bool_)
    x, y = points[:, 0], points[:, 1]
    ends = np.array(list(corners), dtype=np.float64)
    for (x1, y1), (x2, y2) in zip(ends, np.roll(ends, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        crosses = (y1 > y) != (y2 > y)
        found ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return found


Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=100)]
Address = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=20_000)]


class SavedFilters(Section):
    """Filters by the names that a curator gave them.

    Attributes:
        filters: the parameters of each, as in the address of the page.
    """

    filters: dict[Name, Address] = Field({}, max_length=1000)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file; none if it does not exist.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return cls()
        except UnicodeDecodeError:
            raise UsageError(f"the filters {path} are not UTF-8 text") from None
        except OSError as error:
            raise UsageError(f"cannot read the filters {path}: {error.strerror}") from None
        return settings.check(cls, settings.parse_toml(text, f"the filters {path}"), f"filters {path}")

    def write(self, path: Path) -> None:
        """Write the file."""
        write_atomic(path, tomli_w.dumps({"filters": dict(sorted(self.filters.items()))}).encode())


def _corners(text: str) -> tuple[tuple[float, float], ...]:
    """Corners of an area from `x,y x,y x,y`."""
    if not text:
        return ()
    pairs = [each.split(",") for each in text.split(" ")]
    if not 3 <= len(pairs) <= CORNERS or any(len(pair) != 2 or max(map(len, pair)) > 20 for pair in pairs):
        raise ValueError(f"an area has 3 to {CORNERS} corners: x,y x,y x,y")
    try:
        corners = tuple((float(x), float(y)) for x, y in pairs)
    except ValueError:
        raise ValueError("the corners of an area are numbers: x,y x,y x,y") from None
    if not np.isfinite(corners).all() or np.abs(corners).max() > 2:
        raise ValueError("the corners of an area are shares of the map")
    return corners


def _contains(texts: pa.Array, part: str) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = pc.match_substring(texts, part, ignore_case=True).to_numpy(zero_copy_only=False)
    return found


def _vectors(
    paths: Collection[Path], keys: pa.Array, *, embedded: bool
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Rows and vectors of the images, shape (n, d), of each part that are in `keys`."""
    for path in paths:
        if embedded:
            table = parquet.read(path, schemas.EMBEDDINGS)
            names, column = table["key"].combine_chunks(), table["embedding"].combine_chunks()
        else:
            table = parquet.read(path, schemas.FEATURES, ("key", "face", "thumbnail"))
            table = table.filter(pc.is_valid(table["thumbnail"]))
            faces = table["face"].to_pylist()
            names = pa.array(map(schemas.sample_key, table["key"].to_pylist(), faces), pa.string())
            column = table["thumbnail"].combine_chunks()
        rows = pc.index_in(names, value_set=keys)
        known = rows.is_valid()
        column = column.filter(known)
        if not len(column):
            continue
        if embedded:
            vectors: npt.NDArray[Any] = pc.list_flatten(column).to_numpy(zero_copy_only=False)
            if len(vectors) % len(column):
                raise parquet.damaged(path, "embedding")
        else:
            vectors = np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint8)
        yield rows.drop_null().to_numpy().astype(np.int64), vectors.reshape(len(column), -1)


def _principal(vectors: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean, shape (d,), and the two directions of most variance, shape (d, 2), each with its largest part positive."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    centred = vectors - mean
    _, directions = np.linalg.eigh(centred.T @ centred)
    axes = directions[:, :-3:-1]
    if axes.shape[1] < 2:  # vectors of one number
        axes = np.column_stack([axes, np.zeros(len(axes))])
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, [0, 1]] + 1e-300)
    return mean.astype(np.float32), axes.astype(np.float32)
