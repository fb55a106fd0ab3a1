"""The same bytes for any number of workers, and after a build was killed at any time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import animesion
from tests.conftest import draw_folders

from .conftest import SMALL, shard_digests


def command(out: Path) -> list[str]:
    settings = [part for value in SMALL for part in ("--set", value)]
    script = "from animesion.cli import main; main()"
    return [sys.executable, "-c", script, "build", "daf-re", "--sample", *settings, "--workers", "2", "--out", str(out)]


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_do_not_depend_on_the_number_of_workers(small_build: Path, tmp_path: Path, workers: int) -> None:
    recipe = animesion.load_recipe("daf-re", list(SMALL), sample=True)
    animesion.build(recipe, tmp_path / "other", workers=workers)
    assert shard_digests(tmp_path / "other") == shard_digests(small_build)


@pytest.mark.parametrize("most", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_builds_resume_to_the_same_bytes(small_build: Path, tmp_path: Path, most: int) -> None:
    """Each build is killed a moment after it added a random number of files to those of the build before."""
    out, files, kills = tmp_path / "killed", files_of(small_build), 0
    rng = random.Random(most)
    while kills < most:
        enough = files_of(out) + rng.uniform(0, files / most)
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and files_of(out) <= enough:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:  # so far resumed, now from nothing again
            assert process.returncode == 0
            assert shard_digests(out) == shard_digests(small_build)
            shutil.rmtree(out)
    final = subprocess.run(command(out), capture_output=True, text=True, timeout=120)
    assert final.returncode == 0, final.stderr
    assert shard_digests(out) == shard_digests(small_build)
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
def test_builds_that_start_at_once_in_one_folder(tmp_path: Path) -> None:
    world, out, alone = draw_folders(tmp_path / "world"), tmp_path / "out", tmp_path / "alone"
    script = "from animesion.cli import main; main()"
    settings = ["--set", f"source.path={world}", "--workers", "1", "--out", str(out)]
    line = [sys.executable, "-c", script, "build", "folder", *settings]
    started = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    refusals = [error for error, code in ended if code]
    assert all("in use by another build" in error and "Traceback" not in error for error in refusals)
    print(f"{len(refusals)} of {len(ended)} were refused")
    assert 1 <= len(refusals) < len(ended)
    animesion.build(animesion.load_recipe("folder", [f"source.path={world}"]), alone, workers=1)
    assert shard_digests(out) == shard_digests(alone)


def test_workers_and_servers_end_with_a_killed_build(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children: set[int] = set()
    deadline = time.monotonic() + 20
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        children |= set(descendants(process.pid))
    process.kill()
    process.wait()
    assert children
    while (left := {pid for pid in children if is_running(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_a_finished_build_does_nothing_again(small_build: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(small_build, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    result = animesion.build(animesion.load_recipe("daf-re", list(SMALL), sample=True), out)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"lock"}
    assert not result.changed


@pytest.mark.parametrize("lost", ["data/val-00000.tar", "README.md", "index.parquet", "curated.parquet", "features"])
def test_deleted_files_are_rebuilt_with_the_same_bytes(small_build: Path, tmp_path: Path, lost: str) -> None:
    out = tmp_path / "copy"
    shutil.copytree(small_build, out)
    path = out / lost
    before = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    animesion.build(animesion.load_recipe("daf-re", list(SMALL), sample=True), out, workers=2)
    assert shard_digests(out) == shard_digests(small_build)
    assert not before or path.read_bytes() == before


def files_of(out: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(out))


def descendants(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(child) for child in text.split()]
    return children + [below for child in children for below in descendants(child)]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
