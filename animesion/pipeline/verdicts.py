"""What an earlier comparison found, as far as it still holds: votes of local features, and verdicts on pairs.

A verdict depends on the two samples, on their order, on which of their hashes were close, and on the code. A sample is
known by a digest of its pixels, its crop and the features that it was searched by, and samples are in an order that
depends on nothing else. So a build that grows looks up and compares its new images only, and has the candidates and the
verdicts of a build from nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.dedup.candidates import Candidates
from animesion.dedup.compare import Found
from animesion.dedup.joins import EarlierVotes
from animesion.dedup.verdict import Verdict
from animesion.schemas import COMPARED, PAIRS, SEARCHED
from animesion.storage import parquet
from animesion.storage.parquet import DamagedTableError
from animesion.storage.workspace import Workspace

#: Where all verdicts on related pairs are, which pairs were compared, and which samples were searched.
PAIRS_FILE, COMPARED_FILE = "features/pairs.parquet", "features/compared.parquet"
SEARCHED_FILE = "features/searched.parquet"

#: Bits of `hashes` and `points` in `COMPARED`.
_PLAIN, _MIRRORED, _WHOLE = 1, 2, 4

#: Verdicts of related pairs by their text.
_RELATED = {verdict.value: verdict for verdict in Verdict if verdict is not Verdict.DIFFERENT}


def digest(pixels: str, crop: Sequence[int] | None, size: tuple[int, int], points: bytes | None) -> bytes:
    """What a sample is known by, 16 bytes.

    Args:
        pixels: digest of the decoded image, or of the file that it is decoded from.
        crop: the part of it that is the sample; None for all.
        size: width and height that its points were extracted at.
        points: its local features; None if they are not known.
    """
    known = hashlib.blake2b(repr((pixels, tuple(crop or ()), size, points is None)).encode(), digest_size=16)
    known.update(points or b"")
    return known.digest()


@dataclass(frozen=True)
class Earlier:
    """An earlier comparison.

    Attributes:
        params: digest of its settings.
        searched: digests of its samples.
        compared: a table of schema `COMPARED`.
        related: the verdicts on its related pairs, a table of schema `PAIRS`.
    """

    params: str
    searched: pa.Array
    compared: pa.Table
    related: pa.Table

    def rows_among(self, digests: pa.Array) -> npt.NDArray[np.int64]:
        """The row that each of its samples has among the given digests, -1 for none."""
        found: npt.NDArray[np.int64] = pc.index_in(self.searched, value_set=digests).fill_null(-1).to_numpy()
        return found.astype(np.int64)


def earlier(workspace: Workspace, code: str) -> Earlier | None:
    """The last comparison in a folder; None if there is none, its files were changed, or other code made it."""
    receipt = workspace.receipt("compare")
    if receipt is None or receipt.code != code or not workspace.intact(receipt):
        return None
    try:
        searched = parquet.read(workspace.path(SEARCHED_FILE), SEARCHED)["digest"].combine_chunks()
        compared = parquet.read(workspace.path(COMPARED_FILE), COMPARED)
        related = parquet.read(workspace.path(PAIRS_FILE), PAIRS)
    except DamagedTableError:
        return None
    known = pa.array(list(_RELATED))
    if any(column.null_count for column in (searched, *compared.columns, *related.columns)):
        return None
    first, second = (compared[name].to_numpy() for name in ("first", "second"))
    if (np.maximum(first, second) >= len(searched)).any():
        return None
    agree = (pc.sum(compared["related"]).as_py() or 0) == len(related)
    proper = pc.all(pc.is_in(related["verdict"], value_set=known), min_count=0).as_py()
    return Earlier(receipt.params, searched, compared, related) if agree and proper else None


def votes(before: Earlier, digests: pa.Array) -> EarlierVotes | None:
    """What the search by local features found among some of the rows.

    Args:
        before: the earlier comparison, with the same settings.
        digests: `digest` of each row.

    Returns:
        Its votes; None if a sample that it had is gone or in another place, so that others may have votes now.
    """
    rows = before.rows_among(digests)
    if (np.diff(rows, prepend=-1) <= 0).any():
        return None
    bits = before.compared["points"].to_numpy()
    pairs = np.sort([rows[before.compared[name].to_numpy()] for name in ("first", "second")], axis=0).T
    found = [pairs[bits & bit > 0] for bit in (_PLAIN, _MIRRORED)]
    mirrored = np.arange(sum(map(len, found))) >= len(found[0])
    return EarlierVotes(np.setdiff1d(np.arange(len(digests)), rows), np.concatenate(found), mirrored)


def reused(
    before: Earlier | None, candidates: Candidates, digests: pa.Array
) -> tuple[npt.NDArray[np.bool_], list[Found]]:
    """Verdicts that still hold.

    Args:
        before: the earlier comparison.
        candidates: m pairs of rows.
        digests: `digest` of each row.

    Returns:
        Which candidates have a verdict, shape (m,), and the verdicts on those of them that are related.
    """
    if before is None:
        return np.zeros(len(candidates.pairs), dtype=np.bool_), []
    rows = before.rows_among(digests)
    i, j = (rows[before.compared[name].to_numpy()] for name in ("first", "second"))
    there = (i >= 0) & (j >= 0)
    old = _codes(i, j, before.compared["hashes"].to_numpy(), len(digests))
    now = _codes(candidates.pairs[:, 0], candidates.pairs[:, 1], _hashes(candidates), len(digests))
    known = np.isin(now, old[there])
    # the row of `related` that each earlier pair has, and the pairs of it that are wanted
    related = before.compared["related"].to_numpy()
    chosen = related & there & np.isin(old, now)
    places = np.cumsum(related)[chosen] - 1
    values = before.related.take(pa.array(places)).to_pylist()
    found = []
    for value, a, b in zip(values, i[chosen].tolist(), j[chosen].tolist(), strict=True):
        value |= {"verdict": _RELATED[value["verdict"]], "transform": tuple(value["transform"])}
        found.append(Found(**{**value, "first": a, "second": b}))
    return known, found


def tables(
    candidates: Candidates, found: Sequence[Found], digests: pa.Array, key: Callable[[int], str]
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """The tables of schemas `PAIRS`, `COMPARED` and `SEARCHED` of a comparison.

    Args:
        candidates: the pairs that were compared, ascending.
        found: the verdicts on related pairs, by rows ascending.
        digests: `digest` of each row.
        key: the key of a row.
    """
    rows = [each._asdict() | {"first": key(each.first), "second": key(each.second)} for each in found]
    n = len(digests)
    codes = candidates.pairs[:, 0] * n + candidates.pairs[:, 1]
    related = np.isin(codes, np.array([each.first * n + each.second for each in found], dtype=np.int64))
    points = _PLAIN * candidates.points + _MIRRORED * candidates.mirrored_points
    columns = [*candidates.pairs.T.astype(np.uint32), _hashes(candidates), points.astype(np.uint8), related]
    compared = pa.table([pa.array(column) for column in columns], schema=COMPARED)
    return pa.Table.from_pylist(rows, schema=PAIRS), compared, pa.table([digests], schema=SEARCHED)


def _hashes(candidates: Candidates) -> npt.NDArray[np.uint8]:
    close = _PLAIN * candidates.plain + _MIRRORED * candidates.mirrored + _WHOLE * candidates.whole
    found: npt.NDArray[np.uint8] = close.astype(np.uint8)
    return found


def _codes(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint8], n: int
) -> npt.NDArray[np.int64]:
    """One integer for a pair of rows and what was close, shape (m,)."""
    return (first * n + second) * 8 + hashes
