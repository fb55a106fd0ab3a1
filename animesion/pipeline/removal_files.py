"""The new files of a removal: shards, tables, receipts and the files that describe them, written into a hidden folder.

Files that stay are hard links there, so that the folder is a whole dataset, which is checked before anything moves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from animesion.config.decisions import Decisions
from animesion.config.recipe import Recipe
from animesion.dataset import shards, tags
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.images import hashing
from animesion.pipeline import fetch, finalize, pack, versions
from animesion.pipeline.curate import conflicts_note
from animesion.pipeline.removal_plan import STAGE, Plan, Request
from animesion.schemas import CURATED, EMBEDDINGS, FEATURES, INDEX, PAIRS, PLAN, RAW, TAGS
from animesion.storage import parquet, removed
from animesion.storage.removed import REMOVED, Removal
from animesion.storage.workspace import Workspace, atomic_file, sha256_file, write_atomic

#: The folder of the new files.
NEW = f"{STAGE}/new"


def write(request: Request, plan: Plan, note: str) -> dict[str, Any]:
    """Write all new files into the hidden folder; returns what is to be moved and deleted."""
    root = request.dataset.path
    shutil.rmtree(root / STAGE, ignore_errors=True)
    old, new = Workspace(root), Workspace(root / NEW)
    new.root.mkdir(parents=True)
    log = _log(request, note)
    write_atomic(new.path(REMOVED), removed.render([*removed.read(root), *log]).encode())
    if old.path(tags.VOCABULARY).is_file():
        for name in (tags.VOCABULARY, tags.ASSIGNED):  # finalize writes them again, without what goes
            shutil.copyfile(old.path(name), new.path(name))
        write_atomic(new.path(tags.DROPPED), tags.without_rare(old.path(tags.DROPPED), len(request.keys)).encode())
    recipe = _without_decisions(request.recipe, request)
    write_atomic(new.path("recipe.toml"), recipe.to_toml().encode())
    if recipe == request.recipe:
        _link(old.path("recipe.toml"), new.path("recipe.toml"))

    index = _write_shards(request, plan, new)
    parquet.write(new.path("index.parquet"), index)
    parts = _Parts(request, old, new)
    curated = _curated(request, parts.offsets)
    parquet.write(new.path("curated.parquet"), curated)
    parts.write_pairs()
    linked = _link_others(root, new.root, set(plan.emptied) | parts.deleted)
    facts = _facts(request, plan, recipe, index, new)
    outputs = finalize.describe(new, recipe, facts, index, curated)
    _check(new.root, plan)
    _write_receipts(request, plan, recipe, parts, new, {**outputs, "index.parquet": ""}.keys())
    linked |= {"recipe.toml"} if recipe == request.recipe else set()
    written = {path.relative_to(new.root).as_posix() for path in new.root.rglob("*") if path.is_file()}
    replace = sorted(written - linked)
    stale = {"plots/samples.jpg"} - written
    receipts = {
        path.relative_to(root).as_posix()
        for name in (
            "curate.json",
            "compare.json",
            "tags.json",
            "index.json",
            "thumbnails.json",
            "finalize.json",
            "pack",
            "shards",
        )
        for path in ([root / ".receipts" / name] if name.endswith(".json") else (root / ".receipts" / name).glob("*"))
        if path.is_file()
    }
    # what later builds make again, and the tables of a version that has the images
    packed = {
        path.relative_to(root).as_posix()
        for pattern in ("pack/*", f"{versions.FOLDER}/*/*")
        for path in root.glob(pattern)
        if path.is_file()
    }
    delete = sorted((set(plan.emptied) | parts.deleted | stale | receipts | packed) - set(replace))
    return {"plan": plan.to_dict(), "replace": replace, "delete": [name for name in delete if (root / name).exists()]}


def _log(request: Request, note: str) -> list[Removal]:
    """The digests of each image: of its file and pixels, of its post, and of what was packed."""
    columns = request.columns
    found = []
    for row in sorted(request.rows):
        post = removed.post_digest(columns["source"][row], columns["source_id"][row])
        entry = Removal(columns["sha256"][row], columns["pixels_blake3"][row], post, note)
        found += [entry] if any(entry[:3]) else []
        if columns["kept"][row]:
            sample = request.dataset[columns["key"][row]]
            pixels = hashing.of_pixels(sample.decode()).hex()
            found.append(Removal(hashlib.sha256(sample.image).hexdigest(), pixels, "", note))
    return found


def _without_decisions(recipe: Recipe, request: Request) -> Recipe:
    """The recipe without a curator's decisions on removed images."""
    decided = recipe.curate.decisions
    gone = request.keys | {re.sub(r"-face[0-9]+_*$", "", key) for key in request.keys}
    digests = {request.columns["sha256"][row] for row in request.rows}

    def sets(listed: Sequence[Sequence[str]]) -> list[list[str]]:
        left = ([key for key in keys if key not in gone] for keys in listed)
        return [keys for keys in left if len(keys) > 1]

    left = Decisions(
        exclude=[key for key in decided.exclude if key not in gone],
        label={key: label for key, label in decided.label.items() if key not in gone},
        same=sets(decided.same),
        different=sets(decided.different),
        pairs=[each for each in decided.pairs if not any(image[:64] in digests for image in each.images)],
        box={key: box for key, box in decided.box.items() if key not in gone},
        several=[key for key in decided.several if key not in gone],
    )
    if left == decided:
        return recipe
    return recipe.model_copy(update={"curate": recipe.curate.model_copy(update={"decisions": left})})


