"""Stage 5: write the files that describe the shards: facts, classes, card, report, plots and checksums.

`dataset.json`, `classes.csv`, `croissant.json`, the side files of readers, the plots, `README.md`, `report.html` and
`SHA256SUMS`, all from tables. Only the card's grid and the report's thumbnails need pixels.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from animesion import cards
from animesion.cards import grid
from animesion.cards.croissant import croissant
from animesion.cards.facts import SHARED, counted
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dataset import tags, text_tables
from animesion.dataset.dataset import Dataset
from animesion.dedup import extraction
from animesion.executors import Executor
from animesion.images import codec, local_features
from animesion.pipeline import thumbnails, versions
from animesion.pipeline.tags import counted as counted_tags
from animesion.pipeline.tags import describe as describe_tags
from animesion.pipeline.versions import Parent
from animesion.report import facts as shown
from animesion.report import page
from animesion.report.images import Images
from animesion.schemas import CURATED, INDEX, SAMPLE_TAGS
from animesion.stats import long_tail, plots
from animesion.storage import checksums, parquet, removed
from animesion.storage.receipts import Receipt
from animesion.storage.removed import REMOVED
from animesion.storage.workspace import Workspace, sha256_file, write_atomic

CODE = "finalize-4"

#: Columns of `curated.parquet` that the card tells of.
_DESCRIBED: tuple[str, ...] = (
    "key",
    "kept",
    "label",
    "class_id",
    "split",
    "rating",
    "source",
    "licence",
    "author",
    "file_url",
    "crop",
)
_DESCRIBED += tuple(SHARED.values())


def run(
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    parts: int,
    notes: Sequence[str],
    parent: Parent | None = None,
) -> Receipt:
    """Write the files and commit; returns the existing receipt if it is still valid.

    Args:
        workspace: output folder whose other stages are done.
        recipe: the recipe.
        executor: makes the thumbnails.
        parts: number of parts.
        notes: sentences for the card, collected from all stages.
        parent: the version that this one is built onto.
    """
    curate = workspace.receipt("curate")
    index_receipt = workspace.receipt("index")
    assert curate is not None
    assert index_receipt is not None
    inputs = {"curated": curate.outputs["curated.parquet"]["sha256"]}
    inputs |= {"index": index_receipt.outputs["index.parquet"]["sha256"], **index_receipt.facts["shards"]}
    digest = params_digest(
        [recipe.model_dump(mode="json"), list(notes), version("animesion"), PIL.__version__, local_features.version()]
    )
    if workspace.path(REMOVED).is_file():
        inputs["removed"] = sha256_file(workspace.path(REMOVED))
    if parent:
        inputs["parent"] = parent.digest
    if tagged := workspace.receipt("tags"):
        inputs |= {name: output["sha256"] for name, output in tagged.outputs.items()}
    receipt = workspace.done("finalize", CODE, digest, inputs)
    if receipt:
        return receipt
    index = parquet.read(workspace.path("index.parquet"), INDEX)
    curated = parquet.read(workspace.path("curated.parquet"), CURATED, _DESCRIBED)
    facts = _facts(workspace, recipe, {**curate.facts, "notes": list(notes)}, index, parts)
    facts |= parent.lineage(index) if parent else {}
    if tagged:
        facts["tags"] = tagged.facts["summary"]
    outputs = describe(workspace, recipe, facts, index, curated, executor)
    committed = workspace.commit("finalize", CODE, digest, inputs, outputs)
    versions.forget_others(workspace, parent.digest if parent else "")
    return committed


def describe(
    workspace: Workspace,
    recipe: Recipe,
    facts: dict[str, Any],
    index: pa.Table,
    curated: pa.Table,
    executor: Executor | None = None,
) -> dict[str, str]:
    """Write every file that describes the shards, `SHA256SUMS` last.

    Args:
        workspace: the folder, with its shards, `index.parquet`, `curated.parquet` and `recipe.toml`.
        recipe: the recipe.
        facts: content of `dataset.json`, without what is counted here.
        index: the content of `index.parquet`.
        curated: the content of `curated.parquet`, or the columns of it that the card tells of.
        executor: makes thumbnails, which are then kept; without one, they are made here.

    Returns:
        SHA-256 by name of the files that were written, without `SHA256SUMS` itself.
    """
    facts = facts | counted(curated)
    outputs: dict[str, str] = {}
    if "tags" in facts:
        facts["tags"], outputs = _tags(workspace, facts["tags"], index)
    tables = {name: sha256_file(workspace.path(name)) for name in ("index.parquet", "curated.parquet")}

    def write(name: str, text: str) -> None:
        outputs[name] = write_atomic(workspace.path(name), text.encode())

    write("classes.csv", _classes_csv(facts))
    write("_info.json", _json(_timm_info(facts)))
    write("data/sizes.json", _json({s["path"].removeprefix("data/"): s["samples"] for s in _shards(facts)}))
    counts = np.array([sum(counts.values()) for counts in facts["class_counts"]], dtype=np.int64)
    outputs |= _plots(workspace, counts, facts["name"], keep=executor is not None)
    rows = _grid(index, curated)
    if rows:
        outputs["plots/samples.jpg"] = write_atomic(
            workspace.path("plots/samples.jpg"),
            grid.draw(workspace, list(rows.values()), codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels)),
        )
    facts["grid"] = list(rows)
    write("dataset.json", _json(facts))
    table_digests = {"index.parquet": tables["index.parquet"], "classes.csv": outputs["classes.csv"]}
    table_digests |= {name: outputs[name] for name in (tags.VOCABULARY,) if name in outputs}
    write("croissant.json", croissant(facts, recipe, table_digests))
    write("README.md", cards.dataset_card(facts, recipe))
    # The report reads the dataset as any user does, so dataset.json has to be written by now.
    write("report.html", _report(workspace, index, executor))
    listed = {**outputs, **tables, **{s["path"]: s["sha256"] for s in _shards(facts)}}
    for name in ("recipe.toml", REMOVED):
        if workspace.path(name).is_file():
            listed[name] = sha256_file(workspace.path(name))
    # Last: a folder with this file is a complete dataset.
    write_atomic(workspace.path(checksums.CHECKSUMS), checksums.render(listed).encode())
    return outputs


def _tags(workspace: Workspace, summary: dict[str, Any], index: pa.Table) -> tuple[dict[str, Any], dict[str, str]]:
    """Count the tags of the samples; returns the facts and the SHA-256 of the files.

    After a removal, the files have samples that are gone, and are written without them.
    """
    vocabulary = tags.read_vocabulary(workspace.root)
    rows = index.select(["key", "split"]).sort_by("key").combine_chunks()
    column = tags.read_assigned(workspace.root, rows["key"], len(vocabulary)).column()
    found, column = counted_tags(vocabulary.names, vocabulary.categories, column, rows["split"])
    table = pa.table([rows["key"], column], schema=SAMPLE_TAGS)
    outputs = {
        tags.VOCABULARY: write_atomic(workspace.path(tags.VOCABULARY), tags.render(found).encode()),
        tags.ASSIGNED: parquet.write(workspace.path(tags.ASSIGNED), table),
        tags.DROPPED: sha256_file(workspace.path(tags.DROPPED)),
    }
    return describe_tags(found, table, summary), outputs


def _plots(workspace: Workspace, counts: npt.NDArray[np.int64], title: str, *, keep: bool) -> dict[str, str]:
    """Draw the plots, unless those of an earlier build show the same; returns their digests by path.

    Args:
        workspace: the folder.
        counts: images of each class.
        title: of the plots.
        keep: whether a later build of the folder may use them.
    """
    code, digest = f"plots-1/matplotlib-{version('matplotlib')}", params_digest([title, counts.tolist()])
    receipt = workspace.done("plots", code, digest, {})
    if receipt:
        return {name: known["sha256"] for name, known in receipt.outputs.items()}
    written = plots.write_plots(workspace.path("plots"), counts, title)
    outputs = {f"plots/{path.name}": sha256_file(path) for path in written}
    if keep:
        workspace.commit("plots", code, digest, {}, outputs)
    return outputs


def _report(workspace: Workspace, index: pa.Table, executor: Executor | None) -> str:
    ready, drawn = thumbnails.known(workspace, index) if executor else ({}, {})
    images = Images(Dataset(workspace.root), ready, drawn if executor else None)
    if executor:
        thumbnails.make(workspace, index, images, ready, executor)
    found = shown.of_dataset(images.dataset, images=images)
    if executor:
        thumbnails.keep(workspace, index, ready, drawn, {base64.b64decode(content) for content in found["images"]})
    return page.render(found)


def _facts(
    workspace: Workspace, recipe: Recipe, curated: dict[str, Any], index: pa.Table, parts: int
) -> dict[str, Any]:
    """The content of `dataset.json`."""
    names: list[str] = curated["classes"]
    shard_facts = {}
    for shard in pc.unique(index["shard"]).to_pylist():
        receipt = workspace.receipt(f"shards/{shard.removeprefix('data/').removesuffix('.tar')}")
        assert receipt is not None
        output = receipt.outputs[shard]
        samples = receipt.facts["samples"]
        shard_facts[shard] = {"path": shard, "samples": samples, "bytes": output["bytes"], "sha256": output["sha256"]}
    counts = tallied(index, len(names), list(curated["splits"]), shard_facts)
    copies = recipe.duplicates.for_images(curated["images"]).copies
    fetched = [workspace.receipt(f"fetch/part-{part:05d}") for part in range(parts)]
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "format": 1,
        "recipe": recipe.digest(),
        "made_with": {
            "animesion": version("animesion"),
            "pillow": PIL.__version__,
            **({"copies": extraction.version(copies)} if copies != "off" else {}),
        },
        "images": curated["kept"],
        "classes": len(names),
        "image_field": recipe.pack.format,
        "fields": sorted([recipe.pack.format, "cls", "json", *(["txt"] if recipe.pack.caption else [])]),
        "splits": counts["splits"],
        "split_strategy": curated["strategy"],
        "funnel": {
            "seen": curated["seen"],
            "fetched": sum(receipt.facts["fetched"] for receipt in fetched if receipt),
            "fetched_bytes": sum(receipt.facts["bytes"] for receipt in fetched if receipt),
            "kept": curated["kept"],
            "dropped": curated["dropped"],
        },
        "duplicate_clusters": curated["clusters"],
        "label_conflicts": curated["conflicts"],
        "long_tail": counts["long_tail"],
        "bands": counts["bands"],
        "class_names": names,
        "class_counts": counts["class_counts"],
        "notes": curated["notes"],
        **_removed(workspace),
    }


def tallied(
    index: pa.Table, classes: int, splits: Sequence[str], shards: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The parts of `dataset.json` that are counted from the index: splits, class counts, long tail and bands.

    Args:
        index: table with schema `animesion.schemas.INDEX`.
        classes: number of classes.
        splits: the splits, in order.
        shards: by path, the facts of each shard: `path samples bytes sha256`.
    """
    labels = index["label"].to_numpy()
    split_facts: dict[str, Any] = {}
    per_class = {}
    for split in splits:
        chosen = pc.equal(index["split"], split)
        per_class[split] = np.bincount(labels[chosen.to_numpy()], minlength=classes)
        listed = [dict(shards[shard]) for shard in sorted(pc.unique(index["shard"].filter(chosen)).to_pylist())]
        split_facts[split] = {
            "samples": pc.sum(chosen).as_py() or 0,
            "bytes": sum(shard["bytes"] for shard in listed),
            "shards": listed,
        }
    return {
        "splits": split_facts,
        "long_tail": long_tail.describe(np.sum(list(per_class.values()), axis=0)).to_dict(),
        "bands": asdict(long_tail.bands(per_class["train"])) if "train" in per_class else {},
        "class_counts": [{split: int(per_class[split][i]) for split in per_class} for i in range(classes)],
    }


