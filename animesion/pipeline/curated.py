"""The table `curated.parquet`: one row per listed image, kept or dropped and why, made a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion import splits
from animesion.dedup import clusters
from animesion.pipeline.columns import Coded, Columns, Texts
from animesion.schemas import CURATED
from animesion.storage import parquet


@dataclass
class Decided:
    """The table `curated.parquet`, of which parts are made when they are asked for.

    Attributes:
        rows: what was decided on.
        reason: drop reason of each row; empty if it is kept.
        detail: detail of the reason.
        label: label of each row.
        class_ids: class id by label.
        split: shape (n,), place in `SPLITS` of each row's split, -1 for a dropped one.
        group: shape (n,), the row whose key is the name of each row's group.
        cluster: shape (n,), likewise of its cluster, -1 for none.
        relatives: the columns on the image that each row resembles.
        removed: row of each removed image -> the name that it has instead of its key.
    """

    rows: Columns
    reason: Coded
    detail: Texts
    label: Coded
    class_ids: Mapping[str, int]
    split: npt.NDArray[np.int8]
    group: npt.NDArray[np.int64]
    cluster: npt.NDArray[np.int64]
    relatives: Relatives
    removed: Mapping[int, str]

    def groups(self) -> Iterator[slice]:
        """Ranges of rows that are a row group of the file each."""
        n = len(self.reason)
        return (slice(start, min(start + parquet.ROW_GROUP, n)) for start in range(0, max(n, 1), parquet.ROW_GROUP))

    def table(self, some: slice) -> pa.Table:
        """A range of rows, of schema `CURATED`."""
        rows, keys = self.rows, self.rows["key"]
        start, stop = some.start, some.stop
        kept = self.split[some] >= 0
        ids = np.array([self.class_ids.get(name, -1) for name in self.label.names], dtype=np.int64)
        shown = pa.array([*splits.SPLITS, ""]).take(pa.array(np.where(kept, self.split[some], len(splits.SPLITS))))
        columns: dict[str, Any] = {
            "kept": self.reason.has("")[some],
            "reason": self.reason.texts(some),
            "detail": self.detail.texts(start, stop),
            "label": self.label.texts(some),
            "class_id": np.where(kept, ids[self.label.codes[some]], -1),
            "split": shown,
            "group": keys.take(pa.array(self.group[some])),
            "cluster": keys.take(pa.array(self.cluster[some], mask=self.cluster[some] < 0)).fill_null(""),
            **self.relatives.columns(start, stop),
            **rows.passed.columns(start, stop),
            "crop": pa.FixedSizeListArray.from_arrays(pa.array(rows["crop"][some].ravel()), 4),
        }
        for name in CURATED.names:
            if name not in columns:
                values = rows[name]
                columns[name] = values.texts(some) if isinstance(values, Coded) else values[some]
        arrays = [_as_arrow(columns[field.name], field.type) for field in CURATED]
        return self._without_removed(pa.table(arrays, schema=CURATED), start)

    def _without_removed(self, table: pa.Table, start: int) -> pa.Table:
        """The table with nothing about removed images but that they were dropped, and from which source."""
        names = {row - start: name for row, name in self.removed.items() if 0 <= row - start < len(table)}
        if not names:
            return table
        mask = np.zeros(len(table), dtype=np.bool_)
        mask[list(names)] = True
        for place, column in enumerate(CURATED):
            if column.name in ("kept", "reason", "class_id", "source", "part"):
                continue
            blank: Any = "" if column.type == pa.string() else 0
            blanks = [names[row] if column.name in ("key", "group") else blank for row in sorted(names)]
            if column.name == "crop":
                corners = np.array(table["crop"].combine_chunks().flatten()).reshape(-1, 4)
                values: Any = pa.FixedSizeListArray.from_arrays(
                    pa.array(np.where(mask[:, None], 0, corners).ravel()), 4
                )
            else:
                values = pc.replace_with_mask(
                    table[column.name].combine_chunks(), mask, pa.array(blanks).cast(column.type)
                )
            table = table.set_column(place, column, values.cast(column.type))
        return table


class Relatives:
    """The columns on the image that is kept instead of each row, and on the one that the row resembles most.

    Args:
        duplicates: the verdicts.
        keys: key of each row.
        published: key of the image that another dataset has, of rows that are dropped because of it.
    """

    def __init__(self, duplicates: clusters.Verdicts, keys: pa.Array, published: Texts) -> None:
        self._keys, self._kept_instead, self._published = keys, duplicates.kept_instead, published
        # of rows whose closest relative was compared; equal bytes or pixels need no comparison
        n = len(keys)
        self._verdict, self._how = Texts(n), Texts(n)
        self._relative = np.full(n, -1, dtype=np.int64)
        self._inliers = np.zeros(n, dtype=np.int32)
        self._residual = np.zeros(n, dtype=np.float32)
        of_unit: dict[int, list[tuple[int, clusters.Relation]]] = {}
        for (a, b), relation in duplicates.relations.items():
            of_unit.setdefault(a, []).append((b, relation))
            of_unit.setdefault(b, []).append((a, relation))
        units = np.fromiter(of_unit, dtype=np.int64, count=len(of_unit))
        for i in np.flatnonzero(np.isin(duplicates.unit, units)).tolist():
            related = of_unit[int(duplicates.unit[i])]
            kept = int(duplicates.kept_instead[i])
            if kept >= 0:
                related = [each for each in related if each[0] == int(duplicates.unit[kept])]
            if related:
                other, relation = min(related, key=lambda each: (*clusters.closeness(each[1]), each[0]))
                self._relative[i] = other if kept < 0 else kept
                self._verdict[i], self._how[i] = relation.verdict, relation.how
                self._inliers[i], self._residual[i] = relation.inliers, relation.residual

    def columns(self, start: int, stop: int) -> dict[str, Any]:
        """The columns of a range of rows."""
        keeper = _keys_of(self._keys, self._kept_instead[start:stop], self._published.texts(start, stop))
        has_keeper = pc.not_equal(keeper, "")
        verdict = self._verdict.texts(start, stop)
        copy = pc.and_(has_keeper, pc.equal(verdict, ""))
        return {
            "keeper": keeper,
            "resembles": _keys_of(self._keys, self._relative[start:stop], keeper),
            "verdict": pc.if_else(copy, "copy", verdict),
            "how": self._how.texts(start, stop),
            "inliers": self._inliers[start:stop],
            "residual": self._residual[start:stop],
        }


def _keys_of(keys: pa.Array, rows: npt.NDArray[np.int64], otherwise: pa.Array) -> pa.Array:
    """The keys of some rows; another text for each row that is -1."""
    taken = keys.take(pa.array(rows, mask=rows < 0)).cast(pa.string())
    return pc.coalesce(taken, otherwise)


def _as_arrow(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values.cast(kind) if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, kind)