def _write_shards(request: Request, plan: Plan, new: Workspace) -> pa.Table:
    """Write the concerned shards without the removed samples; returns the new index."""
    dataset = request.dataset
    known = {shard.path: shard for split in dataset.splits.values() for shard in split.shards}
    group_of = dict(zip(request.columns["key"], request.columns["group"], strict=True))
    values = request.index.to_pydict()
    rows_of: dict[str, list[int]] = {}
    for row, shard in enumerate(values["shard"]):
        rows_of.setdefault(shard, []).append(row)
    for shard in (*plan.rewritten, *plan.emptied):
        path = dataset.path / shard
        if sha256_file(path) != known[shard].sha256:
            raise UsageError(f"{path} does not have the SHA-256 in dataset.json: run `animesion verify`")
    for shard in plan.rewritten:
        rows = sorted(rows_of[shard], key=lambda row: values["sample_offset"][row])
        with (dataset.path / shard).open("rb") as source, atomic_file(new.path(shard)) as out:
            for row in rows:
                key = values["key"][row]
                if key in request.keys:
                    continue
                source.seek(values["sample_offset"][row])
                block = source.read(values["sample_size"][row])
                if renamed := request.groups.get(group_of.get(key, "")):
                    block = _regrouped(key, block, renamed)
                header = shards.header(f"{key}.{dataset.image_field}", values["size"][row])
                values["offset"][row] = out.position + block.index(header) + shards.BLOCK
                values["sample_offset"][row], values["sample_size"][row] = out.position, len(block)
                out.write(block)
            out.write(shards.END)
    left = [key not in request.keys for key in values["key"]]
    return pa.table(values, schema=INDEX).filter(pa.array(left))


def _regrouped(key: str, block: bytes, group: str) -> bytes:
    """A sample whose JSON member names another group."""
    fields = shards.sample_members(key, block)
    described = json.loads(fields["json"]) | {"group": group}
    fields["json"] = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    return shards.sample(key, fields)


def _curated(request: Request, offsets: Mapping[int, Mapping[int, int]]) -> pa.Table:
    """`curated.parquet` without the rows that go, and without their keys in other rows.

    Args:
        request: the removal.
        offsets: by part, the new offset in the tar of each old one.
    """
    left = [row for row in range(len(request.curated)) if row not in request.rows]
    table = request.curated.take(pa.array(left, pa.int64()))
    values = {
        name: table[name].to_pylist()
        for name in (
            "group",
            "keeper",
            "resembles",
            "verdict",
            "how",
            "inliers",
            "residual",
            "detail",
            "part",
            "offset",
        )
    }
    word = _mentions(request)
    for i in range(len(table)):
        values["group"][i] = request.groups.get(values["group"][i], values["group"][i])
        if values["resembles"][i] in request.keys:
            for name, empty in (("resembles", ""), ("verdict", ""), ("how", ""), ("inliers", 0), ("residual", 0.0)):
                values[name][i] = empty
        if values["keeper"][i] in request.keys:
            values["keeper"][i] = ""
        if values["detail"][i] and word.search(values["detail"][i]):
            values["detail"][i] = ""
        values["offset"][i] = offsets.get(values["part"][i], {}).get(values["offset"][i], values["offset"][i])
    for name, column in values.items():
        table = table.set_column(CURATED.names.index(name), name, pa.array(column, CURATED.field(name).type))
    return table


