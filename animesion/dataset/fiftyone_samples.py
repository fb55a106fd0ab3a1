"""Samples for FiftyOne, which shows image files: `Dataset.to_fiftyone` writes them into a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animesion.errors import UsageError
from animesion.storage import names
from animesion.storage.workspace import write_atomic

if TYPE_CHECKING:
    from animesion.dataset.dataset import Dataset

#: Provenance that becomes fields of a sample.
_FIELDS = ("group", "source", "source_id", "page_url", "licence", "author", "rating")


def samples(dataset: Dataset, split: str | None, folder: Path) -> Iterator[Any]:
    """One `fiftyone.Sample` for each sample, after its file is written as `<split>/<key>.<extension>`.

    Args:
        dataset: the dataset.
        split: only this split; None for all.
        folder: where the files are written.

    Raises:
        UsageError: a key cannot be the name of a file, or a shard is missing or damaged.
    """
    import fiftyone

    for sample in dataset.samples(split):
        if not re.fullmatch(names.KEY, sample.key):
            raise UsageError(f"{dataset.path}: key {sample.key[:100]!r} is no name for a file: rebuild the dataset")
        path = folder / sample.split / f"{sample.key}.{dataset.image_field}"
        write_atomic(path, sample.image)
        about = {name: value for name in _FIELDS if isinstance(value := sample.meta.get(name), str) and value}
        yield fiftyone.Sample(
            filepath=str(path.resolve()),
            tags=[sample.split],
            ground_truth=fiftyone.Classification(label=sample.name),
            key=sample.key,
            class_id=sample.label,
            **about,
        )
