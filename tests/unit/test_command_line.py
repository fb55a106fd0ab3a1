"""Nearest names, one style of errors, completion, and the lists of recipes."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

from animesion.cli import cli
from animesion.config.settings import nearest, similar
from tests.running import run_here


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["biuld"], "error: there is no command 'biuld'; did you mean 'build'?; see animesion --help"),
        (
            ["build", "folder", "--uot", "x"],
            "error: there is no option '--uot'; did you mean '--out'?; see animesion build --help",
        ),
        (["build"], "error: missing argument 'RECIPE'; see animesion build --help"),
        (["build", "daf"], "error: no recipe named 'daf'; did you mean 'daf-re'?"),
        (["sources", "danboru"], "error: source.kind: there is no source 'danboru'; did you mean 'danbooru'?"),
        (
            ["build", "folder", "--set", "split.strategy=groupd"],
            "error: recipe folder: split.strategy: there is no 'groupd'; did you mean 'grouped'?; values are",
        ),
        (
            ["train", "--data", ".", "--recipe", "scrtch", "--out", "x"],
            "no recipe named 'scrtch'; did you mean 'scratch'?",
        ),
        (
            ["export", ".", "--to", "onxx", "--out", "x"],
            "error: '--to': there is no 'onxx'; did you mean 'onnx'?; values are onnx, torchscript, hf; see",
        ),
    ],
)
def test_errors_are_one_line_in_one_style_and_offer_the_nearest_name(arguments: list[str], sentence: str) -> None:
    done = run_here(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr


def test_a_recipe_beside_the_reader_is_offered_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faces.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert "no recipe named 'faces'; did you mean the file './faces.toml'?" in run_here("build", "faces").stderr


def test_every_command_has_its_place_in_the_list() -> None:
    with click.Context(cli) as context:
        names = cli.list_commands(context)
    assert names[0] == "init"
    assert names[-1] == "doctor"  # those that have no place would follow it


def test_names_that_begin_with_what_was_given_come_first_and_preferred_ones_before_longer() -> None:
    names = ["vit_tiny_patch16", "vit_tiny_patch16_224", "tiny_vit_5m", "vit_tiny_r_s16_p8_224"]
    assert similar("vit_tiny", names, 2) == ["vit_tiny_patch16", "vit_tiny_patch16_224"]
    assert nearest("VIT_TINY", names) == "; did you mean 'vit_tiny_patch16'?"
    assert nearest("tiny_vit_5n", names) == "; did you mean 'tiny_vit_5m'?"
    assert nearest("resnet", names) == ""
    assert nearest("", names) == ""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("animesion build daf", {"daf-re", "daf-re-full", "daf-re-full-published", "daf-re-published"}),
        ("animesion build folder --set split.st", {"split.strategy="}),
        ("animesion sources dan", {"danbooru"}),
        ("animesion train --recipe cal-", {"cal-teacher"}),
        ("animesion train --set optimizer.l", {"optimizer.lr=", "optimizer.layer_decay="}),
    ],
)
def test_the_shell_completes(words: str, offered: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    lines = BashComplete(cli, {}, "animesion", "_ANIMESION_COMPLETE").complete().splitlines()
    assert {line.partition(",")[2] for line in lines} == offered


def test_recipes_of_training_are_listed_and_printed() -> None:
    listed = run_here("recipes", "--train").stdout
    assert "\nscratch " in listed
    assert all(len(line.split(None, 1)) == 2 for line in listed.splitlines())
    assert 'name = "tgda"' in run_here("recipes", "--train", "tgda").stdout
    assert "did you mean 'tgda'" in run_here("recipes", "--train", "tdga").stderr
