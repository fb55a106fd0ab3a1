"""Receipts of a build: what each one states, and the check of one that is read.

A folder may come from a stranger, so a receipt that is not of the form that its stage writes counts as none, and the
work is done again. In particular a receipt lists no other files than those of its unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from animesion.storage import names


@dataclass(frozen=True)
class Receipt:
    """Proof that a unit of work is done.

    Attributes:
        unit: name of the unit, such as `inspect/part-00000`.
        code: version of the code that did the work.
        params: digest of the parameters.
        inputs: digest of each input by name.
        outputs: path relative to the output folder -> `sha256`, `bytes` and `mtime_ns` of the file.
        facts: small JSON-ready results for later stages or the summary.
    """

    unit: str
    code: str
    params: str
    inputs: dict[str, str]
    outputs: dict[str, dict[str, Any]]
    facts: dict[str, Any]


#: A number of images, bytes or nanoseconds; NumPy and Arrow take no larger ones.
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Digest = Annotated[str, StringConstraints(pattern=rf"^{names.SHA256}$")]
_Path = Annotated[str, StringConstraints(pattern=rf"^{names.PATH}$", max_length=300)]


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class _Output(_Checked):
    sha256: _Digest
    bytes: _Count
    mtime_ns: Annotated[int, Field(ge=-(2**63), lt=2**63)]  # files may be from before 1970


class _Receipt(_Checked):
    model_config = ConfigDict(extra="forbid")

    unit: str
    code: str
    params: str
    inputs: dict[str, str]
    outputs: dict[_Path, _Output]
    facts: dict[str, Any]


class _PlanFacts(_Checked):
    parts: list[_Digest]
    items: _Count
    notes: list[str]
    parent: Annotated[str, StringConstraints(pattern=rf"^(?:{names.SHA256})?$")] = ""
    compact: bool = False
    tags: list[_Digest] = []


class _FetchFacts(_Checked):
    items: _Count
    fetched: _Count
    bytes: _Count
    failed: _Count = 0
    refused: _Count = 0


class _InspectFacts(_Checked):
    crashed: list[str]
    detections: str
    followed: list[_Digest]


class _CurateFacts(_Checked):
    images: _Count
    seen: _Count
    kept: _Count
    dropped: dict[str, _Count]
    splits: dict[str, _Count]
    classes: list[str]
    notes: list[str]
    strategy: str
    clusters: _Count
    conflicts: _Count


class _CompareFacts(_Checked):
    pairs: _Count
    compared: _Count
    searched: _Count
    notes: list[str]


class _TagsFacts(_Checked):
    summary: dict[str, Any]
    notes: list[str]


class _ShardFacts(_Checked):
    samples: _Count


class _IndexFacts(_Checked):
    shards: dict[Annotated[str, StringConstraints(pattern=rf"^{names.SHARD}$")], _Digest]


class _SentFacts(_Checked):
    version: str


#: What the receipts of a stage state, and the outputs that they list; `\1` is the rest of the unit's name.
_STAGES: dict[str, tuple[type[_Checked], str]] = {
    "plan": (_PlanFacts, r"(?:raw/part-\d{5,}\.(?:plan|tags)\.parquet )*"),
    "fetch": (_FetchFacts, r"raw/\1\.parquet raw/\1\.tar "),
    "inspect": (_InspectFacts, r"features/\1\.parquet "),
    "embed": (_Checked, r"features/embeddings-\1\.parquet "),
    "compare": (_CompareFacts, r"features/compared\.parquet features/pairs\.parquet features/searched\.parquet "),
    "curate": (_CurateFacts, r"curated\.parquet "),
    "tags": (_TagsFacts, r"dropped_tags\.csv sample_tags\.parquet tags\.csv "),
    "pack": (_Checked, r"pack/\1\.images pack/\1\.parquet "),
    "shards": (_ShardFacts, r"data/\1\.tar "),
    "index": (_IndexFacts, r"index\.parquet pack/encoded\.parquet "),
    "thumbnails": (_Checked, r"pack/thumbnails\.parquet "),
    "plots": (_Checked, r"plots/lorenz\.png plots/rank-frequency\.png "),
    "finalize": (_Checked, r"(?:\S+ )*dataset\.json (?:\S+ )*"),
    "sent": (_SentFacts, ""),
    "copies": (_Checked, r"\1 "),
}


def parse(unit: str, content: bytes) -> Receipt | None:
    """Read a receipt.

    Args:
        unit: the unit that it should be of.
        content: the bytes of the file.

    Returns:
        The receipt; None if it is damaged, of another unit, or not of the form that the unit's stage writes.
    """
    stage, _, rest = unit.partition("/")
    facts, outputs = _STAGES.get(stage, (_Checked, r"(?:\S+ )*"))
    try:
        found = _Receipt.model_validate_json(content)
        facts.model_validate(found.facts)
    except ValidationError:
        return None
    listed = "".join(f"{name} " for name in sorted(found.outputs))
    if found.unit != unit or not re.fullmatch(outputs.replace(r"\1", re.escape(rest)), listed):
        return None
    return Receipt(**found.model_dump())
