"""The table and the plot of a study, from runs that are done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs the extra train")

from animesion.errors import BusyError, UsageError
from animesion_training.analysis import study as studies
from animesion_training.cli.study import study
from animesion_training.engine import loop, runs, setup
from animesion_training.engine.origins import origins
from animesion_training.recipe import TrainRecipe
from tests import ranks

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.toml")), ids=lambda file: file.stem)
def test_the_studies_of_this_repository_are_valid(file: Path) -> None:
    found = studies.cells(studies.load(file))
    assert len({cell.folder for cell in found}) == len(found) > 1


def test_the_table_of_one_seed_has_no_deviation(tmp_path: Path) -> None:
    file = tmp_path / "sizes.toml"
    file.write_text('[set]\n"model.name" = "resnet10t"\n[grid]\n"model.img_size" = [32, 48]\n')
    metrics = dict.fromkeys(studies.METRICS, 0.25)
    for cell in studies.cells(studies.load(file)):
        report = tmp_path / "out" / cell.folder / "report"
        report.mkdir(parents=True)
        (report / "evaluation.json").write_text(json.dumps({**metrics, "classes": 10}))
    order = [str(file), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(study, order, catch_exceptions=False)
    assert done.exit_code == 0
    assert "±" not in done.output
    assert "M multiply-adds" in done.output
    assert done.output.count(" 25.00 ") == 2 * 3


def test_a_value_is_chosen_by_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 0 runs with every value, seed 1 with the best one of its row."""
    file = tmp_path / "rates.toml"
    file.write_text(
        '[grid]\n"model.img_size" = [32, 48]\n"run.seed" = [0, 1]\n[choose]\n"optimizer.lr" = [0.1, 0.2, 0.3]\n'
    )
    best = {32: 0.2, 48: 0.1}
    done: list[tuple[int, int, float]] = []

    def train(recipe: TrainRecipe, data: str, out: Path, **options: Any) -> None:
        size, seed, rate = recipe.model.img_size, recipe.run.seed, recipe.optimizer.lr
        done.append((size, seed, rate))
        (out / "report").mkdir(parents=True)
        # the test accuracy would choose another one
        metrics = dict.fromkeys(studies.METRICS, rate)
        (out / "report" / "evaluation.json").write_text(json.dumps({**metrics, "classes": 10}))
        values = [0.1, 0.5 if rate == best[size] else 0.3, 0.2]
        lines = [
            {"kind": "epoch", "step": i, "epoch": i, "val_top_1": value, "images_per_second": 50.0}
            for i, value in enumerate(values)
        ]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(loop, "train", train)
    order = [str(file), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(study, order, catch_exceptions=False)
    assert sorted(done[:6]) == [(size, 0, rate) for size in (32, 48) for rate in (0.1, 0.2, 0.3)]
    assert sorted(done[6:]) == [(32, 1, 0.2), (48, 1, 0.1)]
    assert "optimizer.lr = 0.2 is best on validation" in shown.output
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["model.img_size"], row["optimizer.lr"], row["runs"]) for row in rows] == [(32, 0.2, 2), (48, 0.1, 2)]
    assert [row["top_1"] for row in rows] == [0.2, 0.1]
    assert [row["top_1_runs"] for row in rows] == [[0.2, 0.2], [0.1, 0.1]]
    assert "0.2 0.2" in (tmp_path / "out" / "table.csv").read_text()
    assert [row["validation"] for row in rows] == [0.5] * 2
    done.clear()
    CliRunner().invoke(study, order, catch_exceptions=False)
    assert not done


