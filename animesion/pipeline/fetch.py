"""Stage 1: from a source to `raw/part-*.tar` (original bytes) and `.parquet` (provenance, one row an image).

The source's listing is cut into parts and written as `raw/part-*.plan.parquet` first; each part is then fetched on its
own. Failures are rows with a reason. Images that metadata alone would drop are not fetched. How a crawl survives
within a part is the source's (`animesion.sources.crawled`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Self, cast

from animesion import sources
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dataset import shards
from animesion.errors import UsageError
from animesion.executors import Executor
from animesion.images import codec, hashing
from animesion.pipeline import rules
from animesion.schemas import PLAN, RAW, DropReason, Item, Payload
from animesion.storage import parquet
from animesion.storage.workspace import Workspace, atomic_file

if TYPE_CHECKING:
    from animesion_scrapers import CrawlStatus

CODE = "fetch-1"
#: Images a part: small enough that workers share the load, large enough that files stay few.
PART_ITEMS = 500


@dataclass(frozen=True)
class FetchPlan:
    """The cut listing.

    Attributes:
        parts: digest of each part's plan, by part number.
        items: images in all.
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
        items = parquet.plan_items(parquet.read(self.workspace.path(plan_name(self.part)), PLAN))
        tar_name, table_name = f"raw/part-{self.part:05d}.tar", f"raw/part-{self.part:05d}.parquet"
        reasons = {item.key: known_reason(item, self.recipe) for item in items}
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
                        row |= {**_described(payload), "offset": tar.position + shards.BLOCK}
                        tar.write(shards.member(f"{item.key}.{row['extension']}", payload.content))
                rows.append(row)
            tar.write(shards.END)
        outputs = {
            tar_name: tar.sha256,
            table_name: parquet.write(self.workspace.path(table_name), parquet.table(rows, RAW)),
        }
        facts = {
            "items": len(rows),
            "fetched": sum(not row["reason"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows if not row["reason"]),
        }
        crawled = source if isinstance(source, sources.Crawled) else None
        if crawled:
            facts |= crawled.counts(items)._asdict()
        self.workspace.commit(self.name, CODE, params(self.recipe), {"plan": self.plan_digest}, outputs, facts)
        if crawled:  # the tar has the bytes now
            crawled.handed_over(items)
        return facts


def known_reason(item: Item, recipe: Recipe) -> str:
    """Why an item is not worth reading; what metadata says comes before what is wrong with the file."""
    if item.failure in {DropReason.BAD_RECORD, DropReason.NOT_VISIBLE}:  # then the rest of the metadata says little
        return item.failure
    return rules.metadata_reason(item, recipe) or item.failure


def params(recipe: Recipe) -> str:
    """Digest of what the stage takes from the recipe."""
    values = recipe.model_dump(mode="json", include={"source", "label", "filter", "crop"})
    return params_digest({**values, "crop": {k: values["crop"][k] for k in ("detector", "min_score")}})


def plan_name(part: int) -> str:
    """Where a part's plan lies."""
    return f"raw/part-{part:05d}.plan.parquet"


class CrawlProgress:
    """Turns what a crawl says of itself into images done and a line of text."""

    def __init__(self, advance: Callable[[int], None], tell: Callable[[str], None]) -> None:
        """Keep the two doors: images that are done, and words about it."""
        self._advance, self._tell = advance, tell
        self._finished = self._ahead = 0

    def __call__(self, status: CrawlStatus) -> None:
        """Take in how it goes."""
        new = status.finished - self._finished
        self._finished += new
        self._ahead += new
        words = [f"{sum(status.failures.values()):,} failed"] if status.failures else []
        words += [f"{host} {state}" for host, state in status.hosts.items()]
        words += [f"circuit of {host} opened {times}x" for host, times in status.circuits_opened.items()]
        self._tell("; ".join(words))
        self._advance(new)

    def part_done(self, items: int) -> None:
        """A part of so many images is done, of which some were told before."""
        self._advance(items - self._ahead)
        self._ahead = 0


@contextlib.contextmanager
def opened(
    source: sources.Source, workspace: Workspace, progress: CrawlProgress, *, retry_failed: bool = False
) -> Iterator[None]:
    """Open a source for listing and reading; one that crawls keeps its ledger in the workspace."""
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
) -> FetchPlan:
    """List the source, or take the remembered listing of a remote one; with `update` what is new is added to that."""
    options = params_digest(recipe.source.model_dump(mode="json"))
    known = workspace.done("plan", CODE, options, {})
    outputs: dict[str, str] = {}
    keys = _Keys(workspace)
    count = 0
    items: Iterable[Item]
    if known is not None and source.remote:
        plan = FetchPlan(known.facts["parts"], known.facts["items"], known.facts["notes"])
        if not update:
            return plan
        if not isinstance(source, sources.Crawled):
            raise UsageError(f"source '{recipe.source.kind}' cannot tell what is new: build anew into another folder")
        outputs = {plan_name(part): digest for part, digest in enumerate(plan.parts)}
        for part in range(len(outputs)):
            keys.take_in(part)
        last = parquet.plan_items(parquet.read(workspace.path(plan_name(len(outputs) - 1)), PLAN))
        count = plan.items
        items = source.items_after(last[-1])
    else:
        items = source.items()
    for chunk in _chunks(iter(items)):
        if recipe.crop.detector == "boxes" and any(item.boxes is None for item in chunk):
            raise UsageError(
                f"crop.detector is 'boxes' but source '{recipe.source.kind}' was given no table of boxes: "
                "set source.faces where the source takes it, or crop.detector=none"
            )
        doubled = keys.repeated(chunk)
        if doubled:
            raise UsageError(f"the source lists {doubled.source_id!r} twice; list every image once")
        name = plan_name(len(outputs))
        outputs[name] = parquet.write(workspace.path(name), parquet.plan_table(chunk))
        count += len(chunk)
        advance(len(chunk))
    if not count:
        raise UsageError(f"the source of recipe {recipe.name} lists no images: check its [source] options")
    digests_in_order = [outputs[plan_name(part)] for part in range(len(outputs))]
    facts = {"parts": digests_in_order, "items": count, "notes": source.notes}
    workspace.commit("plan", CODE, options, {}, outputs, facts)
    return FetchPlan(digests_in_order, count, list(source.notes))


