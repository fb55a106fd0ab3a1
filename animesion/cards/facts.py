"""Facts of a dataset card that are counted from `curated.parquet`: provenance of the kept images and leaks."""

from __future__ import annotations

from collections import Counter
from typing import Any

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
    kept = curated.filter(curated["kept"])
    return {"provenance": [_source(kept, kind) for kind in sorted(set(kept["source"].to_pylist()))],
            "leak_check": _leaks(kept)}  # fmt: skip


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
        "without_url": len(rows) - _counts(rows["file_url"]).total(),
        "ratings": dict(sorted(_counts(rows["rating"]).items())),
        "terms": _terms(kind),
    }


def _counts(column: pa.ChunkedArray) -> Counter[str]:
    """Counts of non-empty values, the most frequent first, then by name."""
    found = Counter(text for text in column.to_pylist() if text)
    return Counter(dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))))


def _terms(kind: str) -> str:
    """URL of a crawled site's terms for crawlers; empty for other sources."""
    from animesion_scrapers import sites

    return sites.load(kind).info.terms if kind in sites.names() else ""


def _leaks(kept: pa.Table) -> dict[str, int]:
    """Number of values in more than one split, for each entry of `SHARED`."""
    splits = kept["split"].to_pylist()
    columns = {name: kept[name].to_pylist() for name in (*SHARED.values(), "crop")}
    found = {}
    for what, name in SHARED.items():
        seen: dict[Any, set[str]] = {}
        for value, crop, split in zip(columns[name], columns["crop"], splits, strict=True):
            if value:
                # crops of one image are different samples; "same group" covers them
                key = (value, tuple(crop or ())) if name == "pixels_blake3" else value
                seen.setdefault(key, set()).add(split)
        found[what] = sum(len(each) > 1 for each in seen.values())
    return found
