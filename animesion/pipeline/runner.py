"""Run the five stages of a build in one output folder, and check that every listed image is accounted for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING

from animesion import detectors, executors, model_files, sources
from animesion.cards.statements import open_questions
from animesion.config.recipe import Recipe
from animesion.config.settings import nearest
from animesion.errors import AnimesionError, UsageError
from animesion.images import other_hashes
from animesion.pipeline import curate, fetch, finalize, inspect, pack, tags, versions
from animesion.progress import Progress
from animesion.storage import stores
from animesion.storage.workspace import STAGES, Workspace, write_atomic

if TYPE_CHECKING:
    from animesion.publishing.upload import Upload

#: JSON file with the images that killed their worker in pack: detail by key.
_CRASHED = ".receipts/crashed.json"


@dataclass(frozen=True)
class BuildResult:
    """The result of a build.

    Attributes:
        out: the output folder, or the work folder if the output is a URL.
        until: the last stage that was run.
        seen: number of images that the source listed; with `crop.faces = "each"`, of faces.
        kept: number of images in the shards; 0 before curate.
        dropped: number of images by reason, in the order in which reasons are checked.
        splits: number of images by split.
        classes: class names, in the order of their ids.
        notes: sentences for the user about the dataset.
        crawl: sentences about images that a crawl did not get in this run; no output contains them.
        url: URL that the dataset was sent to; empty if the output is a folder.
        sent: files that were sent in this run.
        changed: whether this run did any work; False if the folder was up to date.
        unanswered: keys of the recipe's `[card]` that are left open, so the card states them as unknown.
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
    changed: bool = True
    unanswered: list[str] = field(default_factory=list)


def places(out: Path | str, work: Path | str | None = None) -> tuple[Path, str]:
    """The folder to build in, and the URL to send to, which is empty if the output is a folder.

    Args:
        out: output folder or URL.
        work: folder to work in if `out` is a URL; None for the URL's folder in the user's cache.

    Raises:
        UsageError: a work folder is given although the output is a folder.
    """
    if not stores.is_url(out):
        if work is not None:
            raise UsageError(
                "--work is only for outputs that are URLs: leave it out, as a build works in its output folder"
            )
        return Path(out), ""
    from animesion.publishing.upload import work_folder

    return Path(work) if work is not None else work_folder(str(out)), str(out)


def open_upload(to: str, workspace: Workspace, recipe: Recipe, *, replace: bool) -> Upload | None:
    """The upload of a build whose output is a URL, or None if the output is a folder."""
    if not to:
        return None
    from animesion.publishing.upload import Upload

    return Upload(to, workspace, recipe.to_toml(), replace=replace)


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
    compact: bool = False,
    progress: Progress | None = None,
    to: str = "",
) -> BuildResult:
    """Build a dataset, or resume a build of the same recipe.

    Args:
        recipe: the recipe.
        out: output folder; created if it does not exist.
        workers: number of worker processes; 0 for one per core.
        engine: where workers run: `local`, `ray` or `ray:ADDRESS`; see `animesion.executors.make`.
        until: last stage to run, one of `animesion.storage.workspace.STAGES`.
        replace: continue in a folder that another recipe wrote.
        retry_failed: also request images again that a crawled source refused permanently.
        update: add images that are new at the source; those of a finished dataset keep shard, split and class id.
        compact: with `update`: keep splits and class ids only, and assign all samples to shards anew.
        progress: receives progress events.
        to: URL that finished files are sent to, such as `s3://bucket/prefix`; then `out` is the folder to work in.

    Raises:
        UsageError: wrong options of the source, a detector that is not ready, or a folder or URL that belongs to
            another recipe.
        BusyError: another build uses the folder.
        AnimesionError: no image is left, the disk is full, or a job fails.
    """
    progress = progress or Progress()
    if compact and not update:
        raise UsageError("--compact is for a build with --update")
    if until not in STAGES:
        raise UsageError(f"there is no stage '{until}'{nearest(until, STAGES)}; stages are {', '.join(STAGES)}")
    for folder in recipe.duplicates.against:
        if Path(folder).resolve() == out.resolve():
            raise UsageError(
                f"duplicates.against: {folder} is the output folder itself: give another output with --out"
            )
    if until != "fetch":  # a detector that is not ready is found before hours of fetching
        detectors.identity(recipe.crop.detector, recipe.crop.detector_options)
    if recipe.duplicates.other_hash:
        other_hashes.require(recipe.duplicates.other_hash)
    if (embedding := recipe.duplicates.embedding).model == "sscd" and embedding.weights == "pretrained":
        model_files.path_of("sscd")
    source = sources.make(recipe)
    workspace = Workspace(out)
    upload = open_upload(to, workspace, recipe, replace=replace)
    last = STAGES.index(until)
    with (
        workspace.claim(recipe.to_toml(), recipe.digest(), replace=replace),
        upload or contextlib.nullcontext(),
        executors.make(engine, workers) as executor,
    ):
        if upload and last >= STAGES.index("pack"):
            upload.claim()

        crawling = fetch.CrawlProgress(progress.advanced, progress.status)
        with fetch.opened(source, workspace, crawling, retry_failed=retry_failed):
            with _stage(progress, "list"):
                plan = fetch.make_plan(workspace, recipe, source, progress.advanced, update=update, compact=compact)
            if not recipe.filter.opt_outs:
                ignored = "filter.opt_outs is false: opt-outs of hosts, pages and files were not looked for"
                plan = replaced(plan, notes=[*plan.notes, ignored])
            for note in plan.notes:
                progress.noted(f"source: {note}")
            with _stage(progress, "fetch", plan.items):
                crawl = fetch.run(workspace, recipe, executor, plan, source, crawling, retry_failed=retry_failed)
        result = BuildResult(out, until, plan.items, notes=plan.notes, crawl=crawl)
        if until == "fetch":
            return result

        parts = len(plan.parts)
        parent = versions.Parent(workspace, plan.parent, compact=plan.compact) if plan.parent else None
        searched = recipe.model_copy(update={"duplicates": recipe.duplicates.for_images(plan.items)})
        with _stage(progress, "inspect", plan.items):
            inspect.run(workspace, searched, executor, parts, progress.advanced)
        if until == "inspect":
            return result

        if recipe.duplicates.embedding.model:
            from animesion.pipeline import embed

            with _stage(progress, "embed", plan.items):
                embed.run(workspace, recipe, parts, progress.advanced)
        if searched.duplicates.copies != "off":
            from animesion.pipeline import compare

            with _stage(progress, "compare"):
                compare.run(workspace, searched, executor, parts, progress.advanced, progress.noted)
        result = _curate(workspace, searched, executor, plan, parent, result, progress)
        if until == "curate":
            return result

        result = _tags(workspace, recipe, source, plan, parent, result, progress)
        shard_done = upload.shard if upload else lambda shard: None
        while crashed := _pack(workspace, recipe, executor, parent, result, progress, shard_done):
            # Curate drops the images that killed their worker. Each round has fewer images, so the loop ends.
            _remember_crashed(workspace, crashed)
            result = _curate(workspace, searched, executor, plan, parent, result, progress)
            result = _tags(workspace, recipe, source, plan, parent, result, progress)
        if until == "finalize":
            with _stage(progress, "finalize"):
                finalize.run(workspace, recipe, executor, parts, result.notes, parent)
            result = replaced(result, unanswered=open_questions(recipe))

        if upload:
            with _stage(progress, "send"):
                upload.finish(progress) if until == "finalize" else upload.wait(progress)
            result = replaced(result, url=upload.url, sent=sorted(upload.sent))
        return replaced(result, changed=workspace.changed or executor.has_run)


