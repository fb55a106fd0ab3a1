"""Datasets and samples as HTML, which notebooks show in place of `repr`. Every text is escaped."""

from __future__ import annotations

import base64
import io
import reprlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from animesion.errors import UsageError

if TYPE_CHECKING:
    from animesion.dataset.dataset import Dataset, Sample

_CLASSES, _SIDE, _TEXT = 5, 256, 200
_short = reprlib.Repr()  # of values of any depth


def dataset_html(dataset: Dataset) -> str:
    """Name, splits, and the largest and smallest classes."""
    classes = sorted(dataset.classes, key=lambda each: (-each.total, each.id))
    splits = [
        (split.name, f"{split.samples:,}", len(split.shards), f"{split.bytes:,}") for split in dataset.splits.values()
    ]
    shown = classes if len(classes) <= 2 * _CLASSES else [*classes[:_CLASSES], None, *classes[-_CLASSES:]]
    rows = [
        ("", f"{len(classes) - 2 * _CLASSES:,} more", "") if each is None else (each.id, each.name, f"{each.total:,}")
        for each in shown
    ]
    return (
        f"<div><p><b>{escape(dataset.name)}</b>: {len(dataset):,} samples of {len(classes):,} classes in "
        f"<code>{escape(str(dataset.path))}</code></p>"
        + _table(("split", "samples", "shards", "bytes"), splits)
        + _table(("id", "class", "samples"), rows)
        + "</div>"
    )


def sample_html(sample: Sample) -> str:
    """The image, at most 256 pixels wide and high, and the content of the JSON member."""
    about: dict[str, Any] = {"key": sample.key, "split": sample.split, "class": f"{sample.name} ({sample.label})"}
    about |= {name: value for name, value in sample.meta.items() if value not in (None, "", [])}
    about = {name: value for name, value in about.items() if name not in ("label", "name")}
    rows = [(name, (value if isinstance(value, str) else _short.repr(value))[:_TEXT]) for name, value in about.items()]
    return f"<div>{_image(sample)}{_table(('', ''), rows)}</div>"


def _image(sample: Sample) -> str:
    try:
        image = sample.decode()
    except UsageError as error:
        return f"<p>{escape(str(error))}</p>"
    image.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    image.save(out, "PNG")
    return f'<img alt="{escape(sample.key)}" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def row(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if any(head) else ""
    return f"<table>{top}<tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"
