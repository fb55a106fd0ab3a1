"""Compare two built datasets: samples, labels, splits, images, drop reasons, classes and the recipe.

Only tables are read. Images are equal if their SHA-256 in `index.parquet` is equal. `animesion.cli.diff` prints the
result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from animesion.dataset.dataset import Dataset


class Change(NamedTuple):
    """A value that differs: `before` in the first dataset, `after` in the second; empty if absent from one."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """All differences between two datasets; every list is sorted.

    Attributes:
        added: keys of samples that only the second has.
        removed: keys of samples that only the first has.
        relabelled: keys whose class name differs.
        moved: keys whose split differs.
        repainted: keys whose image differs, with the start of its SHA-256.
        reasons: keys in both `curated.parquet` with a different outcome: `kept`, or the drop reason.
        classes: names of classes that were added, removed or have another id.
        recipe: `section.key` of values that differ.
        totals: samples per split, and `total` for all; equal ones included.
        shards: shards that differ although nothing else does: another order or other metadata.
    """

    added: list[str]
    removed: list[str]
    relabelled: list[Change]
    moved: list[Change]
    repainted: list[Change]
    reasons: list[Change]
    classes: list[Change]
    recipe: list[Change]
    totals: list[Change]
    shards: list[Change]

    @property
    def identical(self) -> bool:
        """Whether there are no differences."""
        listed = [value for name, value in vars(self).items() if name != "totals"]
        return not any(listed) and all(total.before == total.after for total in self.totals)

    def to_dict(self) -> dict[str, Any]:
        """The differences as plain dicts and lists, ready for JSON."""
        values = asdict(self)
        for name, changes in values.items():
            values[name] = [c._asdict() if isinstance(c, Change) else c for c in changes]
        return {"identical": self.identical, **values}


class _Placed(NamedTuple):
    """Class name, split and image digest of a sample, from its row of the index."""

    name: str
    split: str
    sha256: str


def compare(before: Dataset, after: Dataset) -> Difference:
    """Compare two datasets.

    Raises:
        UsageError: a table or the recipe of one is missing or damaged.
    """
    old, new = _placed(before), _placed(after)
    both = sorted(old.keys() & new.keys())
    found = Difference(
        added=sorted(new.keys() - old.keys()),
        removed=sorted(old.keys() - new.keys()),
        relabelled=[Change(k, old[k].name, new[k].name) for k in both if old[k].name != new[k].name],
        moved=[Change(k, old[k].split, new[k].split) for k in both if old[k].split != new[k].split],
        repainted=[Change(k, old[k].sha256[:12], new[k].sha256[:12]) for k in both if old[k].sha256 != new[k].sha256],
        reasons=list(_changes(_fates(before), _fates(after), shared_only=True)),
        classes=list(_changes(*({c.name: str(c.id) for c in each.classes} for each in (before, after)))),
        recipe=list(_changes(*(dict(_flat(each.recipe.model_dump(mode="json"))) for each in (before, after)))),
        totals=_totals(before, after),
        shards=[],
    )
    # shards are compared only if their content is equal: any other difference changes their digests anyway
    if found.identical:
        digests = ({s.path: s.sha256[:12] for i in each.splits.values() for s in i.shards} for each in (before, after))
        found.shards.extend(_changes(*digests))
    return found


def _placed(dataset: Dataset) -> dict[str, _Placed]:
    """Key -> class name, split and image digest, from the index."""
    names = {info.id: info.name for info in dataset.classes}
    columns = (dataset.index[name].to_pylist() for name in ("key", "label", "split", "sha256"))
    # `animesion verify` reports labels outside the class map
    return {
        key: _Placed(names.get(label, f"class {label}"), split, sha256)
        for key, label, split, sha256 in zip(*columns, strict=True)
    }


def _fates(dataset: Dataset) -> dict[str, str]:
    """Key -> `kept` or the drop reason, from curated.parquet."""
    columns = (dataset.curated[name].to_pylist() for name in ("key", "kept", "reason"))
    return {key: "kept" if kept else reason for key, kept, reason in zip(*columns, strict=True)}


def _totals(before: Dataset, after: Dataset) -> list[Change]:
    """Samples per split of both datasets, then in total."""
    names = [*before.splits, *(name for name in after.splits if name not in before.splits)]
    counts = [
        [str(each.splits[name].samples) if name in each.splits else "" for name in names] for each in (before, after)
    ]
    return [
        *(Change(*row) for row in zip(names, *counts, strict=True)),
        Change("total", *map(str, map(len, (before, after)))),
    ]


def _changes(before: dict[str, str], after: dict[str, str], *, shared_only: bool = False) -> Iterator[Change]:
    """Values that differ, sorted by name; with `shared_only`, those of names in both."""
    names = before.keys() & after.keys() if shared_only else before.keys() | after.keys()
    for name in sorted(names):
        change = Change(name, before.get(name, ""), after.get(name, ""))
        if change.before != change.after:
            yield change


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as `section.key` and the value's representation."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", repr(value)
