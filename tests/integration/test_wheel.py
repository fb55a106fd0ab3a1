"""Wheels: with the compiled module after a compilation that succeeded, pure Python after any other."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[2]
MODULES = ("animesion/images/_pixels.abi3.so", "animesion/dedup/_joins.abi3.so")
STALE = b"\x7fELF of an older source"

BUILD = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); __import__(sys.argv[2])"

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler")


class Built(NamedTuple):
    """A wheel, and what building it printed."""

    wheel: Path
    output: str


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from, without the .gitignore that covers a compiled module."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("animesion", "sample", "scrapers", "training"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


def build(tree: Path, **environment: str) -> Built:
    inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "CFLAGS", "ARCHFLAGS")}
    out = tree.parent / "dist"
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)],
        cwd=tree,
        env={**inherited, "CFLAGS": "-O0", **environment},  # the optimizer takes most of the time
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = out.iterdir()
    return Built(wheel, done.stdout)


def put_stale(tree: Path) -> None:
    """Modules as an earlier build leaves them."""
    for module in MODULES:
        (tree / module).write_bytes(STALE)


def modules_in(tree: Path) -> list[str]:
    return sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.so"))


def members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def compiler(path: Path, script: str) -> str:
    """A program to use as compiler; in the script `$out` is the file it has to write."""
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nout=$2\n{script}\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


SCRIPTS = {
    "fails and prints nothing": ("exit 1", "failed with status 1"),
    "fails with a message": ("echo no such header >&2; exit 1", "no such header"),
    "succeeds and writes nothing": ("exit 0", "wrote nothing"),
    "succeeds and writes an empty file": (': > "$out"', "wrote nothing"),
    "writes what does not load": ('echo junk > "$out"', "does not load"),
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_compiler_that_fails_gives_a_pure_wheel(tree: Path, tmp_path: Path, kind: str) -> None:
    script, reason = SCRIPTS[kind]
    put_stale(tree)
    wheel, output = build(tree, CC=compiler(tmp_path / "compiler", script))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in members(wheel) if name.endswith((".so", ".c"))]
    assert "animesion/images/features.py" in members(wheel)
    assert reason in output
    assert not modules_in(tree)


def test_no_compiler_at_all_gives_a_pure_wheel(tree: Path, tmp_path: Path) -> None:
    put_stale(tree)
    wheel, output = build(tree, PATH=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in members(wheel) if name.endswith((".so", ".c"))]
    assert "no C compiler was found" in output


@needs_compiler
def test_a_named_compiler_that_does_not_exist_is_not_replaced_by_another(tree: Path, tmp_path: Path) -> None:
    wheel, output = build(tree, CC=str(tmp_path / "cc"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no C compiler was found" in output


def test_a_stale_module_that_cannot_be_removed_stays_out_of_the_wheel(tree: Path) -> None:
    # a folder cannot be unlinked, for root neither
    (tree / MODULES[0]).mkdir()
    (tree / MODULES[0] / "stale.abi3.so").write_bytes(STALE)
    wheel, _ = build(tree, CC="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in members(wheel) if ".so" in name]


@needs_compiler
@pytest.mark.parametrize("stale", [False, True])
def test_a_compiler_that_works_gives_a_wheel_with_the_module(tree: Path, tmp_path: Path, stale: bool) -> None:
    if stale:
        put_stale(tree)
    wheel, output = build(tree)
    assert "-cp311-abi3-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert "not compiled" not in output
    assert sorted(name for name in members(wheel) if name.endswith((".so", ".c"))) == sorted(MODULES)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel", MODULES)
    for module in MODULES:
        path = tmp_path / "wheel" / module
        command = [sys.executable, "-I", "-c", IMPORT, str(path.parent), path.name.partition(".")[0]]
        assert subprocess.run(command, timeout=60).returncode == 0
    assert modules_in(tree) == sorted(MODULES)


@needs_compiler
def test_a_file_that_does_not_compile_leaves_the_others_in_the_wheel(tree: Path) -> None:
    put_stale(tree)
    (tree / "animesion/dedup/_joins.c").write_text("#error nothing goes here\n", encoding="utf-8")
    wheel, output = build(tree)
    assert "-cp311-abi3-" in wheel.name
    assert "_joins.c was not compiled" in output
    assert [name for name in members(wheel) if name.endswith(".so")] == [MODULES[0]]
    assert modules_in(tree) == [MODULES[0]]


@pytest.mark.parametrize(
    ("machine", "flags", "target", "tag"),
    [
        ("arm64", "", "", "macosx_11_0_arm64"),
        ("x86_64", "", "", "macosx_10_13_x86_64"),
        ("x86_64", "", "10.15", "macosx_10_15_x86_64"),
        ("arm64", "", "10.9", "macosx_11_0_arm64"),
        ("arm64", "", "14.4", "macosx_14_0_arm64"),
        ("arm64", "-arch x86_64", "", "macosx_10_13_x86_64"),
        ("x86_64", "-arch arm64", "12.0", "macosx_12_0_arm64"),
        ("arm64", "-arch x86_64 -arch arm64", "", "macosx_10_13_universal2"),
    ],
)
def test_tags_on_macos(monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, target: str, tag: str) -> None:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hatch_build", hook)
    spec.loader.exec_module(hook)
    monkeypatch.setattr(hook, "MACOS", True)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("ARCHFLAGS", flags)
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", target)
    assert hook.platform_tag() == tag
    assert hook.is_cross_build() == (flags != "" and machine not in flags)
