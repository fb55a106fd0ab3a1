"""Facts of a dataset card that are counted from `curated.parquet`: provenance of the kept images and leaks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_LISTED = 10

#: What two samples may share -> column. Samples that share it must be in the same split.
SHARED = {
    "same group": "group",
    "same duplicate cluster": "cluster",
    "equal original bytes": "sha256",
    "equal original pixels and crop": "pixels_blake3",
}


def counted(curated: pa.Table) -> dict[str, Any]:
    """Count where kept images come from, and what is shared across splits.

    Args:
        curated: table with schema `animesion.schemas.CURATED`.

    Returns:
        `provenance` and `leak_check` of `dataset.json`, JSON-ready.
    """
    columns = ["kept", "source", "licence", "author", "file_url", "rating", "split", "crop", *SHARED.values()]
    kept = curated.select(columns).filter(curated["kept"])
    kinds = sorted(pc.unique(kept["source"]).to_pylist())
    return {"provenance": [_source(kept, kind) for kind in kinds], "leak_check": _leaks(kept)}


def _source(kept: pa.Table, kind: str) -> dict[str, Any]:
    rows = kept.filter(pc.equal(kept["source"], kind))
    licences = _counts(rows["licence"])
    authors = _counts(rows["author"])
    return {
        "source": kind,
        "images": len(rows),
        "licences": dict(licences.most_common(_LISTED)),
        "other_licences": sum(count for _, count in licences.most_common()[_LISTED:]),
        "without_licence": len(rows) - licences.total(),
        "authors": len(authors),
        "without_author": len(rows) - authors.total(),
        "without_url": pc.sum(pc.equal(pc.fill_null(rows["file_url"], ""), "")).as_py() or 0,
        "ratings": dict(sorted(_counts(rows["rating"]).items())),
        "terms": _terms(kind),
    }


def _counts(column: pa.ChunkedArray) -> Counter[str]:
    """Counts of non-empty values, the most frequent first, then by name."""
    found = [(each["values"], each["counts"]) for each in pc.value_counts(column).to_pylist() if each["values"]]
    return Counter(dict(sorted(found, key=lambda pair: (-pair[1], pair[0]))))


def _terms(kind: str) -> str:
    """URL of a crawled site's terms for crawlers; empty for other sources."""
    from animesion_scrapers import sites

    return sites.load(kind).info.terms if kind in sites.names() else ""


def _leaks(kept: pa.Table) -> dict[str, int]:
    """Number of values in more than one split, for each entry of `SHARED`."""
    split = _codes(kept["split"])
    found = {}
    for what, name in SHARED.items():
        codes = _codes(kept[name])
        if name == "pixels_blake3":
            # crops of one image are different samples; "same group" covers them
            crop = kept["crop"].combine_chunks()
            sides = crop.values.fill_null(0).to_numpy().astype(np.int64).reshape(-1, 4)
            sides = np.where(crop.is_valid().to_numpy(zero_copy_only=False)[:, None], sides, 0)
            for side in (sides - sides.min(axis=0, initial=0)).T:
                codes = np.unique(codes * (int(side.max(initial=0)) + 1) + side, return_inverse=True)[1]
        there = pc.not_equal(pc.fill_null(kept[name], ""), "").to_numpy()
        splits = int(split.max(initial=0)) + 1
        values = np.unique(codes[there] * splits + split[there]) // splits
        found[what] = int((np.bincount(values) > 1).sum())
    return found


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A number for each value, equal for equal values."""
    codes = column.combine_chunks().dictionary_encode().indices
    found: npt.NDArray[np.int64] = codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    return found
