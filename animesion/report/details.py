"""Everything that a build knows of one image: where it comes from, its licence, sizes, boxes, and the verdict on it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from animesion.dataset.tags import ASSIGNED
from animesion.errors import UsageError
from animesion.report.boxes import Boxes
from animesion.report.facts import clip, item, web_address
from animesion.report.images import Images
from animesion.schemas import CURATED, FACE_REASONS, RAW, SAMPLE_TAGS

#: Columns of `curated.parquet` of one image, beyond those of `animesion.report.images.COLUMNS`.
_COLUMNS = ("key", "file_url", "licence", "author", "rating", "md5", "group", "resembles", "verdict", "how")

#: Columns of `raw/part-*.parquet` of one image.
_LISTED = ("key", "labels", "families")

#: Most candidate labels and families of an image that are shown.
_MOST = 50

#: Most tags of a category that are shown.
_MOST_TAGS = 200

_PIXIV = re.compile(r"[0-9]{1,12}")


class Details:
    """All that a build knows of each image; keeps the tables that it read last.

    Args:
        images: the images of the build.
        boxes: its boxes.
    """

    def __init__(self, images: Images, boxes: Boxes) -> None:
        self._images, self._boxes = images, boxes
        self._each = images.dataset.recipe.crop.faces == "each"
        self._group = functools.lru_cache(maxsize=3)(_group)

    def of(self, place: int) -> dict[str, Any]:
        """All that the build knows of an image.

        Args:
            place: index of the image in `Images.rows`.

        Returns:
            JSON-ready fields: those of `animesion.report.facts.item`; `links`, a list of names and addresses, which are
            http or https; `facts`, a list of names and texts; `crop`, left, top, right and bottom as shares of the
            image; `boxes` of the detector; `original`, whether the file that the source gave is in `raw/`.

        Raises:
            UsageError: a table is damaged.
        """
        row = self._images.rows[place]
        folder = self._images.dataset.path
        whole = row | {"key": re.sub(r"-face[1-9][0-9]*$", "", row["key"]) if self._each else row["key"]}
        curated = self._row(folder / "curated.parquet", CURATED, _COLUMNS, row["key"], place)
        raw = folder / "raw" / f"part-{row['part']:05d}.parquet"
        listed = self._row(raw, RAW, _LISTED, whole["key"]) if raw.is_file() else {}
        families, labels = ((listed.get(name) or [])[:_MOST] for name in ("families", "labels"))
        links = [("page at the source", row["page_url"]), ("file at the source", curated["file_url"])]
        links += [("Pixiv work", f"https://www.pixiv.net/artworks/{number}") for number in _pixiv(families)]
        facts = [
            ("source id", row["source_id"]),
            ("author", curated["author"]),
            ("licence", curated["licence"]),
            ("rating", curated["rating"]),
            ("labels at the source", ", ".join(labels) if labels != [row["label"]] else ""),
            ("families", ", ".join(families)),
            ("group", curated["group"] if curated["group"] != row["key"] else ""),
            ("cluster", row["cluster"]),
            ("keeper", row["keeper"]),
            ("resembles", curated["resembles"] if curated["resembles"] != row["keeper"] else ""),
            ("verdict", ", ".join(filter(None, (curated["verdict"], curated["how"])))),
            ("MD5", curated["md5"]),
            ("SHA-256", row["sha256"]),
        ]
        return {
            **item(self._images.rows, place),
            "links": [[name, address] for name, each in links if (address := web_address(each or ""))],
            "facts": [[name, clip(text)] for name, text in facts if text] + self._tags(row),
            "crop": _shares(row),
            "boxes": self._boxes.of(whole),
            "original": self._images.has_original(row),
        }

    def _tags(self, row: Mapping[str, Any]) -> list[list[str]]:
        """Categories and tags of a sample; none for a dropped image, and where samples carry no tags."""
        dataset = self._images.dataset
        if not row["kept"] or not (dataset.path / ASSIGNED).is_file():
            return []
        ids = self._row(dataset.path / ASSIGNED, SAMPLE_TAGS, ("key", "tags"), row["key"])["tags"] or []
        vocabulary = dataset.vocabulary
        if not all(type(i) is int and 0 <= i < len(vocabulary) for i in ids):
            raise UsageError(f"{dataset.path / ASSIGNED} is damaged: run `animesion build` again")
        found = []
        for category, names in vocabulary.grouped(ids).items():
            shown = [clip(name) for name in names[:_MOST_TAGS]]
            if more := len(names) - len(shown):
                shown.append(f"and {more:,} more")
            found += [[f"tags: {category}", ", ".join(shown)]] if names else []
        return found

    def _row(
        self, path: Path, schema: pa.Schema, columns: tuple[str, ...], key: str, place: int | None = None
    ) -> dict[str, Any]:
        """Some columns of the row of a key.

        Args:
            path: the table.
            schema: of the table.
            columns: of the schema, with `key`.
            key: of the row.
            place: index of the row; None to look for it.
        """
        try:
            before = 0
            for group, rows in enumerate(_sizes(path)):
                if place is None or before <= place < before + rows:
                    table = self._group(path, group, schema, columns)
                    found = table["key"].index(key).as_py() if place is None else place - before
                    if found >= 0:
                        row: dict[str, Any] = table.slice(found, 1).to_pylist()[0]
                        if row["key"] == key:
                            return row
                before += rows
        except (pa.ArrowException, OSError, KeyError, ValueError, IndexError):
            pass
        raise UsageError(f"{path} is damaged: run `animesion build` again")


def _pixiv(families: Sequence[str]) -> list[str]:
    numbers = (each.removeprefix("pixiv:") for each in families if each.startswith("pixiv:"))
    return [number for number in numbers if _PIXIV.fullmatch(number)]


def _shares(row: Mapping[str, Any]) -> list[float] | None:
    """The crop as shares of the image, which may be beyond its edges; None for the whole image, or none known."""
    left, top, right, bottom = row["crop"]
    width, height = row["width"], row["height"]
    if row["reason"] in FACE_REASONS:  # no sample was made of it, even if one face was the best
        return None
    if min(width, height) < 1 or right <= left or bottom <= top or (left, top, right, bottom) == (0, 0, width, height):
        return None
    return [round(left / width, 5), round(top / height, 5), round(right / width, 5), round(bottom / height, 5)]


def _sizes(path: Path) -> list[int]:
    """Number of rows of each row group of a table."""
    with pq.ParquetFile(path) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _group(path: Path, group: int, schema: pa.Schema, columns: tuple[str, ...]) -> pa.Table:
    """Some columns of a row group."""
    with pq.ParquetFile(path) as file:
        table = file.read_row_group(group, columns=list(columns), use_threads=False).select(list(columns))
    return table.cast(pa.schema([schema.field(name) for name in columns]))