def _mentions(request: Request) -> re.Pattern[str]:
    """Matches a text that names a removed image by its key, path, URL or digest."""
    columns = request.columns
    named = set(request.keys)
    for row in request.rows:
        texts = [columns[name][row] for name in ("source_id", "page_url", "file_url", "md5", "sha256", "pixels_blake3")]
        named.update(text for text in texts if text and not text.isdigit())
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, sorted(named)))})(?![\w-])")


class _Parts:
    """The originals and features of a build folder without the removed images; nothing where there are none.

    Attributes:
        offsets: by part, the new offset in the tar of each old one.
        deleted: files that name removed images and are made again by a later build.
        bytes_: SHA-256 of the files that go.
    """

    def __init__(self, request: Request, old: Workspace, new: Workspace) -> None:
        self._old, self._new, self._request = old, new, request
        self.offsets: dict[int, dict[int, int]] = {}
        self.deleted = {"features/compared.parquet", "features/searched.parquet"}
        columns = request.columns
        ids = ((columns["source"][row], columns["source_id"][row]) for row in request.rows)
        self._gone = {(source, source_id) for source, source_id in ids if source_id}
        self.bytes_ = {columns["sha256"][row] for row in request.rows} - {""}
        for path in sorted(old.path("raw").glob("part-*.parquet")):
            if match := re.fullmatch(r"part-([0-9]{5,})\.parquet", path.name):
                self._write(int(match[1]))
        for path in sorted(old.path("features").glob("part-*.parquet")):  # a copy of a dataset has no raw/
            if not old.path("raw", path.name).exists():
                self._filter(f"features/{path.name}", FEATURES, request.keys)

    def _write(self, part: int) -> None:
        name = f"part-{part:05d}"
        raw = parquet.read(self._old.path(f"raw/{name}.parquet"), RAW)
        rows = raw.to_pylist()
        gone = [(row["source"], row["source_id"]) in self._gone or row["sha256"] in self.bytes_ for row in rows]
        keys = {row["key"] for row, is_gone in zip(rows, gone, strict=True) if is_gone}
        if not keys:
            return
        moved: dict[int, int] = {}
        tar = self._old.path(f"raw/{name}.tar")
        if tar.is_file():
            with atomic_file(self._new.path(f"raw/{name}.tar")) as out:
                for row, is_gone in zip(rows, gone, strict=True):
                    if row["reason"] or is_gone:
                        continue
                    place = out.position + shards.BLOCK
                    content = shards.read(tar, row["offset"], row["bytes"])
                    out.write(shards.member(f"{row['key']}.{row['extension']}", content))
                    moved[row["offset"]] = row["offset"] = place
                out.write(shards.END)
        left = [row for row, is_gone in zip(rows, gone, strict=True) if not is_gone]
        parquet.write(self._new.path(f"raw/{name}.parquet"), parquet.table(left, RAW))
        self.offsets[part] = moved
        self._filter(f"raw/{name}.plan.parquet", PLAN, keys)
        self._filter(fetch.tags_name(part), TAGS, keys)
        self._filter(f"features/{name}.parquet", FEATURES, keys)
        self._filter(f"features/embeddings-{name}.parquet", EMBEDDINGS, keys)

    def _filter(self, name: str, schema: pa.Schema, keys: Iterable[str]) -> None:
        """Write a table without the rows of some keys, if it is there and has any.

        Features that another version wrote are deleted, as a build of this version computes them again.
        """
        if self._old.path(name).is_file():
            try:
                table = parquet.read(self._old.path(name), schema)
            except parquet.DamagedTableError:
                if not name.startswith("features/"):
                    raise
                self.deleted.add(name)
                return
            gone = pc.is_in(table["key"], value_set=pa.array(sorted(keys), pa.string()))
            if pc.any(gone).as_py():
                parquet.write(self._new.path(name), table.filter(pc.invert(gone)))

    def write_pairs(self) -> None:
        """Write the verdicts on pairs without those of removed images."""
        path = self._old.path("features/pairs.parquet")
        if path.is_file():
            try:
                table = parquet.read(path, PAIRS)
            except parquet.DamagedTableError:
                self.deleted.add("features/pairs.parquet")
                return
            keys = pa.array(sorted(self._request.keys), pa.string())
            gone = pc.or_(*(pc.is_in(table[name], value_set=keys) for name in ("first", "second")))
            if pc.any(gone, min_count=0).as_py():
                parquet.write(self._new.path("features/pairs.parquet"), table.filter(pc.invert(gone)))


