"""Studies: a grid of training runs, a table with mean and deviation, and a plot of accuracy against cost.

A study is a TOML file: `[set]` has the values that all runs share, `[grid]` the keys that differ (keys of the training
recipe in quotes, with lists of values), and `[variants.NAME]` values that change together, such as the methods to
compare. Runs that differ in `run.seed` alone are averaged into one row of the table. `[choose]` has keys, such as
`optimizer.lr`, whose value is chosen for each row by the best validation accuracy of the first seed; the other seeds
run with that value alone. A variant may list other values to choose from. Finished runs are not repeated, stopped runs
are resumed. Several processes with the same study and folder share its runs.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from animesion.config import settings
from animesion.config.settings import Section
from animesion.errors import BusyError, UsageError
from animesion.storage.workspace import sweep, write_atomic
from animesion_training import recipe as recipes
from animesion_training.analysis.cost_plot import cost_figure
from animesion_training.data import DataSplits
from animesion_training.engine import loop, runs, setup
from animesion_training.engine.origins import origins
from animesion_training.engine.watcher import Watcher
from animesion_training.recipe import Name, TrainRecipe

_SEED, _VARIANT = "run.seed", "variant"
_MOST_RUNS = 10_000
#: Seconds before a process looks again whether another one has finished its run.
_PAUSE = 5.0
#: What `choose` compares: values of an epoch, of which a run has those that fit its data.
_VALIDATIONS = ("val_top_1", "val_map_at_r", "val_map")
#: Metrics of the table, by their names in `report/evaluation.json`.
METRICS = ("top_1", "top_5", "macro_accuracy", "macro_f1")


class Study(Section):
    """A study file."""

    name: Name
    summary: str = ""
    recipe: str = Field("scratch", description="training recipe that all runs start from")
    set: dict[str, Any] = Field({}, description="values of the recipe that all runs share")
    grid: dict[str, list[Any]] = Field({}, description="values of the recipe that runs differ in")
    choose: dict[str, list[Any]] = Field({}, description="values of which each row keeps the best on validation")
    variants: dict[str, dict[str, Any]] = Field({}, description="values that go together, by the variant's name")

    @field_validator("grid", "choose")
    @classmethod
    def _not_empty(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in value.items():
            if not values:
                raise ValueError(f"the list of '{key}' is empty")
        return value

    @model_validator(mode="after")
    def _differs(self) -> Self:
        if not self.grid and not self.variants:
            raise ValueError("give at least one key with its values under [grid], or [variants]")
        if _SEED in self.choose:
            raise ValueError(f"'{_SEED}' is no setting to choose: list seeds under [grid]")
        if both := sorted(self.choose.keys() & self.grid.keys()):
            raise ValueError(f"'{both[0]}' is under [choose] and under [grid]: give it once")
        if both := sorted(self.choose.keys() & {key for key, _ in _leaves(self.set)}):
            raise ValueError(f"'{both[0]}' is under [choose] and in [set]: give it once")
        for name, values in self.variants.items():
            for key, value in _leaves(values):
                if key in self.choose and not (isinstance(value, list) and value):
                    raise ValueError(f"'{key}' is under [choose], so {name} lists the values to choose from, or none")
        return self

    def axes(self) -> Iterator[dict[str, list[Any]]]:
        """Yield the values of each key of the grid and of those to choose, for each variant."""
        for name in self.variants or [""]:
            of_variant = dict(_leaves(self.variants[name])) if name else {}
            choose = {key: of_variant.get(key, values) for key, values in self.choose.items()}
            yield ({_VARIANT: [name]} if name else {}) | self.grid | choose


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        folder: name of its folder.
        values: its values of the grid, by key, without those of `chosen`.
        chosen: its values of the keys to choose.
        recipe: the resolved recipe.
    """

    folder: str
    values: dict[str, Any]
    chosen: dict[str, Any]
    recipe: TrainRecipe

    @property
    def row(self) -> str:
        """What its row in the table has in common: all values but the seed, and those to choose."""
        # values can be lists, which are not hashable
        return json.dumps({name: value for name, value in self.values.items() if name != _SEED}, sort_keys=True)


