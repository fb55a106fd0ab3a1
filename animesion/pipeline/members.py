"""The members of a sample in a shard besides its image, and their sizes without making them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.config.recipe import Recipe
from animesion.dataset import shards
from animesion.dataset.tags import Assigned, Members, of_lists

IntArray = npt.NDArray[np.int64]

#: Columns of `CURATED` that a sample shows.
SHOWN = ("key", "label", "class_id", "split", "group", "crop", "width", "height", "source", "source_id")
SHOWN += ("page_url", "file_url", "licence", "author", "rating", "md5")  # type: ignore[assignment]


#: One for all samples: `json.dumps` makes one for each.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def sample_fields(
    row: Mapping[str, Any], content: bytes, recipe: Recipe, members: Members | None = None
) -> dict[str, bytes]:
    """The members of a sample: image, `cls`, `json` and, unless switched off, the caption `txt`.

    The JSON has the same fields with the same types in every sample, without nulls, because readers infer types from
    single samples; the card states the types of tags, whose lists may be empty. `sample_sizes` computes the size of
    the members without making them.

    Args:
        row: the columns `SHOWN` of a sample, and `tags` if samples carry tags.
        content: bytes of its image.
        recipe: the recipe.
        members: the part of the JSON with the tags.
    """
    provenance = {
        "label": row["class_id"],
        "name": row["label"],
        "split": row["split"],
        "source": row["source"],
        "source_id": row["source_id"],
        "page_url": row["page_url"],
        "file_url": row["file_url"],
        "licence": row["licence"],
        "author": row["author"],
        "rating": row["rating"],
        "md5": row["md5"],
        "width": row["width"],
        "height": row["height"],
        "box": row["crop"],
        "group": row["group"],
    }
    text = _JSON.encode(provenance)
    if members is not None:
        text = f"{text[:-1]}{members.text(row['tags'])}}}"
    fields = {recipe.pack.format: content, "cls": str(row["class_id"]).encode(), "json": text.encode()}
    if recipe.pack.caption:
        fields["txt"] = _caption(row["label"], recipe)
    return fields


def _caption(label: str, recipe: Recipe) -> bytes:
    return recipe.pack.caption.replace("{name}", label.replace("_", " ")).encode()


def sample_sizes(
    kept: pa.Table, image: IntArray, recipe: Recipe, members: Members | None = None
) -> tuple[IntArray, IntArray]:
    """Bytes of each sample in its shard, and offset in it of the image's bytes; shape (n,) each."""
    empty = dict.fromkeys(SHOWN, "") | dict.fromkeys(("class_id", "width", "height"), 0) | {"crop": [0, 0, 0, 0]}
    fixed = len(sample_fields(empty, b"", recipe)["json"]) - 7  # without the digits of the seven integers
    text = np.full(len(kept), fixed, dtype=np.int64)
    for name in SHOWN:
        if kept[name].type == pa.string() and name != "key":
            text += _json_lengths(kept[name])
    for values in (kept["class_id"], kept["width"], kept["height"], kept["crop"].combine_chunks().flatten()):
        digits = ints(pc.binary_length(pc.cast(values, pa.string())))
        text += digits.reshape(len(kept), -1).sum(axis=1)
    if members is not None:
        text += members.sizes(Assigned(*of_lists(kept["tags"].combine_chunks())))
    lengths = {
        recipe.pack.format: image,
        "cls": ints(pc.binary_length(pc.cast(kept["class_id"], pa.string()))),
        "json": text,
    }
    if recipe.pack.caption:
        label = kept["label"].combine_chunks().dictionary_encode()
        captions = np.array([len(_caption(name, recipe)) for name in label.dictionary.to_pylist()], dtype=np.int64)
        lengths["txt"] = captions[label.indices.to_numpy()]
    total = np.zeros(len(kept), dtype=np.int64)
    start = total
    for field in sorted(lengths):
        if field == recipe.pack.format:
            start = total + shards.BLOCK
        total = total + shards.BLOCK + -(-lengths[field] // shards.BLOCK) * shards.BLOCK
    return total, start


#: Bytes that JSON adds to a byte of a text: a backslash, or `\u00` and two digits less the byte.
_ESCAPES = np.zeros(256, dtype=np.int64)
_ESCAPES[:32] = 5
_ESCAPES[list(b'"\\\b\f\n\r\t')] = 1


def _json_lengths(column: pa.ChunkedArray) -> IntArray:
    """Bytes of each text inside the quotes of JSON, as UTF-8."""
    lengths = ints(pc.binary_length(column))
    start = 0
    for chunk in column.chunks:
        _, offsets, content = chunk.buffers()
        if content is not None and len(chunk):
            bounds = np.frombuffer(offsets, dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            letters = np.frombuffer(content, dtype=np.uint8)[bounds[0] : bounds[-1]]
            escaped = np.flatnonzero((letters < 32) | (letters == ord('"')) | (letters == ord("\\")))
            rows = np.searchsorted(bounds - bounds[0], escaped, side="right") - 1
            np.add.at(lengths, start + rows, _ESCAPES[letters[escaped]])
        start += len(chunk)
    return lengths


def ints(column: pa.ChunkedArray) -> IntArray:
    """A column of integers as int64."""
    found: IntArray = column.to_numpy().astype(np.int64)
    return found
