"""Build fine-grained recognition datasets that others can trust.

The public functions are `load_recipe`, `build` and `open_dataset`; the command line is built on them. Each imports what
it needs when it is called, so that importing this package is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from animesion.config.recipe import Recipe
    from animesion.dataset.dataset import Dataset
    from animesion.pipeline.runner import BuildResult
    from animesion.progress import Progress

__all__ = ["build", "load_recipe", "open_dataset"]


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
        progress: receives progress events.
        work: folder to work in if `out` is a URL; None for the URL's folder in the user's cache.

    Raises:
        animesion.errors.AnimesionError: the build failed; the message is one sentence for the user.
    """
    from animesion.pipeline import runner

    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    folder, to = runner.places(out, work)
    return runner.run(chosen, folder, workers=workers, until=until, replace=replace, progress=progress, to=to)


def open_dataset(path: Path | str) -> Dataset:
    """Open a built dataset: classes, splits, index, and samples by position or key.

    Raises:
        animesion.errors.UsageError: the folder has no built dataset.
    """
    from pathlib import Path

    from animesion.dataset.dataset import Dataset

    return Dataset(Path(path))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("animesion")
    raise AttributeError(f"module 'animesion' has no attribute {name!r}")
