"""Stage 1: from a source to `raw/part-*.tar` (original bytes) and `.parquet` (provenance, one row a picture).

The source's listing is cut into parts and written as `raw/part-*.plan.parquet` first; each part is then fetched on its
own. Failures are rows with a reason. Pictures that metadata alone would drop are not fetched.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Self

from animesion import digests, images, rules, shards, sources, tables
from animesion.engine import Engine
from animesion.errors import UsageError
from animesion.recipe import Recipe
from animesion.records import PLAN, RAW, Item, Payload
from animesion.settings import params_digest
from animesion.workspace import Workspace, atomic_file

CODE = "fetch-1"
#: Pictures a part: small enough that workers share the load, large enough that files stay few.
PART_ITEMS = 500


@dataclass(frozen=True)
class Plan:
    """The cut listing.

    Attributes:
        parts: digest of each part's plan, by part number.
        items: pictures in all.
        notes: sentences of the source about what it passed over.
    """

    parts: list[str]
    items: int
    notes: list[str]


@dataclass(frozen=True)
class FetchJob:
    """Fetch one part."""

    workspace: Workspace
    recipe: Recipe
    part: int
    plan_digest: str

    @property
    def name(self) -> str:
        """Unit of the receipt."""
        return f"fetch/part-{self.part:05d}"

    def run(self) -> dict[str, int]:
        """Fetch, write, commit; returns how many came and how many bytes."""
        source = sources.make(self.recipe)
        with source.session():
            return self.fetch_from(source)

    def fetch_from(self, source: sources.Source) -> dict[str, int]:
        """Fetch with a source whose session is open."""
        items = tables.plan_items(tables.read(self.workspace.path(plan_name(self.part)), PLAN))
        tar_name, table_name = f"raw/part-{self.part:05d}.tar", f"raw/part-{self.part:05d}.parquet"
        reasons = {item.key: self._known_reason(item) for item in items}
        rows: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            had = stack.enter_context(_Earlier(self)) if source.remote else {}
            payloads = source.read([item for item in items if not reasons[item.key] and item.key not in had])
            tar = stack.enter_context(atomic_file(self.workspace.path(tar_name)))
            for item in items:
                row = _row(item) | {"reason": reasons[item.key]}
                if not row["reason"]:
                    payload = had[item.key] if item.key in had else next(payloads)
                    row |= {"reason": payload.reason, "detail": payload.detail}
                    if not payload.reason:
                        row |= {**_described(payload.content), "offset": tar.position + shards.BLOCK}
                        tar.write(shards.member(f"{item.key}.{row['extension']}", payload.content))
                rows.append(row)
            tar.write(shards.END)
        outputs = {
            tar_name: tar.sha256,
            table_name: tables.write(self.workspace.path(table_name), tables.table(rows, RAW)),
        }
        facts = {
            "items": len(rows),
            "fetched": sum(not row["reason"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows if not row["reason"]),
        }
        self.workspace.commit(self.name, CODE, params(self.recipe), {"plan": self.plan_digest}, outputs, facts)
        return facts

    def _known_reason(self, item: Item) -> str:
        """Why an item is not worth reading; what metadata says comes before what is wrong with the file."""
        if item.failure in {"bad record", "not visible"}:  # then the rest of the metadata says little
            return item.failure
        return rules.metadata_reason(item.labels, item.rating, item.flags, item.boxes, self.recipe) or item.failure


def params(recipe: Recipe) -> str:
    """Digest of what the stage takes from the recipe."""
    values = recipe.model_dump(mode="json", include={"source", "label", "filter", "crop"})
    return params_digest({**values, "crop": {k: values["crop"][k] for k in ("detector", "min_score")}})


def plan_name(part: int) -> str:
    """Where a part's plan lies."""
    return f"raw/part-{part:05d}.plan.parquet"