def test_a_variant_lists_values_of_its_own_to_choose_from(tmp_path: Path) -> None:
    file = tmp_path / "rates.toml"
    file.write_text(
        '[variants.small]\n[variants.large]\n"model.img_size" = 48\n"optimizer.lr" = [0.3, 0.4]\n'
        "[variants.nested.optimizer]\nlr = [0.5]\nmomentum = 0.8\n"
        '[grid]\n"run.seed" = [0]\n[choose]\n"optimizer.lr" = [0.1, 0.2]\n'
    )
    cells = studies.cells(studies.load(file))
    found = [(cell.values["variant"], cell.recipe.optimizer.lr, cell.recipe.optimizer.momentum) for cell in cells]
    usual = found[0][2]
    assert found == [
        *[("small", rate, usual) for rate in (0.1, 0.2)],
        *[("large", rate, usual) for rate in (0.3, 0.4)],
        ("nested", 0.5, 0.8),
    ]
    assert all(cell.chosen == {"optimizer.lr": cell.recipe.optimizer.lr} for cell in cells)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[choose]\n"optimizer.lr" = [0.1]', "at least one key"),
        ('[grid]\n"optimizer.lr" = [0.1]\n[choose]\n"optimizer.lr" = [0.1]', "give it once"),
        ('[set.optimizer]\nlr = 1.0\n[grid]\n"run.seed" = [0]\n[choose]\n"optimizer.lr" = [0.1]', r"and in \[set\]"),
        ('[variants.a]\n"optimizer.lr" = 1.0\n[choose]\n"optimizer.lr" = [0.1]', "so a lists the values"),
        ('[variants.a]\n"optimizer.lr" = []\n[choose]\n"optimizer.lr" = [0.1]', "so a lists the values"),
        ('[grid]\n"model.img_size" = [32]\n[choose]\n"run.seed" = [0, 1]', "no setting to choose"),
        ('[grid]\n"model.img_size" = [32]\n[choose]\n"optimizer.lr" = []', "is empty"),
    ],
)
def test_what_cannot_be_chosen(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        studies.load(file)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    """The file of a study changes after a run is done."""
    file, out = tmp_path / "sizes.toml", tmp_path / "out"
    text = '[set]\n"schedule.epochs" = 2\n[grid]\n"model.img_size" = [32]\n'
    file.write_text(text)
    [cell] = studies.cells(studies.load(file))
    (out / cell.folder / "report").mkdir(parents=True)
    (out / cell.folder / "recipe.toml").write_text(cell.recipe.to_toml())
    metrics = {**dict.fromkeys(studies.METRICS, 0.25), "classes": 10}
    (out / cell.folder / "report" / "evaluation.json").write_text(json.dumps(metrics))
    assert len(studies.run(studies.load(file), str(tmp_path), out, train=False)) == 1
    for new, changed in (("= 3", "schedule.epochs was 2 and is now 3"), ('= 2\n"optimizer.lr" = 1.0', "lr was 0.05")):
        file.write_text(text.replace("= 2", new))
        with pytest.raises(UsageError, match=f"is the result of other settings .*{changed}"):
            studies.run(studies.load(file), str(tmp_path), out, train=False)


def test_results_from_other_data_or_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is trained again under the same path, then the data has an image less."""
    file, out, teacher = tmp_path / "sizes.toml", tmp_path / "out", tmp_path / "teacher.safetensors"
    teacher.write_bytes(b"first")
    file.write_text(f'[set]\n"teacher.weights" = "{teacher}"\n[grid]\n"model.img_size" = [32]\n')
    [cell] = studies.cells(studies.load(file))
    folder = out / cell.folder
    (folder / "report").mkdir(parents=True)
    runs.claim(folder, cell.recipe, origins(cell.recipe, ranks.drawn(11)))
    metrics = {**dict.fromkeys(studies.METRICS, 0.25), "classes": 3}
    (folder / "report" / "evaluation.json").write_text(json.dumps(metrics))
    images = 11
    monkeypatch.setattr(setup, "open_datasets", lambda recipe, data: (ranks.drawn(images), []))
    assert len(studies.run(studies.load(file), "drawn", out, train=False)) == 1
    images = 10
    with pytest.raises(UsageError, match=r"read something else as data\.train, data\.val: give another --out"):
        studies.run(studies.load(file), "drawn", out, train=False)
    images = 11
    teacher.write_bytes(b"second")
    with pytest.raises(UsageError, match=r"read something else as teacher\.weights: give another --out"):
        studies.run(studies.load(file), "drawn", out, train=False)
    teacher.unlink()
    assert len(studies.run(studies.load(file), "drawn", out, train=False)) == 1


def test_a_table_of_what_is_done(tmp_path: Path) -> None:
    """Of two rows of two seeds, one has both runs of its first seed, and no other."""
    file = tmp_path / "rates.toml"
    file.write_text('[grid]\n"model.img_size" = [32, 48]\n"run.seed" = [0, 1]\n[choose]\n"optimizer.lr" = [0.1, 0.2]\n')
    order = [str(file), "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--table", "--json"]
    refused = CliRunner().invoke(study, order)
    assert isinstance(refused.exception, UsageError)
    assert "no row of the study rates is complete" in str(refused.exception)
    for cell in studies.cells(studies.load(file)):
        size, rate = cell.values["model.img_size"], cell.chosen["optimizer.lr"]
        if cell.values["run.seed"] == 0 and (size, rate) != (48, 0.2):
            report = tmp_path / "out" / cell.folder / "report"
            report.mkdir(parents=True)
            (report / "evaluation.json").write_text(json.dumps({**dict.fromkeys(studies.METRICS, rate), "classes": 10}))
            line = {"kind": "epoch", "step": 1, "epoch": 1, "val_top_1": rate, "images_per_second": 1.0}
            (report.parent / "metrics.jsonl").write_text(json.dumps(line))
    [row] = json.loads(CliRunner().invoke(study, order, catch_exceptions=False).output)
    assert (row["model.img_size"], row["optimizer.lr"], row["runs"], row["top_1"]) == (32, 0.2, 1, 0.2)


def test_nothing_is_chosen_without_validation(tmp_path: Path) -> None:
    file = tmp_path / "rates.toml"
    file.write_text('[grid]\n"model.img_size" = [32]\n[choose]\n"optimizer.lr" = [0.1, 0.2]\n')
    with pytest.raises(UsageError, match=r"no validation to choose by: name a split in data\.val"):
        studies.choose(studies.cells(studies.load(file)), tmp_path)


@pytest.mark.parametrize(("key", "first", "second"), [("model.img_size", 32, 48), ("run.seed", 0, 1)])
def test_processes_share_the_runs_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, first: int, second: int
) -> None:
    """Another process holds the first run and finishes it after a while; this one does the second meanwhile."""
    file = tmp_path / "sizes.toml"
    file.write_text(f'[grid]\n"{key}" = [{first}, {second}]\n')
    section, _, name = key.partition(".")
    tried: list[int] = []

    def finish(out: Path) -> None:
        (out / "report").mkdir(parents=True)
        metrics = dict.fromkeys(studies.METRICS, 0.25)
        (out / "report" / "evaluation.json").write_text(json.dumps({**metrics, "classes": 10}))

    def train(recipe: TrainRecipe, data: str, out: Path, **options: Any) -> None:
        value = getattr(getattr(recipe, section), name)
        tried.append(value)
        if value == second:
            return finish(out)
        if tried.count(first) == 3:
            finish(out)
        raise BusyError(f"another process is training in {out}")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(studies, "_PAUSE", 0.0)
    told: list[str] = []
    rows = studies.run(studies.load(file), str(tmp_path), tmp_path / "out", notify=told.append)
    assert sum(row["runs"] for row in rows) == 2
    assert tried == [first, second, first, first]
    one, other = (f"{name.replace('_', '-')}-{value}" for value in (first, second))
    assert told == [f"{one}, 1 to follow", f"{one}: another process is at it", f"{other}, 1 to follow"]
