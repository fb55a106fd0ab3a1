"""`animesion init`: what it says of a folder is what a build of the recipe does."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import animesion
from animesion.cli.init import init
from animesion.config.recipe import load
from tests.conftest import draw
from tests.running import run_here


def folder(root: Path, names: list[str], side: int = 40) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(i, side).save(path)
    return root


def test_the_recipe_of_a_folder_with_splits_builds_what_was_said(tmp_path: Path) -> None:
    names = [f"{split}/{label}/{i}.png" for split in ("train", "test") for label in ("red", "blue") for i in range(3)]
    root = folder(tmp_path / "my faces", names)
    (root / "train/red/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "mine.toml"
    done = run_here("init", str(root), "--yes", "--out", str(out), "--size", "32", "--licence", "cc0-1.0")
    assert done.returncode == 0, done.stderr
    assert "13 images, 2 classes: red 7, blue 6" in done.stdout
    assert "it publishes the splits" in done.stdout
    assert "shorter sides of 12 images: 40 pixels" in done.stdout
    assert "cannot be used: truncated image 1" in done.stdout
    recipe = load(str(out))
    assert (recipe.name, recipe.pack.size, recipe.card.licence) == ("my-faces", 32, "cc0-1.0")
    result = animesion.build(recipe, tmp_path / "built", workers=1)
    assert result.seen == 13
    assert set(result.splits) == {"train", "test"}
    assert dict(result.dropped)["truncated image"] == 1


def test_names_of_others_do_no_harm_and_nothing_is_overwritten(tmp_path: Path) -> None:
    root = folder(tmp_path / 'a"b', ["x\n[pack]\nsize=1/1.png", "x\n[pack]\nsize=1/2.png", 'y\'"""/1.png'])
    out = tmp_path / "r.toml"
    assert run_here("init", str(root), "--yes", "--out", str(out)).returncode == 0
    values = tomllib.loads(out.read_text())
    assert "pack" not in values
    assert values["source"]["path"] == str(root)
    before = out.read_bytes()
    again = run_here("init", str(root), "--yes", "--out", str(out))
    assert (again.returncode, out.read_bytes()) == (2, before)
    assert "exists: give another --out" in again.stderr


def test_faces_are_not_enlarged_to_the_size_of_whole_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "large", ["a/1.png", "b/2.png"], 700)
    (tmp_path / "large" / "more.zip").write_bytes(b"PK")
    shown = CliRunner().invoke(init, ["large", "--yes", "--out", "whole.toml"])
    assert "1 file beside the classes left out, 'more.zip'" in shown.output
    assert load("whole.toml").pack.size == 512
    assert CliRunner().invoke(init, ["large", "--yes", "--detector", "anime", "--out", "faces.toml"]).exit_code == 0
    assert (load("faces.toml").crop.detector, load("faces.toml").pack.size) == ("anime", 0)


def test_a_built_dataset_is_no_folder_of_classes(small_dataset: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(init, [str(small_dataset), "--yes", "--out", str(tmp_path / "x.toml")])
    assert "is a built dataset, whose images are in its shards: set source.kind=webdataset" in str(result.exception)
    assert not (tmp_path / "x.toml").exists()


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    assert (
        run_here("init", str(tmp_path / "none"), "--yes").stderr == f"error: file or folder {tmp_path}/none not found\n"
    )
    root = folder(tmp_path / "some", ["a/1.png", "b/1.png"])
    wrong = run_here("init", str(root), "--yes", "--name", "no/name", "--out", str(tmp_path / "x.toml"))
    assert wrong.returncode == 2
    assert "'no/name' cannot be a name" in wrong.stderr
    assert not (tmp_path / "x.toml").exists()
