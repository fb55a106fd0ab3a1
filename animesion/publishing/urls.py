"""Tables of URLs instead of images: what others need to download a dataset's images and rebuild it.

For images that may be linked but not redistributed. `urls/<split>.parquet` has one row per sample; `rebuild.toml` is
the recipe that crops and packs like the original.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from animesion import cards
from animesion.cards.facts import counted
from animesion.config.recipe import Recipe
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.storage import checksums, names, parquet
from animesion.storage.workspace import write_atomic

#: Columns of `urls/<split>.parquet`.
SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("label", pa.string()),
        ("key", pa.string()),  # of the sample in the dataset that was published
        ("split", pa.string()),
        ("group", pa.string()),
        ("licence", pa.string()),
        ("author", pa.string()),
        ("rating", pa.string()),
        ("page_url", pa.string()),
        ("md5", pa.string()),  # of the original file
        ("sha256", pa.string()),  # of the original file
        ("bytes", pa.int64()),  # of the original file
        ("width", pa.int32()),  # of the upright original
        ("height", pa.int32()),
        ("box", pa.string()),  # left, top, right, bottom of the crop as shares of the sides
    ]
)

_COPIED = ("classes.csv", "plots/lorenz.png", "plots/rank-frequency.png")


def write(dataset: Dataset, folder: Path) -> int:
    """Write the files that are published instead of the dataset.

    Args:
        dataset: the dataset.
        folder: an empty folder to write to.

    Returns:
        Number of samples that are left out because they have no URL.

    Raises:
        UsageError: no sample has a URL, a table is missing or damaged, or there is a link in the dataset's folder.
    """
    names.refuse_links(dataset.path)
    rows = [_row(row) for row in dataset.curated.filter(dataset.curated["kept"]).to_pylist()]
    linked = sorted((row for row in rows if row["url"]), key=lambda row: row["key"])
    if not linked:
        raise UsageError(f"no image of {dataset.path} has a URL, so --urls-only has nothing to send")
    digests = {}
    for split in dataset.splits:
        chosen = [row for row in linked if row["split"] == split]
        digests[f"urls/{split}.parquet"] = parquet.write(
            folder / "urls" / f"{split}.parquet", parquet.table(chosen, SCHEMA)
        )
    for name in _COPIED:
        if (dataset.path / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(dataset.path / name, folder / name)
            digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    recipe = dataset.recipe
    digests["rebuild.toml"] = write_atomic(folder / "rebuild.toml", rebuilding(recipe).to_toml().encode())
    facts = json.loads((dataset.path / "dataset.json").read_bytes()) | counted(dataset.curated)
    digests["README.md"] = write_atomic(
        folder / "README.md", cards.dataset_card(facts, recipe, urls_only=True).encode()
    )
    write_atomic(folder / checksums.CHECKSUMS, checksums.render(digests).encode())
    return len(rows) - len(linked)


def rebuilding(recipe: Recipe) -> Recipe:
    """The recipe that builds from the tables; labels, boxes and splits are read from them instead of decided again.

    It leaves `source.contact` empty: users set their own, as it is sent with every request.
    """
    whole = recipe.crop.detector == "none"
    columns = {
        f"{meaning}_column": meaning
        for meaning in ("url", "label", "key", "md5", "bytes", "licence", "author", "group", "split", "box")
        if not (whole and meaning == "box")
    }
    values: dict[str, Any] = recipe.model_dump(mode="json")
    limits = {name: values["filter"][name] for name in ("max_side", "max_pixels")}
    crop = {"detector": "none"} if whole else {"detector": "boxes", "min_score": 0.0}
    values |= {
        "source": {"kind": "urls", "path": "urls", **columns},
        "label": {},
        "filter": limits,
        "crop": crop,
        "classes": {},
        "tags": {},
        "split": {**values["split"], "strategy": "published"},
    }
    return Recipe.model_validate(values)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    found = {name: row.get(name) for name in SCHEMA.names}
    left, top, right, bottom = row["crop"]
    width, height = row["width"], row["height"]
    shares = (left / width, top / height, right / width, bottom / height)
    # nine digits: one pixel is 1.5e-5 of the side of the largest allowed image
    return {**found, "url": row["file_url"], "box": " ".join(f"{share:.9f}" for share in shares)}