def _facts(request: Request, plan: Plan, recipe: Recipe, index: pa.Table, new: Workspace) -> dict[str, Any]:
    """The content of the new `dataset.json`."""
    dataset, columns = request.dataset, request.columns
    facts = json.loads((dataset.path / "dataset.json").read_bytes())
    shard_facts = {
        shard.path: asdict(shard)
        for split in dataset.splits.values()
        for shard in split.shards
        if shard.path not in plan.emptied
    }
    for shard in plan.rewritten:
        path = new.path(shard)
        samples = pc.sum(pc.equal(index["shard"], shard)).as_py()
        shard_facts[shard] |= {"samples": samples, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    there = set(pc.unique(index["split"]).to_pylist())
    dropped = Counter(columns["reason"][row] for row in request.rows if not columns["kept"][row])
    of_cluster: dict[str, set[str]] = {}
    for row in request.rows:
        if columns["cluster"][row]:
            of_cluster.setdefault(columns["cluster"][row], set()).add(columns["label"][row])
    # an image with several rows was fetched once
    files = {
        (columns["source"][row], columns["source_id"][row]): request.curated["bytes"][row].as_py()
        for row in request.rows
        if columns["sha256"][row]
    }
    word = _mentions(request)
    listed = removed.read(new.root)
    try:
        funnel = facts["funnel"]
        clusters = max(0, facts["duplicate_clusters"] - len(of_cluster))
        conflicts = max(0, facts["label_conflicts"] - sum(len(each) > 1 for each in of_cluster.values()))
        counted = conflicts_note(facts["label_conflicts"], facts["duplicate_clusters"])
        notes = []
        for note in facts["notes"]:
            if note in counted:
                notes += conflicts_note(conflicts, clusters)
            elif not word.search(note):
                notes.append(note)
        facts |= finalize.tallied(
            index, len(dataset.classes), [name for name in facts["splits"] if name in there], shard_facts
        )
        facts |= {
            "recipe": recipe.digest() if recipe != request.recipe else facts["recipe"],
            "images": len(index),
            "funnel": {
                **funnel,
                "seen": funnel["seen"] - len(request.rows),
                "kept": len(index),
                "fetched": max(0, funnel["fetched"] - len(files)),
                "fetched_bytes": max(0, funnel["fetched_bytes"] - sum(files.values())),
                "dropped": {
                    reason: count - dropped[reason]
                    for reason, count in funnel["dropped"].items()
                    if count > dropped[reason]
                },
            },
            "duplicate_clusters": clusters,
            "label_conflicts": conflicts,
            "notes": notes,
            "removed_digests": len(listed),
            "parent": (digest := sha256_file(dataset.path / "dataset.json")),
            "added": 0,
            "removed": facts["images"] - len(index),
            "lineage": versions.next_lineage(facts, digest),
            "emptied_shards": sorted({*facts.get("emptied_shards", ()), *plan.emptied}),
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{dataset.path / 'dataset.json'} lacks facts of a build ({error}): run `animesion build` again"
        ) from None
    return dict(facts)


def _check(root: Path, plan: Plan) -> None:
    """Check that the new files are a dataset, and that every new shard can be read to its end."""
    dataset = Dataset(root)
    index = dataset.index
    for shard in plan.rewritten:
        count = sum(member.name.endswith(".cls") for member in shards.members(root / shard))
        if count != pc.sum(pc.equal(index["shard"], shard)).as_py():
            raise RuntimeError(f"{shard} was not written as its index says")


def _write_receipts(
    request: Request, plan: Plan, recipe: Recipe, parts: _Parts, new: Workspace, written: Iterable[str]
) -> None:
    """Receipts of the originals and features that are left, so that a later build asks no site again.

    Shards get receipts that no build takes for its own, but deletes with the shard where it makes fewer of them.
    """
    old = Workspace(request.dataset.path)
    if not old.path(".receipts").is_dir():
        return
    before, after = fetch.removed_images(old, request.recipe), fetch.removed_images(new, recipe)
    plan_receipt = old.receipt("plan")
    digests: list[str] = []
    items = 0
    for part in range(len(plan_receipt.facts["parts"]) if plan_receipt else 0):
        name = f"part-{part:05d}"
        keys = parquet.read(new.path(fetch.plan_name(part)), PLAN, ("key",))["key"].to_pylist()
        old_keys = parquet.read(old.path(fetch.plan_name(part)), PLAN, ("key",))["key"].to_pylist()
        items += len(keys)
        digests.append(sha256_file(new.path(fetch.plan_name(part))))
        fetched = old.receipt(f"fetch/{name}")
        if fetched is None or not old.intact(fetched):
            continue
        raw = parquet.read(new.path(f"raw/{name}.parquet"), RAW, ("reason", "bytes"))
        got = raw.filter(pc.equal(raw["reason"], ""))
        facts: dict[str, Any] = {"items": len(raw), "fetched": len(got), "bytes": pc.sum(got["bytes"]).as_py() or 0}
        params = fetched.params
        if params == fetch.params(request.recipe, old_keys, before):
            params = fetch.params(recipe, keys, after)
        outputs = {path: sha256_file(new.path(path)) for path in fetched.outputs}
        new.commit(fetched.unit, fetched.code, params, {"plan": digests[-1]}, outputs, {**fetched.facts, **facts})
        for unit in (f"inspect/{name}", f"embed/{name}"):
            receipt = old.receipt(unit)
            if receipt is None or not old.intact(receipt) or parts.deleted.intersection(receipt.outputs):
                continue
            inputs = {path: outputs.get(path, digest) for path, digest in receipt.inputs.items()}
            made = {path: sha256_file(new.path(path)) for path in receipt.outputs}
            facts = dict(receipt.facts)
            if "followed" in facts:
                facts["followed"] = [digest for digest in facts["followed"] if digest not in parts.bytes_]
            if "crashed" in facts:
                facts["crashed"] = [key for key in facts["crashed"] if key in set(keys)]
            new.commit(unit, receipt.code, receipt.params, inputs, made, facts)
    if plan_receipt and plan_receipt.facts["parts"]:
        word = _mentions(request)
        notes = [note for note in plan_receipt.facts["notes"] if not word.search(note)]
        facts = {"parts": digests, "items": items, "notes": notes}
        if plan_receipt.facts.get("tags"):
            facts["tags"] = [sha256_file(new.path(fetch.tags_name(part))) for part in range(len(digests))]
        if plan_receipt.facts.get("parent"):  # what is left is what the next version is built onto
            facts["parent"] = sha256_file(new.path("dataset.json"))
            versions.keep(new, facts["parent"])
        # without the stamp of a local source, as it is listed again: what it still has is then dropped as removed
        new.commit("plan", plan_receipt.code, plan_receipt.params, {}, fetch.FetchPlan.of(facts).outputs, facts)
    for split in Dataset(new.root).splits.values():
        for shard in split.shards:
            unit = f"shards/{shard.path.removeprefix('data/').removesuffix('.tar')}"
            outputs = {shard.path: shard.sha256}
            new.commit(unit, pack.CODE, "removal", {}, outputs, {"samples": shard.samples})
    if recipe != request.recipe:
        write_atomic(new.path(".receipts/recipe.json"), json.dumps({"digest": recipe.digest()}).encode())
    crashed = old.path(".receipts/crashed.json")
    if crashed.is_file():
        with contextlib.suppress(ValueError, AttributeError):
            left = {key: text for key, text in json.loads(crashed.read_bytes()).items() if key not in request.keys}
            write_atomic(new.path(".receipts/crashed.json"), json.dumps(left, sort_keys=True).encode())


def _link_others(root: Path, new: Path, without: set[str]) -> set[str]:
    """Link every file of the tables, shards and originals that stays; returns their names."""
    linked = set()
    for pattern in ("data/*.tar", "raw/*.tar", "raw/*.parquet", "features/*.parquet"):
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            if path.is_file() and name not in without and not (new / name).exists():
                _link(path, new / name)
                linked.add(name)
    return linked


def _link(path: Path, to: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.unlink(missing_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)