@contextlib.contextmanager
def _stage(progress: Progress, name: str, total: int | None = None) -> Iterator[None]:
    progress.started(name, total)
    yield
    progress.finished(name)


def _curate(
    workspace: Workspace,
    recipe: Recipe,
    executor: executors.Executor,
    plan: fetch.FetchPlan,
    parent: versions.Parent | None,
    result: BuildResult,
    progress: Progress,
) -> BuildResult:
    """Run curate, check that it accounts for every image, and add its counts to the result.

    Raises:
        RuntimeError: images were lost or counted twice, which is a fault of the program.
    """
    with _stage(progress, "curate"):
        facts = curate.run(workspace, recipe, executor, len(plan.parts), _crashed(workspace), parent).facts
    accounted = facts["kept"] + sum(facts["dropped"].values())
    if plan.items != facts["images"] or facts["seen"] != accounted:
        raise RuntimeError(
            f"images do not add up: {plan.items} listed, {facts['images']} images, {facts['seen']} seen, "
            f"{accounted} accounted for"
        )
    counts = {name: facts[name] for name in ("seen", "kept", "dropped", "splits", "classes")}
    return replaced(result, **counts, notes=[*plan.notes, *facts["notes"]])


def _tags(
    workspace: Workspace,
    recipe: Recipe,
    source: sources.Source,
    plan: fetch.FetchPlan,
    parent: versions.Parent | None,
    result: BuildResult,
    progress: Progress,
) -> BuildResult:
    """Decide which tags the samples carry, if the recipe asks for tags, and add the notes to the result."""
    if not recipe.tags.categories or not result.kept:
        tags.remove(workspace)
        return result
    with _stage(progress, "tags", result.kept):
        receipt = tags.run(workspace, recipe, source, plan, parent)
    return replaced(result, notes=[*result.notes, *receipt.facts["notes"]])


def _pack(
    workspace: Workspace,
    recipe: Recipe,
    executor: executors.Executor,
    parent: versions.Parent | None,
    result: BuildResult,
    progress: Progress,
    shard_done: Callable[[str], None],
) -> tuple[str, ...]:
    """Run pack; returns the keys of images that killed their worker.

    Raises:
        AnimesionError: curate kept no image.
    """
    if not result.kept:
        common = max(result.dropped, key=lambda reason: result.dropped[reason])
        raise AnimesionError(
            f"no image is left of {result.seen:,}: most were dropped as '{common}' "
            f"({result.dropped[common]:,}); {result.out / 'curated.parquet'} has the reason of each image"
        )
    with _stage(progress, "pack", result.kept):
        return pack.run(workspace, recipe, executor, progress.advanced, shard_done, parent)


def _crashed(workspace: Workspace) -> dict[str, str]:
    """Detail by key of the images that killed their worker in pack, in this build or an earlier one."""
    # A damaged file is no error: the images crash again and are recorded again.
    try:
        crashed = json.loads(workspace.path(_CRASHED).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(detail) for key, detail in crashed.items()} if isinstance(crashed, dict) else {}


def _remember_crashed(workspace: Workspace, keys: Iterable[str]) -> None:
    crashed = _crashed(workspace) | dict.fromkeys(keys, "the worker process died while packing")
    write_atomic(workspace.path(_CRASHED), json.dumps(crashed, sort_keys=True).encode())