def run(
    workspace: Workspace,
    recipe: Recipe,
    engine: Executor,
    plan: FetchPlan,
    source: sources.Source,
    progress: CrawlProgress,
    *,
    retry_failed: bool = False,
) -> list[str]:
    """Fetch every part that has no valid receipt, or holds images that a crawl may still get.

    Args:
        workspace: the output folder.
        recipe: what is built.
        engine: runs the parts of a source that is not remote.
        plan: the cut listing.
        source: the open source.
        progress: told what is done.
        retry_failed: ask again for what a crawl was refused, too.

    Returns:
        Sentences about what a crawl did not get; they depend on the day, so they are for people and not for outputs.
    """
    jobs = []
    for part, digest in enumerate(plan.parts):
        job = FetchJob(workspace, recipe, part, digest)
        receipt = workspace.done(job.name, CODE, params(recipe), {"plan": digest})
        if receipt and not _worth_asking(receipt.facts, retry_failed):
            progress.part_done(receipt.facts["items"])
        else:
            jobs.append(job)
    workspace.forget("fetch", {f"fetch/part-{part:05d}" for part in range(len(plan.parts))})
    if not source.remote:
        engine.run(jobs, lambda job, facts: progress.part_done(facts["items"]))
        return []
    for job in jobs:  # one process keeps to the rate limits
        progress.part_done(job.fetch_from(source)["items"])
    if not isinstance(source, sources.Crawled):
        return []
    source.handed_over()
    return _crawl_summary(source.errors())


def _worth_asking(facts: Mapping[str, Any], retry_failed: bool) -> bool:
    """Whether a part that is done holds images that may still be had."""
    return bool(facts.get("failed") or (retry_failed and facts.get("refused")))


def _crawl_summary(errors: list[tuple[str, str, str, int]]) -> list[str]:
    """What did not come, by kind: first what a later run asks for again."""
    sentences = []
    for state, hint in (
        ("failed", "may still come: the same command asks for them again"),
        ("refused", "were refused permanently; --retry-failed requests them again"),
    ):
        kinds: dict[str, int] = {}
        for found, error, detail, count in errors:
            if found == state:
                # digests differ from file to file; the kind is enough
                kind = error if error == DropReason.CHECKSUM_MISMATCH or not detail else f"{error} ({detail})"
                kinds[kind] = kinds.get(kind, 0) + count
        if kinds:
            listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())
            sentences.append(f"{sum(kinds.values()):,} images {hint}: {listed}")
    return sentences


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(itertools.islice(items, PART_ITEMS)):
        yield chunk


class _Keys:
    """The keys of a listing, in 8 bytes each: what may be a repeat is looked up in the plans that are written."""

    def __init__(self, workspace: Workspace) -> None:
        from animesion_scrapers.counts import DigestSet

        self._workspace = workspace
        self._digests = DigestSet()
        self._parts = 0

    def take_in(self, part: int) -> None:
        """Know the keys of the next part, which is written."""
        assert part == self._parts
        self._add(self._keys_of(part))

    def repeated(self, chunk: Sequence[Item]) -> Item | None:
        """The first item whose key came before, else None; then the chunk counts as the next part."""
        fresh = self._add([item.key for item in chunk])
        within: set[str] = set()
        for item, new in zip(chunk, fresh, strict=True):
            if not new and (item.key in within or self._is_listed(item.key)):
                return item
            within.add(item.key)
        return None

    def _add(self, keys: Sequence[str]) -> list[bool]:
        from animesion_scrapers.counts import as_digests

        digests = as_digests(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) for key in keys)
        self._parts += 1
        return cast("list[bool]", self._digests.add(digests).tolist())

    def _is_listed(self, key: str) -> bool:
        return any(key in self._keys_of(part) for part in range(self._parts - 1))

    def _keys_of(self, part: int) -> list[str]:
        path = self._workspace.path(plan_name(part))
        return cast("list[str]", parquet.read(path, PLAN, ("key",))["key"].to_pylist())


class _Earlier(Mapping[str, Payload]):
    """Bytes that an earlier fetch of the same listing brought, under another recipe: a site is not asked twice."""

    def __init__(self, job: FetchJob) -> None:
        self._path = job.workspace.path(f"raw/part-{job.part:05d}.tar")
        self._places: dict[str, tuple[int, int]] = {}
        self._tar: IO[bytes] | None = None
        receipt = job.workspace.receipt(job.name)
        if receipt and receipt.inputs == {"plan": job.plan_digest} and job.workspace.intact(receipt):
            raw = parquet.read(
                self._path.with_suffix(".parquet"), RAW, ("key", "reason", "offset", "bytes")
            ).to_pylist()
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


def _described(payload: Payload) -> dict[str, Any]:
    content = payload.content
    found = hashing.of_bytes(content, payload.digest)
    # what is unknown still needs a name in the tar
    extension = codec.sniff(content) or "bin"
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
