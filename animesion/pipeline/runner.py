"""Run the five stages over one output folder: claim it, resume what is done, report, account for every image."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animesion import executors, sources
from animesion.config.recipe import Recipe
from animesion.errors import AnimesionError, UsageError
from animesion.pipeline import curate, fetch, finalize, inspect, pack
from animesion.progress import Progress
from animesion.sources import clean_text
from animesion.storage import stores
from animesion.storage.workspace import STAGES, Workspace, write_atomic

if TYPE_CHECKING:
    from animesion.publishing.upload import Upload
    from animesion_scrapers.counts import HostCounts

#: Hosts that a preview names.
_BUSIEST = 10

_CRASHED = ".receipts/crashed.json"


@dataclass(frozen=True)
class BuildResult:
    """What a build came to.

    Attributes:
        out: the output folder; the work folder when the output is a URL.
        until: the last stage that was run.
        seen: images the source listed; with `crop.faces = "each"`, one for each face.
        kept: images in the shards; 0 before curate.
        dropped: images by reason, in the order in which reasons are looked at.
        splits: images by split.
        classes: class names by id.
        notes: sentences worth reading.
        crawl: sentences about what a crawl did not get in this run; in no output, as they depend on the day.
        url: where the dataset was sent; empty when it stays in `out`.
        sent: files that were sent in this run.
    """

    out: Path
    until: str
    seen: int
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    crawl: list[str] = field(default_factory=list)
    url: str = ""
    sent: list[str] = field(default_factory=list)


def places(out: Path | str, work: Path | str | None = None) -> tuple[Path, str]:
    """The folder to build in, and the URL to send to; empty when the folder is the output.

    Args:
        out: output folder or URL.
        work: folder to work in when `out` is a URL; None for one of the URL's own in the user's cache.

    Raises:
        UsageError: a folder to work in is given though the output is one.
    """
    if not stores.is_url(out):
        if work is not None:
            raise UsageError("--work is for outputs that are URLs: leave it out, a build works in its output folder")
        return Path(out), ""
    from animesion.publishing.upload import work_folder

    return Path(work) if work is not None else work_folder(str(out)), str(out)


def run(
    recipe: Recipe,
    out: Path,
    *,
    workers: int = 0,
    engine: str = "local",
    until: str = "finalize",
    replace: bool = False,
    retry_failed: bool = False,
    update: bool = False,
    progress: Progress | None = None,
    to: str = "",
) -> BuildResult:
    """Build a dataset, or carry on where a build of the same recipe stopped.

    Args:
        recipe: what to build.
        out: output folder; made when missing.
        workers: worker processes; 0 for one a core.
        engine: what runs them: `local`, `ray` or `ray:ADDRESS`; see `animesion.executors.make`.
        until: last stage to run, one of `animesion.storage.workspace.STAGES`.
        replace: carry on in a folder that another recipe wrote.
        retry_failed: ask a crawled source again also for what it refused permanently.
        update: add what is new at a crawled source since it was listed.
        progress: told what happens.
        to: URL that finished files are sent to, such as `s3://bucket/prefix`; then `out` is the folder to work in.

    Raises:
        UsageError: bad options of the source, or a folder or URL that is not this recipe's.
        BusyError: another build holds the folder.
        AnimesionError: no image is left, the disk is full, a worker cannot do its part.
    """
    progress = progress or Progress()
    if until not in STAGES:
        raise UsageError(f"there is no stage '{until}'; stages are {', '.join(STAGES)}")
    for folder in recipe.duplicates.against:
        if Path(folder).resolve() == out.resolve():
            raise UsageError(f"duplicates.against: {folder} is the output folder itself: give another with --out")
    source = sources.make(recipe)
    workspace = Workspace(out)
    last = STAGES.index(until)
    upload = _upload(to, workspace, recipe, replace=replace)
    with (
        workspace.claim(recipe.to_toml(), recipe.digest(), replace=replace),
        upload or contextlib.nullcontext(),
        executors.make(engine, workers) as running,
    ):
        if upload and last >= STAGES.index("pack"):
            upload.claim()
        crawling = fetch.CrawlProgress(progress.advanced, progress.status)
        fetch.prepare(workspace, source, crawling, retry_failed=retry_failed)
        with source.session():
            progress.started("list", None)
            plan = fetch.listed(workspace, recipe, source, progress.advanced, update=update)
            progress.finished("list")
            progress.started("fetch", plan.items)
            crawl = fetch.run(workspace, recipe, running, plan, source, crawling, retry_failed=retry_failed)
            progress.finished("fetch")
        parts = len(plan.parts)
        if last == STAGES.index("fetch"):
            return BuildResult(out, until, plan.items, notes=plan.notes, crawl=crawl)
        progress.started("inspect", plan.items)
        inspect.run(workspace, recipe, running, parts, progress.advanced)
        progress.finished("inspect")
        if last == STAGES.index("inspect"):
            return BuildResult(out, until, plan.items, notes=plan.notes, crawl=crawl)
        if recipe.duplicates.embedding.model:
            from animesion.pipeline import embed

            progress.started("embed", plan.items)
            embed.run(workspace, recipe, parts, progress.advanced)
            progress.finished("embed")
        while True:
            progress.started("curate", None)
            facts = curate.run(workspace, recipe, parts, _crashed(workspace)).facts
            progress.finished("curate")
            _account(facts, plan.items)
            result = BuildResult(
                out,
                until,
                facts["seen"],
                facts["kept"],
                facts["dropped"],
                facts["splits"],
                facts["classes"],
                [*plan.notes, *facts["notes"]],
                crawl,
            )
            if last == STAGES.index("curate"):
                return result
            if not result.kept:
                common = max(result.dropped, key=lambda reason: result.dropped[reason])
                raise AnimesionError(
                    f"no image is left of {result.seen:,}: most were dropped as '{common}' "
                    f"({result.dropped[common]:,}); {out / 'curated.parquet'} has the reason for each"
                )
            progress.started("pack", result.kept)
            try:
                pack.run(workspace, recipe, running, progress.advanced, *([upload.shard] if upload else []))
            except pack.CrashedImagesError as error:
                known = _crashed(workspace) | dict.fromkeys(error.keys, "the worker process died while packing")
                write_atomic(workspace.path(_CRASHED), json.dumps(known, sort_keys=True).encode())
                continue
            progress.finished("pack")
            break
        if last == STAGES.index("finalize"):
            progress.started("finalize", None)
            finalize.run(workspace, recipe, parts, result.notes)
            progress.finished("finalize")
        if upload:
            progress.started("send", None)
            upload.finish(progress) if last == STAGES.index("finalize") else upload.wait(progress)
            progress.finished("send")
            return replaced(result, url=upload.url, sent=sorted(upload.sent))
        return result


def preview(
    recipe: Recipe, out: Path, *, replace: bool = False, count: Callable[[int], None] = lambda n: None, to: str = ""
) -> dict[str, Any]:
    """What a build would do, without writing: images by metadata verdict, bytes where known, state of `out`.

    For a crawled source also the requests that fetching takes, the seconds at the polite pace of the busiest host, and
    the ten hosts that most is asked of. Memory grows with the number of hosts, 200 bytes each.

    Raises:
        UsageError: bad options of the source, or a folder that is not this recipe's.
    """
    from animesion_scrapers import ScraperError
    from animesion_scrapers.counts import HostCounts

    source = sources.make(recipe)
    _upload(to, Workspace(out), recipe, replace=replace)
    Workspace(out).check(recipe.digest(), replace=replace)
    verdicts: dict[str, int] = {}
    listed = wanted = size = unknown = 0
    demand = _Demand()
    crawled = source if isinstance(source, sources.Crawled) else None
    host_counts = HostCounts()
    try:
        with source.session():
            for item in source.items():
                listed += 1
                reason = fetch.known_reason(item, recipe)
                if reason:
                    verdicts[reason] = verdicts.get(reason, 0) + 1
                else:
                    wanted += 1
                    size += item.bytes
                    unknown += not item.bytes
                    if crawled:
                        host_counts.add(crawled.file_host(item), item.bytes)
                if listed % 1000 == 0:
                    count(listed)
            if crawled:
                demand = _demand(crawled, host_counts)
    except ScraperError as error:
        raise AnimesionError(str(error)) from None
    if not listed:
        raise UsageError(f"the source of recipe {recipe.name} lists no images: check its [source] options")
    return {
        "recipe": recipe.name,
        "digest": recipe.digest(),
        "out": to or str(out),
        "out_exists": out.exists(),
        "listed": listed,
        "to_fetch": wanted,
        "bytes_to_fetch": size,
        "bytes_unknown": unknown,
        "requests": demand.requests,
        "seconds": demand.seconds,
        "hosts": demand.hosts,
        "busiest_hosts": demand.busiest,
        "not_fetched": verdicts,
        "parts": -(-listed // fetch.PART_ITEMS),
        "notes": [*source.notes, *demand.sentences()],
    }


@dataclass
class _Demand:
    """What a crawl asks of how many hosts, and of the busiest of them."""

    requests: int = 0
    seconds: float = 0.0
    hosts: int = 0
    busiest: list[dict[str, Any]] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """The busiest hosts in words, if there are several."""
        if self.hosts < 2:
            return []
        told = []
        for host in self.busiest:
            known = f", {host['bytes'] / 1e6:,.1f} MB" if host["bytes"] else ""
            took = timedelta(seconds=round(host["seconds"]))
            told.append(f"{host['host']} {host['requests']:,} requests{known}, {took}")
        rest = self.hosts - len(self.busiest)
        return [f"{self.hosts:,} hosts; most is asked of {'; '.join(told)}{f'; {rest:,} more' * bool(rest)}"]


def _demand(source: sources.Crawled, host_counts: HostCounts) -> _Demand:
    requests, seconds = source.forecast({each.host: each.files for each in host_counts})
    demand = _Demand(requests, seconds, len(host_counts))
    for each in host_counts.most_common(_BUSIEST):
        requests, seconds = source.forecast({each.host: each.files})
        facts = {"requests": requests, "seconds": seconds, "bytes": each.bytes, "bytes_unknown": each.unknown}
        demand.busiest.append({"host": clean_text(each.host, 80), "files": each.files, **facts})
    return demand


def _upload(to: str, workspace: Workspace, recipe: Recipe, *, replace: bool) -> Upload | None:
    if not to:
        return None
    from animesion.publishing.upload import Upload

    return Upload(to, workspace, recipe.to_toml(), replace=replace)


def _account(facts: dict[str, Any], listed: int) -> None:
    """Every image is kept or dropped for a reason; anything else is a fault of the program."""
    accounted = facts["kept"] + sum(facts["dropped"].values())
    if listed != facts["images"] or facts["seen"] != accounted:
        raise RuntimeError(
            f"accounting is off: {listed} listed, {facts['images']} images, {facts['seen']} seen, "
            f"{accounted} accounted for"
        )


def _crashed(workspace: Workspace) -> dict[str, str]:
    try:
        crashed = json.loads(workspace.path(_CRASHED).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(detail) for key, detail in crashed.items()} if isinstance(crashed, dict) else {}
