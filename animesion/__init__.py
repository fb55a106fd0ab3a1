"""Build fine-grained recognition datasets that others can trust.

The public functions are `load_recipe`, `build`, `open_dataset`, `verify` and `publish`; the command line is built on
them. Each imports what it needs when it is called, so that importing this package is fast. `train`, `evaluate`,
`predict`, `identify`, `build_gallery`, `add_to_gallery` and `whiten` are those of `animesion_training`, found through
the entry points `animesion.functions`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from animesion.config.recipe import Recipe
    from animesion.dataset.dataset import Dataset
    from animesion.pipeline.runner import BuildResult
    from animesion.progress import Progress
    from animesion.publishing import Publication
    from animesion.verification.checks import Report

__all__ = ["build", "load_recipe", "open_dataset", "publish", "verify"]


def load_recipe(name_or_path: str, overrides: list[str] | None = None, *, sample: bool = False) -> Recipe:
    """Load a built-in recipe or a TOML file, with `key.path=value` overrides.

    Args:
        name_or_path: built-in name, or path to a TOML file.
        overrides: overrides such as `["split.strategy=legacy-dafre"]`.
        sample: replace the source by the embedded sample world.

    Raises:
        animesion.errors.UsageError: unknown name, key or value.
    """
    from animesion.config.recipe import load

    return load(name_or_path, overrides or [], sample=sample)


def build(
    recipe: Recipe | str,
    out: Path | str,
    *,
    workers: int = 0,
    until: str = "finalize",
    replace: bool = False,
    update: bool = False,
    progress: Progress | None = None,
    work: Path | str | None = None,
) -> BuildResult:
    """Build a dataset into a folder or a bucket, or resume a build of the same recipe.

    Args:
        recipe: a recipe, or a name or path as for `load_recipe`.
        out: output folder, or URL such as `s3://bucket/prefix`.
        workers: number of worker processes; 0 for one per core.
        until: last stage to run: fetch, inspect, curate, pack or finalize.
        replace: continue in a folder that another recipe wrote.
        update: add images that are new at the source; those of a finished dataset keep shard, split and class id.
        progress: receives progress events.
        work: folder to work in if `out` is a URL; None for the URL's folder in the user's cache.

    Raises:
        animesion.errors.AnimesionError: the build failed; the message is one sentence for the user.
    """
    from animesion.pipeline import runner

    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    folder, to = runner.places(out, work)
    return runner.run(
        chosen, folder, workers=workers, until=until, replace=replace, update=update, progress=progress, to=to
    )


def open_dataset(path: Path | str) -> Dataset:
    """Open a built dataset: classes, splits, index, and samples by position or key.

    Raises:
        animesion.errors.UsageError: the folder has no built dataset.
    """
    from pathlib import Path

    from animesion.dataset.dataset import Dataset

    return Dataset(Path(path))


def verify(
    dataset: Dataset | Path | str, *, workers: int = 0, decode: bool = True, progress: Progress | None = None
) -> Report:
    """Check a built dataset: integrity, consistency, and leaks between splits.

    Args:
        dataset: the dataset, or its folder.
        workers: number of worker processes; 0 for one per core.
        decode: decode images; without it, equal and nearly equal pixels are not detected.
        progress: receives progress events.

    Raises:
        animesion.errors.UsageError: the folder has no built dataset.
    """
    from animesion.verification import checks

    return checks.verify(_opened(dataset), workers=workers, decode=decode, progress=progress)


def publish(
    dataset: Dataset | Path | str,
    to: str,
    *,
    private: bool = False,
    urls_only: bool = False,
    tag: str = "",
    force: Collection[str] = (),
    dry_run: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> Publication:
    """Verify a built dataset, send the files that the destination lacks, and check that all have arrived.

    Args:
        dataset: the dataset, or its folder.
        to: `hf://user/name`, `s3://bucket/prefix`, `gs://bucket/prefix` or `file:///folder`.
        private: create a private Hub repository.
        urls_only: send URLs, labels, boxes and digests instead of pixels.
        tag: tag for the Hub revision.
        force: names of checks whose faults are ignored, see `animesion verify`.
        dry_run: verify, compare and list, but send nothing.
        workers: number of worker processes of the checks; 0 for one per core.
        progress: receives progress events.

    Returns:
        What was sent, or what would be sent.

    Raises:
        animesion.errors.UsageError: the destination or an argument is wrong, or the destination refuses.
        animesion.errors.AnimesionError: the dataset has faults, or a file does not arrive.
    """
    import tempfile
    from pathlib import Path

    from animesion import publishing
    from animesion.publishing import urls
    from animesion.verification import checks

    opened = _opened(dataset)
    publishing.check_names(force)
    target = publishing.destination(to, private=private, gate=opened.recipe.card.gate.access)
    report = checks.verify(opened, workers=workers, progress=progress)
    forced = publishing.judge(report, force)
    with tempfile.TemporaryDirectory() as staging:
        omitted = urls.write(opened, Path(staging)) if urls_only else 0
        files = publishing.files_of(Path(staging) if urls_only else opened.path)
        done = publishing.publish(opened, files, target, forced=forced, tag=tag, dry_run=dry_run, progress=progress)
    done.omitted = omitted
    return done


def _opened(dataset: Dataset | Path | str) -> Dataset:
    from pathlib import Path

    return open_dataset(dataset) if isinstance(dataset, (str, Path)) else dataset


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("animesion")
    # other dunder names are asked for by the import system, which must not read all entry points
    if not name.startswith("_"):
        from animesion_scrapers import plugins

        for point in plugins.points("animesion.functions", name):
            return point.load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from animesion_scrapers import plugins

    return sorted({*globals(), *(point.name for point in plugins.points("animesion.functions"))})