def load(path: Path) -> Study:
    """Read a study file.

    Raises:
        UsageError: the file cannot be read or is invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the study {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the study {path} is not valid TOML: {error}") from None
    data = settings.parse_toml(text, f"the study {path}")
    data.setdefault("name", path.stem)
    return settings.check(Study, data, str(path))


def cells(study: Study) -> list[Cell]:
    """List every run of a study, in the order of the grid; with `choose`, more than will be run.

    Raises:
        UsageError: an invalid key or value, too many runs, or two runs with the same values.
    """
    combinations = (
        dict(zip(axes, chosen, strict=True)) for axes in study.axes() for chosen in itertools.product(*axes.values())
    )
    result: list[Cell] = []
    for values in itertools.islice(combinations, _MOST_RUNS + 1):
        # the grid and what is chosen override the variant, which overrides what all runs share
        of_variant = study.variants.get(values.get(_VARIANT, ""), {})
        changed = {**study.set, **of_variant, **{key: value for key, value in values.items() if key != _VARIANT}}
        overrides = [f"{key}={json.dumps(value)}" for key, value in _leaves(changed)]
        resolved = recipes.load(study.recipe, overrides)
        to_choose = {key: values[key] for key in study.choose}
        fixed = {key: value for key, value in values.items() if key not in study.choose}
        result.append(Cell(_slug(values), fixed, to_choose, resolved))
    if len(result) > _MOST_RUNS:
        raise UsageError(f"the study {study.name} has more than {_MOST_RUNS:,} runs: make its grid smaller")
    if len({cell.folder for cell in result}) < len(result):
        raise UsageError(f"two runs of the study {study.name} have the same values: list each value once")
    return result


def run(
    study: Study,
    data: str,
    out: Path,
    *,
    device: str = "auto",
    notify: Callable[[str], None] = lambda message: None,
    watcher: Watcher | None = None,
    train: bool = True,
) -> list[dict[str, Any]]:
    """Run the unfinished runs, and write `table.csv`, `table.json` and `accuracy-cost.png`.

    Args:
        study: the study.
        data: the data to train on.
        out: folder of the study, with one folder per run.
        device: as for training.
        notify: called with a message before each run.
        watcher: receives progress events of each run.
        train: False to tabulate what is done: rows of which all runs of the first seed are.

    Returns:
        Rows of the table, see `table`.

    Raises:
        UsageError: runs that cannot be evaluated or chosen from, or nothing to tabulate; see also `loop.train`.
    """
    seeds = study.grid.get(_SEED, [None])
    # seed by seed, so that a study that is stopped half way has compared every setting once
    todo = sorted(cells(study), key=lambda cell: seeds.index(cell.values.get(_SEED)))
    _check_done(todo, data, out)
    first: dict[str, list[Cell]] = {}
    for cell in todo:
        if cell.values.get(_SEED) == seeds[0]:
            first.setdefault(cell.row, []).append(cell)
    if train:
        _run_all(todo, first, data, out, device=device, notify=notify, watcher=watcher)
    best = {
        row: choose(decisive, out)
        for row, decisive in first.items()
        if all(_result(out / cell.folder) is not None for cell in decisive)
    }
    done = [
        cell
        for cell in todo
        if cell.row in best and cell.chosen == best[cell.row].chosen and _result(out / cell.folder) is not None
    ]
    if not done:
        raise UsageError(f"no row of the study {study.name} is complete in {out}: run it first")
    rows = table(done, out)
    sweep(out, deep=False)  # a killed study leaves its temporary file
    write_atomic(out / "table.json", (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(out / "table.csv", _csv(rows).encode())
    image = io.BytesIO()
    labels = [", ".join(str(row[key]) for key in (_VARIANT, *study.grid) if key in row) for row in rows]
    cost_figure(study.name, rows, labels).savefig(image, format="png", metadata={"Software": None})
    write_atomic(out / "accuracy-cost.png", image.getbuffer())
    return rows


def _check_done(cells: Sequence[Cell], data: str, out: Path) -> None:
    """Raise `UsageError` if a finished run is of other settings, data or weights than the study now has."""
    opened: dict[str, DataSplits] = {}
    for cell in cells:
        folder, recipe = out / cell.folder, cell.recipe
        if _result(folder) is None or not (folder / runs.RECIPE).exists():
            continue
        if changed := runs.changed_settings(folder, recipe):
            raise UsageError(f"{folder} is the result of other settings ({', '.join(changed[:3])}): give another --out")
        if not (folder / runs.ORIGINS).exists():
            continue
        # what the data is opened by, which most runs have in common
        key = json.dumps(
            [recipe.objective.name, *(each.model_dump(mode="json") for each in (recipe.data, recipe.tags))]
        )
        if key not in opened:
            opened[key], _ = setup.open_datasets(recipe, data)
        if changed := runs.changed_origins(folder, origins(recipe, opened[key])):
            raise UsageError(
                f"{folder} is the result of a run that read something else as {', '.join(changed)}: give another --out"
            )


def _run_all(
    todo: Sequence[Cell],
    first: Mapping[str, Sequence[Cell]],
    data: str,
    out: Path,
    *,
    device: str,
    notify: Callable[[str], None],
    watcher: Watcher | None,
) -> None:
    """Train and evaluate the runs that are not done; those of another process are waited for.

    Args:
        todo: all runs, in the order to start them.
        first: the runs of the first seed by row; other seeds of a row wait for them if there are several.
        data: the data to train on.
        out: folder of the study.
        device: as for training.
        notify: as for `run`.
        watcher: as for `run`.
    """
    waiting, told = deque(todo), set[str]()
    # a row without values to choose from has no reason to wait for its first seed
    chosen = {row: cells[0] for row, cells in first.items() if len(cells) == 1}
    idle = 0  # runs in a row that had to wait
    while waiting:
        if idle and idle >= len(waiting):
            time.sleep(_PAUSE)
            idle = 0
        cell = waiting.popleft()
        place = f"{cell.folder}, {len(waiting)} to follow"
        decisive = first[cell.row]
        if cell not in decisive:
            if cell.row not in chosen and all(_result(out / each.folder) is not None for each in decisive):
                chosen[cell.row] = choose(decisive, out)
                values = ", ".join(f"{key} = {value}" for key, value in chosen[cell.row].chosen.items())
                if values:
                    notify(f"{chosen[cell.row].folder}: {values} is best on validation")
            if cell.row not in chosen:
                waiting.append(cell)
                idle += 1
                continue
            if cell.chosen != chosen[cell.row].chosen:
                continue
        if _result(out / cell.folder) is not None:
            if cell.folder not in told:
                notify(f"{cell.folder}: already done")
            idle = 0
            continue
        try:
            if cell.folder not in told:
                notify(place)
            loop.train(cell.recipe, data, out / cell.folder, resume=True, device=device, watcher=watcher)
        except BusyError:
            if cell.folder not in told:
                notify(f"{cell.folder}: another process is at it")
            told.add(cell.folder)
            waiting.append(cell)
            idle += 1
            continue
        idle = 0
        if _result(out / cell.folder) is None:
            raise UsageError(
                f"the data {data} has no split '{cell.recipe.data.test}' of classes in training to evaluate runs on: "
                "change data.test"
            )


def choose(decisive: Sequence[Cell], out: Path) -> Cell:
    """Return the run of the best validation accuracy; of equal ones the first.

    Args:
        decisive: runs of one row and seed.
        out: folder of the study.

    Raises:
        UsageError: there are several, and one has no validation.
    """
    if len(decisive) == 1:
        return decisive[0]
    values = {cell.folder: _validation(out / cell.folder) for cell in decisive}
    if missing := [folder for folder, value in values.items() if value is None]:
        raise UsageError(f"{out / missing[0]} has no validation to choose by: name a split in data.val")
    return max(decisive, key=lambda cell: values[cell.folder] or 0.0)


def table(done: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """Compute one row per setting, over its seeds.

    A row has the values, those that were chosen, the number of runs, mean and sample deviation of each metric (shares,
    0 to 1; deviation 0 for one run), `top_1` of each run in the order of the seeds, the mean of the best validation
    accuracies, parameters, and multiply-adds per image. Equal runs have equal rows, so times are in the logs of the
    runs alone.
    """
    from animesion_training.analysis.profile import count
    from animesion_training.models import create_model

    groups: dict[str, list[Cell]] = {}
    for cell in done:
        groups.setdefault(cell.row, []).append(cell)
    rows = []
    for group in groups.values():
        results = [_result(out / cell.folder) for cell in group]
        row: dict[str, Any] = {name: value for name, value in group[0].values.items() if name != _SEED}
        row |= group[0].chosen
        row["runs"] = len(group)
        for metric in METRICS:
            numbers = [float(result[metric]) for result in results if result is not None]
            row[metric] = statistics.fmean(numbers)
            row[f"{metric}_deviation"] = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        row["top_1_runs"] = [float(result["top_1"]) for result in results if result is not None]
        folders = [out / cell.folder for cell in group]
        if validations := [value for value in map(_validation, folders) if value is not None]:
            row["validation"] = statistics.fmean(validations)
        model = group[0].recipe.model
        options: dict[str, Any] = dict(model.options)
        built = create_model(
            model.name,
            int(results[0]["classes"] if results[0] else 1),
            model.img_size,
            model.head,
            methods=model.methods(),
            head_options=model.method_options.get("head"),
            **options,
        )
        counted = count(built, (model.img_size, model.img_size))
        row |= {"parameters": counted.parameters, "multiply_adds": counted.multiply_adds}
        rows.append(row)
    return rows


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested tables."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _result(folder: Path) -> Mapping[str, Any] | None:
    try:
        result = json.loads((folder / "report" / "evaluation.json").read_bytes())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and all(metric in result for metric in METRICS) else None


def _epochs(folder: Path) -> list[Mapping[str, Any]]:
    """Numbers of each epoch of a run."""
    return [line for line in runs.read_log(folder) if line["kind"] == "epoch"]


def _validation(folder: Path) -> float | None:
    """Best validation accuracy of a run; None without validation."""
    found = [float(line[name]) for line in _epochs(folder) for name in _VALIDATIONS if name in line]
    return max(found, default=None)


def _slug(values: Mapping[str, Any]) -> str:
    parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()]
    text = "_".join("".join(c if c.isalnum() or c in "-." else "-" for c in part) for part in parts)
    return text if len(text) <= 100 else f"{text[:80]}-{settings.params_digest(dict(values))[:12]}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "top_1_runs": " ".join(map(str, row["top_1_runs"]))})
    return out.getvalue()