def listed(
    workspace: Workspace, recipe: Recipe, source: sources.Source, advance: Callable[[int], None] = lambda count: None
) -> Plan:
    """List the source, or take the remembered listing of a remote one."""
    options = params_digest(recipe.source.model_dump(mode="json"))
    known = workspace.done("plan", CODE, options, {})
    if known is not None and source.remote:
        return Plan(known.facts["parts"], known.facts["items"], known.facts["notes"])
    outputs: dict[str, str] = {}
    count, keys = 0, set[str]()
    for part, chunk in enumerate(_chunks(source.items())):
        if recipe.crop.detector == "boxes" and any(item.boxes is None for item in chunk):
            raise UsageError(
                f"crop.detector is 'boxes' but source '{recipe.source.kind}' was given no table of boxes: "
                "set source.faces where the source takes it, or crop.detector=none"
            )
        fresh = {item.key for item in chunk}
        if len(fresh) < len(chunk) or not keys.isdisjoint(fresh):
            doubled = next(
                item.source_id for item in chunk if item.key in keys or sum(i.key == item.key for i in chunk) > 1
            )
            raise UsageError(f"the source lists {doubled!r} twice; list every picture once")
        keys |= fresh
        name = plan_name(part)
        outputs[name] = tables.write(workspace.path(name), tables.plan_table(chunk))
        count += len(chunk)
        advance(len(chunk))
    if not count:
        raise UsageError(f"the source of recipe {recipe.name} lists no pictures: check its [source] options")
    digests_in_order = [outputs[plan_name(part)] for part in range(len(outputs))]
    facts = {"parts": digests_in_order, "items": count, "notes": source.notes}
    workspace.commit("plan", CODE, options, {}, outputs, facts)
    return Plan(digests_in_order, count, list(source.notes))


def run(
    workspace: Workspace,
    recipe: Recipe,
    engine: Engine,
    plan: Plan,
    source: sources.Source,
    advance: Callable[[int], None],
) -> None:
    """Fetch every part that has no valid receipt."""
    jobs = []
    for part, digest in enumerate(plan.parts):
        job = FetchJob(workspace, recipe, part, digest)
        receipt = workspace.done(job.name, CODE, params(recipe), {"plan": digest})
        if receipt:
            advance(receipt.facts["items"])
        else:
            jobs.append(job)
    workspace.forget("fetch", {f"fetch/part-{part:05d}" for part in range(len(plan.parts))})
    if source.remote:  # one process keeps to the rate limits
        for job in jobs:
            advance(job.fetch_from(source)["items"])
    else:
        engine.run(jobs, lambda job, facts: advance(facts["items"]))


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(itertools.islice(items, PART_ITEMS)):
        yield chunk


class _Earlier(Mapping[str, Payload]):
    """Bytes that an earlier fetch of the same listing brought, under another recipe: a site is not asked twice."""

    def __init__(self, job: FetchJob) -> None:
        self._path = job.workspace.path(f"raw/part-{job.part:05d}.tar")
        self._places: dict[str, tuple[int, int]] = {}
        self._tar: IO[bytes] | None = None
        receipt = job.workspace.receipt(job.name)
        if receipt and receipt.inputs == {"plan": job.plan_digest} and job.workspace.intact(receipt):
            raw = tables.read(self._path.with_suffix(".parquet"), RAW, ("key", "reason", "offset", "bytes")).to_pylist()
            self._places = {row["key"]: (row["offset"], row["bytes"]) for row in raw if not row["reason"]}

    def __enter__(self) -> Self:
        if self._places:
            self._tar = self._path.open("rb")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tar:
            self._tar.close()

    def __getitem__(self, key: str) -> Payload:
        offset, size = self._places[key]
        assert self._tar is not None
        self._tar.seek(offset)
        return Payload(self._tar.read(size))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _described(content: bytes) -> dict[str, Any]:
    found = digests.of_bytes(content)
    # what is unknown still needs a name in the tar
    extension = images.sniff(content) or "bin"
    return {"md5": found.md5, "sha256": found.sha256, "bytes": len(content), "extension": extension}


def _row(item: Item) -> dict[str, Any]:
    return {
        "key": item.key,
        "source": item.source,
        "source_id": item.source_id,
        "order": item.order,
        "labels": list(item.labels),
        "families": list(item.families),
        "boxes": None if item.boxes is None else [box._asdict() for box in item.boxes],
        "split": item.split,
        "class_order": item.class_order,
        "rating": item.rating,
        "flags": list(item.flags),
        "page_url": item.page_url,
        "file_url": item.file_url,
        "licence": item.licence,
        "author": item.author,
        "md5": item.md5,
        "bytes": item.bytes,
        "sha256": "",
        "extension": "",
        "offset": 0,
        "reason": "",
        "detail": item.detail,
    }
