"""Stage 1: fetch a source's images into `raw/part-*.tar` (bytes) and `raw/part-*.parquet` (one row per image).

The source's listing is first cut into parts and written as `raw/part-*.plan.parquet`; then each part is fetched on its
own. A failure is a row with a reason. Images that metadata alone drops are not fetched. How a crawl resumes within a
part is up to the source (`animesion.sources.crawled`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

import pyarrow as pa

from animesion import sources
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dataset import shards
from animesion.errors import UsageError
from animesion.executors import Executor
from animesion.images import codec, hashing, opt_outs
from animesion.pipeline import rules, versions
from animesion.schemas import PLAN, RAW, TAG_CATEGORIES, TAGS, DropReason, Item, Payload
from animesion.storage import parquet, removed
from animesion.storage.workspace import Workspace, atomic_file, write_atomic
from animesion.wording import amount

if TYPE_CHECKING:
    from animesion_scrapers import CrawlStatus

CODE = "fetch-1"
#: Images per part: small enough to spread the load over workers, large enough to keep the number of files low.
PART_ITEMS = 500


@dataclass(frozen=True)
class FetchPlan:
    """A listing, cut into parts.

    Attributes:
        parts: digest of each part's plan, by part number.
        items: number of images in all parts.
        notes: sentences from the source about entries that it skipped.
        parent: digest of the version of the dataset that the build is made onto; empty for a build of its own.
        compact: whether the samples of the parent get new shards.
        tags: digest of the table of each part's tags, by part number; empty if the recipe asks for no tags.
    """

    parts: list[str]
    items: int
    notes: list[str]
    parent: str = ""
    compact: bool = False
    tags: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """The plan that a receipt states."""
        names = ("parts", "items", "notes", "parent", "compact", "tags")
        return cls(**{name: facts[name] for name in names if name in facts})

    @property
    def outputs(self) -> dict[str, str]:
        """Digest by name of the files of the listing."""
        found = {plan_name(part): digest for part, digest in enumerate(self.parts)}
        return found | {tags_name(part): digest for part, digest in enumerate(self.tags)}


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
        """Fetch, write and commit; returns the numbers of images and bytes."""
        source = sources.make(self.recipe)
        with source.session():
            return self.fetch_from(source)

    def fetch_from(self, source: sources.Source) -> dict[str, int]:
        """Fetch from a source whose session is open; returns the receipt's facts."""
        items = parquet.plan_items(parquet.read(self.workspace.path(plan_name(self.part)), PLAN))
        tar_name, table_name = f"raw/part-{self.part:05d}.tar", f"raw/part-{self.part:05d}.parquet"
        refused = removed_images(self.workspace, self.recipe)
        reasons = {item.key: known_reason(item, self.recipe, refused) for item in items}
        rows: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            earlier = stack.enter_context(_EarlierFetch(self)) if source.remote else {}
            # Payloads come in the order of this list, so the loop takes the next one for each item to fetch.
            payloads = source.read([item for item in items if not reasons[item.key] and item.key not in earlier])
            tar = stack.enter_context(atomic_file(self.workspace.path(tar_name)))
            for item in items:
                row = _row(item) | {"reason": reasons[item.key]}
                if not row["reason"]:
                    payload = earlier[item.key] if item.key in earlier else next(payloads)
                    row |= {"reason": payload.reason, "detail": payload.detail}
                    content_facts = {} if payload.reason else _content_facts(payload)
                    if content_facts and content_facts["sha256"] in refused.bytes_:
                        row["reason"] = DropReason.REMOVED
                    elif content_facts and self.recipe.filter.opt_outs:
                        row["reason"], row["detail"] = opt_outs.find(payload.content, codec.sniff(payload.content))
                    if not row["reason"]:
                        row |= {**content_facts, "offset": tar.position + shards.BLOCK}
                        tar.write(shards.member(f"{item.key}.{row['extension']}", payload.content))
                rows.append(_anonymous(row) if row["reason"] == DropReason.REMOVED else row)
            tar.write(shards.END)
        outputs = {
            tar_name: tar.sha256,
            table_name: parquet.write(self.workspace.path(table_name), parquet.table(rows, RAW)),
        }
        facts = {
            "items": len(rows),
            "fetched": sum(not row["reason"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows if not row["reason"]),
            "opt_outs": self.recipe.filter.opt_outs,
        }
        crawled = source if isinstance(source, sources.Crawled) else None
        if crawled:
            facts |= crawled.counts(items)._asdict()
        digest = params(self.recipe, (item.key for item in items), refused)
        self.workspace.commit(self.name, CODE, digest, {"plan": self.plan_digest}, outputs, facts)
        if crawled:  # only now that the tar is committed may the crawl delete its own copies
            crawled.release(items)
        return facts


def removed_images(workspace: Workspace, recipe: Recipe) -> removed.Removed:
    """The images that were removed on request: from the output itself, or from what the recipe lists.

    Raises:
        UsageError: a list cannot be read.
    """
    others = (*recipe.curate.removed, *recipe.duplicates.against)
    return removed.combined([place for place in (workspace.root, *map(Path, others)) if place.exists()])


def known_reason(item: Item, recipe: Recipe, refused: removed.Removed | None = None) -> str:
    """The drop reason known before fetching, or an empty string; metadata rules come before the item's own failure."""
    if refused and refused.has(source=item.source, source_id=item.source_id):
        return DropReason.REMOVED
    # The other metadata of such an item is incomplete, so rules on it would report a misleading reason.
    if item.failure in {DropReason.BAD_RECORD, DropReason.NOT_VISIBLE}:
        return item.failure
    return rules.metadata_reason(item, recipe) or item.failure


def _anonymous(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a removed image, without whatever tells what it was."""
    empty = {"source_id": "", "page_url": "", "file_url": "", "licence": "", "author": "", "md5": "", "bytes": 0}
    return {**row, **empty, "labels": [], "families": [], "boxes": None, "detail": "", "flags": [], "rating": ""}


def params(recipe: Recipe, keys: Iterable[str], refused: removed.Removed | None = None) -> str:
    """Digest of what the fetch of some keys depends on: values of the recipe, and the images that are refused."""
    values = recipe.model_dump(mode="json", include={"source", "label", "filter", "crop"})
    # Only the boxes of a table decide before an image is fetched, and a curator's decision on a box overrides them.
    names = ("detector", "min_score", "unsure_score", "unsure", "faces") if recipe.crop.table_decides else ()
    decided = recipe.curate.decisions.box if names else {}
    crop = {name: values["crop"][name] for name in names}
    values |= {"crop": crop, "decided": sorted(key for key in keys if key in decided)}
    values |= {"opt_outs": opt_outs.version()} if recipe.filter.opt_outs else {}
    return params_digest({**values, "removed": refused.digest()} if refused else values)


def plan_name(part: int) -> str:
    """Path of a part's plan inside the output folder."""
    return f"raw/part-{part:05d}.plan.parquet"


def tags_name(part: int) -> str:
    """Path of the tags of a part's images inside the output folder."""
    # not in the plan, whose digest decides what is fetched: a build that asks for tags later fetches nothing again
    return f"raw/part-{part:05d}.tags.parquet"


class CrawlProgress:
    """Converts the status of a crawl into progress events: images done, and one line of text.

    Args:
        advance: called with the number of images done since the last call.
        show_status: called with the line of text.
    """

    def __init__(self, advance: Callable[[int], None], show_status: Callable[[str], None]) -> None:
        self._advance, self._show_status = advance, show_status
        self._finished = 0
        # Images of the current part that were reported one by one, and must not be counted again with the part.
        self._reported = 0

    def __call__(self, status: CrawlStatus) -> None:
        """Report a new status of the crawl."""
        new = status.finished - self._finished
        self._finished += new
        self._reported += new
        parts = [f"{sum(status.failures.values()):,} failed"] if status.failures else []
        parts += [f"{host} {state}" for host, state in status.hosts.items()]
        parts += [f"circuit of {host} opened {times}x" for host, times in status.circuits_opened.items()]
        self._show_status("; ".join(parts))
        self._advance(new)

    def part_done(self, items: int) -> None:
        """Report a finished part of so many images, less those that were reported one by one."""
        self._advance(items - self._reported)
        self._reported = 0


@contextlib.contextmanager
def opened(
    source: sources.Source, workspace: Workspace, progress: CrawlProgress, *, retry_failed: bool = False
) -> Iterator[None]:
    """Open a source for listing and reading; a crawled source keeps its ledger in the workspace."""
    if isinstance(source, sources.Crawled):
        source.crawl_in(workspace.path(".crawl"), retry_refused=retry_failed, watch=progress)
    with source.session():
        yield


def make_plan(
    workspace: Workspace,
    recipe: Recipe,
    source: sources.Source,
    advance: Callable[[int], None] = lambda count: None,
    *,
    update: bool = False,
    compact: bool = False,
) -> FetchPlan:
    """List the source, or reuse the stored listing of a remote source, or of one whose files have not changed.

    Args:
        workspace: the output folder.
        recipe: the recipe.
        source: the open source.
        advance: called with the number of images listed since the last call.
        update: extend the stored listing by images that are new at the source. A finished dataset becomes the parent
            of the one that is built next.
        compact: with `update`: give all samples new shards.

    Raises:
        UsageError: no images, an image listed twice, boxes requested but not given, a source that cannot update, or
            one that has changed although a version was built onto another.
    """
    with_tags = bool(recipe.tags.categories)
    listed = recipe.source.model_dump(mode="json")
    options = params_digest({"source": listed, "tags": True} if with_tags else listed)
    stamp = source.stamp() if isinstance(source, sources.Stamped) else ""
    inputs = {"stamp": stamp} if stamp else {}
    before = workspace.receipt("plan")
    before = before if before and before.code == CODE and workspace.intact(before) else None
    if update and before and before.params != options:
        raise UsageError(
            f"--update adds to the listing in {workspace.root}, which is of other [source] options, or with or without "
            "tags: give the same ones, or build into another folder"
        )
    known = before if before and before.params == options else None
    plan = FetchPlan.of(known.facts) if known else None
    if plan and (source.remote or (known and stamp and known.inputs == inputs)) and not (update and source.remote):
        return _compacted(workspace, plan, options, inputs) if update and compact else plan
    digests: list[str] = []
    tags: list[str] = []
    written = before.outputs if before else {}
    keys = _Keys(workspace)
    count, parent = 0, ""
    items: Iterable[Item]
    grown = plan is not None and (update or bool(plan.parent))
    if plan and grown:
        digests, tags = list(plan.parts), list(plan.tags)
        for part in range(len(digests)):
            keys.add_part(part)
        count, parent = plan.items, plan.parent
        # New images start a new part even if the last one is short, so that fetched parts keep their digests.
        if source.remote:
            if not isinstance(source, sources.Crawled):
                raise UsageError(
                    f"source '{recipe.source.kind}' cannot list only new images: build into another folder"
                )
            last = parquet.plan_items(parquet.read(workspace.path(plan_name(len(digests) - 1)), PLAN))
            items = source.items_after(last[-1])
        else:
            items = _new_items(workspace, plan, source)
    else:
        # A local source is listed again unless its stamp tells that no file has changed.
        items = source.items()
    for chunk in _chunks(iter(items)):
        if plan and plan.parent and not update:
            raise UsageError(
                f"{workspace.root} has versions (see `animesion log`), and its source has new images: add --update for "
                "another version, or build into another folder"
            )
        if "boxes" in recipe.crop.detectors and any(item.boxes is None for item in chunk):
            raise UsageError(
                f"crop.detector has 'boxes' but source '{recipe.source.kind}' was given no table of boxes: "
                "set source.faces where the source takes it, or crop.detector=none"
            )
        repeated = keys.add_chunk(chunk)
        if repeated:
            raise UsageError(f"the source lists {repeated.source_id!r} twice; list every image once")
        if with_tags:
            tags.append(_write_table(workspace, tags_name(len(digests)), _tags_table(chunk), written))
        digests.append(_write_table(workspace, plan_name(len(digests)), parquet.plan_table(chunk), written))
        count += len(chunk)
        advance(len(chunk))
    if not count:
        raise UsageError(f"the source of recipe {recipe.name} lists no images: check its [source] options")
    notes = list(source.notes)
    if plan and grown:
        if len(digests) == len(plan.parts):
            found = replace(plan, notes=notes or plan.notes)
            return (
                _compacted(workspace, found, options, inputs) if compact else _stored(workspace, found, options, inputs)
            )
        parent = versions.begin(workspace) or parent
        notes = notes or plan.notes
    return _stored(workspace, FetchPlan(digests, count, notes, parent, compact, tags), options, inputs)


def _stored(workspace: Workspace, plan: FetchPlan, options: str, inputs: Mapping[str, str]) -> FetchPlan:
    """Commit a plan, unless it is what the receipt states."""
    facts = {"parts": plan.parts, "items": plan.items, "notes": plan.notes}
    facts |= {"parent": plan.parent, "compact": plan.compact} if plan.parent else {}
    facts |= {"tags": plan.tags} if plan.tags else {}
    known = workspace.done("plan", CODE, options, inputs)
    if known is None or known.facts != facts:
        workspace.commit("plan", CODE, options, inputs, plan.outputs, facts)
    return FetchPlan.of(facts)


def _compacted(workspace: Workspace, plan: FetchPlan, options: str, inputs: Mapping[str, str]) -> FetchPlan:
    """The plan of a version with the same images in new shards."""
    parent = versions.begin(workspace) or plan.parent
    return _stored(workspace, replace(plan, parent=parent, compact=bool(parent)), options, inputs)


def _new_items(workspace: Workspace, plan: FetchPlan, source: sources.Source) -> Iterator[Item]:
    """The items of a local source that a plan does not have, and notes on those that are gone or have changed."""
    known: dict[str, bytes] = {}
    for part in range(len(plan.parts)):
        rows = parquet.read(workspace.path(plan_name(part)), PLAN, ("key", "locator", "labels", "split"))
        known |= {row["key"]: _state(*row.values()) for row in rows.to_pylist()}
    there = changed = 0
    for item in source.items():
        state = known.get(item.key)
        if state is None:
            yield item
            continue
        there += 1
        changed += state != _state(item.key, item.locator, list(item.labels), item.split)
    if gone := len(known) - there:
        source.notes.append(
            f"{amount(gone, 'image is', 'images are')} no longer at the source and not removed from the dataset: "
            "`animesion remove` removes images"
        )
    if changed:
        source.notes.append(
            f"{changed:,} files have changed at the source, or their labels: the dataset keeps what it has of them"
        )


def _state(key: str, locator: str, labels: Sequence[str], split: str) -> bytes:
    return hashlib.blake2b(repr((key, locator, list(labels), split)).encode(), digest_size=16).digest()


def _tags_table(chunk: Sequence[Item]) -> pa.Table:
    """The tags of a part's items, schema `TAGS`."""
    columns = {name: [list((item.tags or {}).get(name, ())) for item in chunk] for name in TAG_CATEGORIES}
    return pa.table({"key": [item.key for item in chunk], **columns}, schema=TAGS)


def _write_table(workspace: Workspace, name: str, table: pa.Table, written: Mapping[str, Mapping[str, Any]]) -> str:
    """Write a table of the listing, unless the file has it already; returns its digest.

    Args:
        workspace: the output folder.
        name: path of the table.
        table: its content.
        written: outputs of the receipt of the listing before.
    """
    content = parquet.content(table)
    digest = hashlib.sha256(content).hexdigest()
    known = written.get(name, {})
    if known.get("sha256") == digest and workspace.has(name, known):
        return digest
    return write_atomic(workspace.path(name), content)


def run(
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    plan: FetchPlan,
    source: sources.Source,
    progress: CrawlProgress,
    *,
    retry_failed: bool = False,
) -> list[str]:
    """Fetch every part that has no valid receipt, or has images that a crawl may still get.

    Args:
        workspace: the output folder.
        recipe: the recipe.
        executor: runs the parts of a source that is not remote.
        plan: the listing, cut into parts.
        source: the open source.
        progress: receives the number of finished images.
        retry_failed: also request images again that a crawl was refused.

    Returns:
        Sentences about images that a crawl did not get. They differ from run to run, so no output contains them.
    """
    jobs = []
    refused = removed_images(workspace, recipe)
    for part, digest in enumerate(plan.parts):
        job = FetchJob(workspace, recipe, part, digest)
        keys = _plan_keys(workspace, part) if recipe.curate.decisions.box else []
        receipt = workspace.done(job.name, CODE, params(recipe, keys, refused), {"plan": digest})
        if receipt and not _may_retry(receipt.facts, retry_failed):
            progress.part_done(receipt.facts["items"])
        else:
            jobs.append(job)
    workspace.forget("fetch", {f"fetch/part-{part:05d}" for part in range(len(plan.parts))})
    if not source.remote:
        executor.run(jobs, lambda job, facts: progress.part_done(facts["items"]))
        return []
    for job in jobs:  # in this process, as rate limits per host cannot be kept across workers
        progress.part_done(job.fetch_from(source)["items"])
    if not isinstance(source, sources.Crawled):
        return []
    source.release()
    return _crawl_summary(source.errors())


def _plan_keys(workspace: Workspace, part: int) -> list[str]:
    keys: list[str] = parquet.read(workspace.path(plan_name(part)), PLAN, ("key",))["key"].to_pylist()
    return keys


def _may_retry(facts: Mapping[str, Any], retry_failed: bool) -> bool:
    """Whether a finished part has images that another request may get."""
    return bool(facts.get("failed") or (retry_failed and facts.get("refused")))


def _crawl_summary(errors: list[tuple[str, str, str, int]]) -> list[str]:
    """Images that a crawl did not get, by kind of error: first those that the next run requests again."""
    sentences = []
    for state, hint in (
        ("failed", "failed; the same command requests them again"),
        ("refused", "were refused permanently; --retry-failed requests them again"),
    ):
        kinds: dict[str, int] = {}
        for error_state, error, detail, count in errors:
            if error_state == state:
                # The detail of a checksum mismatch is a digest, which would make every file a kind of its own.
                kind = error if error == DropReason.CHECKSUM_MISMATCH or not detail else f"{error} ({detail})"
                kinds[kind] = kinds.get(kind, 0) + count
        if kinds:
            listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())
            sentences.append(f"{sum(kinds.values()):,} images {hint}: {listed}")
    return sentences


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Lists of `PART_ITEMS` items; the last may be shorter."""
    while chunk := list(itertools.islice(items, PART_ITEMS)):
        yield chunk


class _Keys:
    """The keys of a listing, stored as 8 bytes each.

    A repeated digest may be a collision, so the key itself is then looked up in the plans that are already written.
    """

    def __init__(self, workspace: Workspace) -> None:
        from animesion_scrapers.counts import DigestSet

        self._workspace = workspace
        self._digests = DigestSet()
        self._parts = 0

    def add_part(self, part: int) -> None:
        """Add the keys of the next part, whose plan is written."""
        assert part == self._parts
        self._add(self._keys_of(part))

    def add_chunk(self, chunk: Sequence[Item]) -> Item | None:
        """Add the keys of the next part, whose plan is not written; returns the first item with a repeated key."""
        is_new = self._add([item.key for item in chunk])
        in_chunk: set[str] = set()
        for item, new in zip(chunk, is_new, strict=True):
            if not new and (item.key in in_chunk or self._is_listed(item.key)):
                return item
            in_chunk.add(item.key)
        return None

    def _add(self, keys: Sequence[str]) -> list[bool]:
        """Add the digests of a part's keys; returns for each whether it is new."""
        from animesion_scrapers.counts import as_digests

        digests = as_digests(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) for key in keys)
        self._parts += 1
        return cast("list[bool]", self._digests.add(digests).tolist())

    def _is_listed(self, key: str) -> bool:
        # The last part is the chunk in progress, which has no plan yet.
        return any(key in self._keys_of(part) for part in range(self._parts - 1))

    def _keys_of(self, part: int) -> list[str]:
        path = self._workspace.path(plan_name(part))
        return cast("list[str]", parquet.read(path, PLAN, ("key",))["key"].to_pylist())


