"""Join the raw and feature tables of all parts into the columns that curate decides on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.schemas import FEATURES, RAW, sample_key
from animesion.storage import parquet
from animesion.storage.workspace import Workspace

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: Features of an image that was not fetched or does not decode.
_NO_FEATURES: dict[str, Any] = {
    "reason": "",
    "detail": "",
    "width": 0,
    "height": 0,
    "plain": False,
    "pixels_blake3": "",
    "phash": 0,
    "phash_flip": 0,
    "faces": -1,
    "face": 0,
    "face_score": 0.0,
}


#: Columns that pass through as Arrow arrays, and columns that are not loaded.
_PASSED_THROUGH = {"page_url", "file_url", "licence", "author", "rating", "md5", "plain", "part", "offset", "thumbnail"}
_NOT_LOADED = {"boxes", "flags", "format", "mode"}
_ON_REQUEST = {
    *("points", "windows", "whole_phash", "whole_phash_flip", "whole_thumbnail"),
    *("hash_kind", "hash", "hash_flip", "whole_hash", "whole_hash_flip"),
}


def load_columns(workspace: Workspace, parts: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """Raw and feature tables of all parts, joined on the key and sorted by it, as columns by name.

    `box_count`, `best_score` and `second_score` are about the image's boxes, of the detector or of the source's table;
    `has_table` tells whether the source has one. Columns that rules read are plain lists. The others, and thumbnails,
    stay Arrow arrays: as lists they take gigabytes at a million images.

    Args:
        workspace: output folder whose inspect stage is done.
        parts: number of parts.
        more: features to load in addition, as Arrow arrays: those of local features take 3 KB per image.
    """
    left_out = _ON_REQUEST.difference(more)
    names = [name for name in FEATURES.names if name not in left_out]
    raws, features = [], []
    for part in range(parts):
        raw = parquet.read(workspace.path(f"raw/part-{part:05d}.parquet"), RAW)
        raws.append(raw.append_column("part", pa.array([part] * len(raw), pa.int32())))
        features.append(parquet.read(workspace.path(f"features/part-{part:05d}.parquet"), FEATURES, names))
    left = pa.concat_tables(raws)
    left = left.take(pc.sort_indices(left, sort_keys=[("key", "ascending")]))
    right = pa.concat_tables(features)
    feature_rows: dict[str, list[int | None]] = {}
    for row, key in enumerate(right["key"].to_pylist()):
        feature_rows.setdefault(key, []).append(row)
    keys, faces = left["key"].to_pylist(), right["face"].to_pylist()
    taken = set(keys)
    # (sample key, row of `left`, row of `right` or None): an image whose faces are samples has one entry per face.
    joined: list[tuple[str, int, int | None]] = []
    for i, key in enumerate(keys):
        for j in feature_rows.get(key, [None]):
            face = faces[j] if j is not None else 0
            joined.append((_face_key(key, face, taken), i, j))
    joined.sort(key=lambda entry: entry[0])
    left = left.take(pa.array([i for _, i, _ in joined], pa.int64()))
    # A null row number takes a row of nulls, which `_NO_FEATURES` fills below.
    right = right.take(pa.array([j for _, _, j in joined], pa.int64()))
    left = left.set_column(left.column_names.index("key"), "key", pa.array([key for key, _, _ in joined], pa.string()))
    del raws, features  # the copies in `left` and `right` are all that is needed
    columns: dict[str, Any] = {
        name: left[name] if name in _PASSED_THROUGH else left[name].to_pylist()
        for name in left.column_names
        if name not in _NOT_LOADED
    }
    for name in names:
        if name == "key" or name in _NOT_LOADED:
            continue
        target = {"reason": "seen_reason", "detail": "seen_detail"}.get(name, name)
        values = right[name].fill_null(_NO_FEATURES[name]) if name in _NO_FEATURES else right[name]
        if name in ("phash", "phash_flip"):
            columns[target] = values.to_numpy()
        else:
            columns[target] = values if name in _PASSED_THROUGH | _ON_REQUEST else values.to_pylist()
    columns["has_table"] = left["boxes"].is_valid().to_pylist()
    # the detector's boxes, or those of the table that decided before the image was fetched
    detected, listed = _best_scores(right["boxes"]), _best_scores(left["boxes"])
    missing = right["boxes"].is_null().to_numpy()
    for name, values, others in zip(("box_count", "best_score", "second_score"), detected, listed, strict=True):
        columns[name] = np.where(missing, others, values).tolist()
    return columns


def _best_scores(boxes: pa.ChunkedArray) -> tuple[IntArray, FloatArray, FloatArray]:
    """The number of each row's boxes, and the best and the second-best of their scores; 0 where there is none."""
    column = boxes.combine_chunks()
    scores = column.flatten().field("score").to_numpy(zero_copy_only=False)
    counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    best, second = np.zeros(len(column)), np.zeros(len(column))
    ends = np.cumsum(counts)
    for i in np.flatnonzero(counts).tolist():
        ranked = np.sort(scores[ends[i] - counts[i] : ends[i]])[::-1]
        best[i], second[i] = ranked[0], ranked[1] if counts[i] > 1 else 0.0
    return counts, best, second


def _face_key(key: str, face: int | None, taken: set[str]) -> str:
    """The key of a face sample: image key, `-face` and a number, with `_` appended while an image has that key."""
    candidate = sample_key(key, face)
    while face and candidate in taken:
        candidate += "_"
    return candidate
