"""Tags of images in the `*_tags.csv` that DAF:re publishes beside its label files.

Columns are `id,dir,class_id,tags_cat0,tags_cat3,tags_cat4`; a cell of tags is the text of a Python list. Categories are
numbered as Danbooru numbers them: 0 general, 3 copyright, 4 character.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from animesion.dataset import text_tables
from animesion.errors import UsageError
from animesion.sources import clean_text
from animesion.sources.tag_tables import distinct

_CATEGORIES = {"tags_cat0": "general", "tags_cat4": "character", "tags_cat3": "copyright"}
#: An element of a list; alternatives exclude each other, so that a list is matched in linear time.
_ELEMENT = re.compile(r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")\s*(,|\Z)""")
#: What fills a category without a tag in these files.
_NONE = "unlabeled"

Tags = Mapping[str, tuple[str, ...]]


def read(path: Path) -> dict[str, Tags]:
    """The tags of each image by category, by the path in `dir`.

    Raises:
        UsageError: the file cannot be read, lacks a column, has a cell that is no list, or lists an image twice.
    """
    try:
        text = text_tables.decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({os.strerror(error.errno or 0)})") from None
    rows = text_tables.rows(text, str(path))
    head = next(rows, [])
    at = {name: head.index(name) for name in ("dir", *_CATEGORIES) if name in head}
    if len(at) <= len(_CATEGORIES):
        lacking = next(name for name in ("dir", *_CATEGORIES) if name not in at)
        raise UsageError(
            f"{path} has no column {lacking!r}: its header must be id,dir,class_id,{','.join(_CATEGORIES)}"
        )
    found: dict[str, Tags] = {}
    for number, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise UsageError(f"{path}, row {number}: {len(row)} columns instead of {len(head)}; correct the row")
        name = row[at["dir"]].replace("\\", "/")
        if name in found:
            raise UsageError(f"{path}, row {number}: {clean_text(name, 80)!r} is listed twice; delete one of the rows")
        found[name] = {
            category: distinct(_listed(row[at[column]], f"{path}, row {number}"))
            for column, category in _CATEGORIES.items()
        }
    return found


def _listed(cell: str, where: str) -> list[str]:
    """The elements of a Python list of texts; nothing is evaluated."""
    if not (cell.startswith("[") and cell.endswith("]")):
        raise UsageError(f"{where}: {clean_text(cell, 40)!r} is not a list such as ['solo', 'long hair']")
    inner, position, found = cell[1:-1].strip(), 0, []
    while position < len(inner):
        match = _ELEMENT.match(inner, position)
        if not match:
            raise UsageError(f"{where}: {clean_text(inner[position:], 40)!r} is not an element of a list of tags")
        found.append(re.sub(r"\\(.)", r"\1", match[1] if match[1] is not None else match[2]))
        position = match.end()
    return [tag for tag in found if tag != _NONE]
