"""Class names that YAML, CSV, shells and spreadsheets read as something else come out of a dataset as they went in."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import animesion
from animesion.cli import main
from animesion.pipeline.runner import BuildResult
from tests.conftest import draw

#: Name of a folder -> the class, where it differs: blanks at the ends and control characters are no part of a name.
NAMES = {
    **dict.fromkeys(["no", "yes", "null", "~", "on", "1e3", "0x10", "007", "1_000", "12:30:45", "2020-01-01", "=1+1"]),
    **dict.fromkeys(
        ["2b_(nier:automata)", ":d", "#1", "- dash", "a: b", "'q'", '"dq"', "初音ミク", "a|b", "<b>x", "C.C."]
    ),
    **dict.fromkeys(
        ["{name}", "%s", "&amp;", "@home", "!x", "*star", "back\\slash", "é", "true", "nan", "None", "x" * 200]
    ),
    " lead": "lead",
    "tab\tx": "tab x",
    "trail. ": "trail.",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    root = tmp_path_factory.mktemp("names")
    for number, name in enumerate([*NAMES, ".hack"]):
        (root / "in" / name).mkdir(parents=True)
        draw(900 + number).save(root / "in" / name / "1.png")
    settings = [f"source.path={json.dumps(str(root / 'in'))}", "split.strategy=single", "duplicates.action=report"]
    return animesion.build(animesion.load_recipe("folder", settings), root / "out", workers=1)


def test_names_are_kept(built: BuildResult) -> None:
    assert set(built.classes) == {name or folder for folder, name in NAMES.items()}
    assert any("hidden folders are skipped: '.hack'" in note for note in built.notes)
    with (built.out / "classes.csv").open(newline="", encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(built.classes)
    assert json.loads((built.out / "dataset.json").read_text(encoding="utf-8"))["class_names"] == list(built.classes)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(built.out)])
    assert ended.value.code == 0


def test_other_readers_see_the_same_names(built: BuildResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    loaded = datasets.load_dataset(str(built.out), split="train", cache_dir=str(tmp_path))
    assert loaded.features["cls"].names == list(built.classes)