def _removed(workspace: Workspace) -> dict[str, Any]:
    """The number of digests in the dataset's list of removed images, if it has one."""
    listed = removed.read(workspace.root)
    return {"removed_digests": len(listed)} if listed else {}


def _grid(index: pa.Table, curated: pa.Table) -> dict[str, list[tuple[str, int, int]]]:
    """Shard, offset and size of each image in the card's grid, by class name."""
    kept = curated.select(["kept", "key", "rating", "class_id", "label"]).filter(curated["kept"])
    ids, firsts = np.unique(kept["class_id"].to_numpy(), return_index=True)
    names = dict(zip(ids.tolist(), kept["label"].take(pa.array(firsts)).to_pylist(), strict=True))
    hidden = kept["key"].filter(pc.invert(pc.is_in(kept["rating"], value_set=pa.array(grid.SHOWN_RATINGS))))
    shown = index.filter(pc.invert(pc.is_in(index["key"], value_set=hidden.combine_chunks())))
    rows = grid.chosen(shown["key"], shown["label"].to_numpy())
    wanted = pa.array([key for _, keys in rows for key in keys], pa.string())
    wanted_rows = index.filter(pc.is_in(index["key"], value_set=wanted)).to_pylist()
    locations = {row["key"]: (row["shard"], row["offset"], row["size"]) for row in wanted_rows}
    return {names[label]: [locations[key] for key in keys] for label, keys in rows}


def _shards(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in facts["splits"].values() for shard in split["shards"]]


def _classes_csv(facts: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["class_id", "name", *facts["splits"], "total"])
    for i, (name, counts) in enumerate(zip(facts["class_names"], facts["class_counts"], strict=True)):
        writer.writerow([i, text_tables.cell_of(name), *counts.values(), sum(counts.values())])
    return out.getvalue()


def _timm_info(facts: dict[str, Any]) -> dict[str, Any]:
    """The file that timm's `wds/` reader reads: shard names relative to it, and the number of samples of each."""
    return {
        "splits": {
            name: {
                "name": name,
                "num_samples": split["samples"],
                "filenames": [shard["path"] for shard in split["shards"]],
                "shard_lengths": [shard["samples"] for shard in split["shards"]],
            }
            for name, split in facts["splits"].items()
        }
    }


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