class _EarlierFetch(Mapping[str, Payload]):
    """Bytes by key that a fetch of the same listing under another recipe stored, so that no site is asked twice.

    Those of a fetch that ignored opt-outs are not used by one that obeys them, as it did not ask what the hosts say.
    """

    def __init__(self, job: FetchJob) -> None:
        self._path = job.workspace.path(f"raw/part-{job.part:05d}.tar")
        self._locations: dict[str, tuple[int, int]] = {}
        self._tar: IO[bytes] | None = None
        receipt = job.workspace.receipt(job.name)
        obeyed = receipt is not None and (receipt.facts.get("opt_outs") or not job.recipe.filter.opt_outs)
        if receipt and obeyed and receipt.inputs == {"plan": job.plan_digest} and job.workspace.intact(receipt):
            raw = parquet.read(
                self._path.with_suffix(".parquet"), RAW, ("key", "reason", "offset", "bytes")
            ).to_pylist()
            self._locations = {row["key"]: (row["offset"], row["bytes"]) for row in raw if not row["reason"]}

    def __enter__(self) -> Self:
        if self._locations:
            self._tar = self._path.open("rb")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tar:
            self._tar.close()

    def __getitem__(self, key: str) -> Payload:
        offset, size = self._locations[key]
        assert self._tar is not None
        self._tar.seek(offset)
        return Payload(self._tar.read(size))

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)


def _content_facts(payload: Payload) -> dict[str, Any]:
    content = payload.content
    digests = hashing.of_bytes(content, payload.digest)
    # Bytes of an unknown format still need a member name in the tar; inspect gives them their reason.
    extension = codec.sniff(content) or "bin"
    return {"md5": digests.md5, "sha256": digests.sha256, "bytes": len(content), "extension": extension}


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
