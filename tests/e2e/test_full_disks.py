"""Disks that fill up at every stage: one sentence, nothing lost, and the same command finishes when there is space.
Outputs that cannot be written: read-only disks, and files where folders belong.

The disk is a small tmpfs that grows between the runs, so this needs root on Linux; CI has the cases that a limit of
the size of files can show (`tests/integration/test_bad_input.py`, `test_crawls.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import animesion
from animesion.errors import AnimesionError, FullDiskError
from tests.conftest import draw_folders
from tests.running import run_here

from .conftest import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tmpfs, which takes root on Linux"
    ),
]


class Disk:
    """A disk of a few kilobytes to begin with."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def used(self) -> int:
        facts = os.statvfs(self.root)
        return (facts.f_blocks - facts.f_bfree) * facts.f_frsize

    def resize(self, size: int) -> None:
        option = f"remount,size={max(size, self.used, 4096)}"
        subprocess.run(["mount", "-o", option, str(self.root)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(root)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folders(tmp_path_factory.mktemp("full") / "world")


def digests(out: Path) -> dict[str, str]:
    """Of all that a build makes, without what starts with a dot."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file()]
    names = {path.relative_to(out).as_posix(): path for path in paths}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }


def ramp(disk: Disk, step: int, run: Callable[[], object]) -> Counter[str]:
    """Run until there is space enough; returns the files that there was no space for."""
    failures: Counter[str] = Counter()
    size = 16_384
    while True:
        disk.resize(size)
        try:
            run()
            return failures
        except FullDiskError as error:
            told = str(error)
        assert "\n" not in told
        assert not list(disk.root.rglob(".tmp-*"))
        failures[told.removeprefix("no space to write ").partition(" (")[0]] += 1
        size += step


def test_a_build_on_a_disk_that_grows(world: Path, disk: Disk, tmp_path: Path) -> None:
    recipe = animesion.load_recipe(
        "folder", [f"source.path={world}", "pack.shard_samples=10", "duplicates.copies=local"]
    )
    animesion.build(recipe, tmp_path / "whole" / "out", workers=1)
    out = disk.root / "out"
    failures = ramp(disk, 16_384, lambda: animesion.build(recipe, out, workers=1))
    assert digests(out) == digests(tmp_path / "whole" / "out")
    print(f"{sum(failures.values())} full disks at {len(failures)} files: {', '.join(sorted(failures))}")
    assert len(failures) >= 8


@pytest.mark.parametrize("until", ["fetch", "inspect", "curate", "pack"])
def test_a_disk_that_is_full_after_a_stage(world: Path, disk: Disk, tmp_path: Path, until: str) -> None:
    recipe = animesion.load_recipe("folder", [f"source.path={world}", "pack.shard_samples=10"])
    animesion.build(recipe, tmp_path / "whole" / "out", workers=1)
    out = disk.root / "out"
    disk.resize(1 << 30)
    animesion.build(recipe, out, workers=1, until=until)
    disk.resize(0)
    with pytest.raises(FullDiskError):
        animesion.build(recipe, out, workers=1)
    disk.resize(1 << 30)
    animesion.build(recipe, out, workers=1)
    assert digests(out) == digests(tmp_path / "whole" / "out")


def test_a_crawl_on_a_disk_that_grows(disk: Disk, tmp_path: Path) -> None:
    recipe = animesion.load_recipe("daf-re", list(SMALL), sample=True)
    animesion.build(recipe, tmp_path / "whole" / "out", workers=1, until="fetch")
    out = disk.root / "out"
    failures = ramp(disk, 500_000, lambda: animesion.build(recipe, out, workers=1, until="fetch"))
    assert digests(out) == digests(tmp_path / "whole" / "out")
    print(f"{sum(failures.values())} full disks at {', '.join(sorted(failures))}")
    assert any(name.endswith(".crawl") for name in failures)


def test_a_training_on_a_disk_that_grows(world: Path, disk: Disk, tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    recipe = animesion.load_recipe(
        "folder", [f"source.path={world}", "split.train=60", "split.val=20", "split.test=20"]
    )
    animesion.build(recipe, tmp_path / "data", workers=1)

    def train(out: Path) -> None:
        settings = ["model.name=resnet10t", "model.img_size=32", "run.batch_size=8", "run.save_steps=1"]
        settings += ["schedule.epochs=2", "data.workers=0"]
        chosen = [part for each in settings for part in ("--set", each)]
        done = run_here(
            "train", "--data", str(tmp_path / "data"), "--out", str(out), *chosen, "--device", "cpu", "--resume"
        )
        if done.returncode:
            [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise (FullDiskError if "no space" in error else AnimesionError)(error.removeprefix("error: "))

    train(tmp_path / "whole")
    failures = ramp(disk, 24 << 20, lambda: train(disk.root / "run"))
    print(f"{sum(failures.values())} full disks at {', '.join(sorted(failures))}")
    for name in ("best.safetensors", "last.safetensors"):
        due, found = load_file(tmp_path / "whole" / name), load_file(disk.root / "run" / name)
        assert due.keys() == found.keys()
        assert all((due[key] == found[key]).all() for key in due)


def test_a_publication_to_a_disk_that_grows(small_dataset: Path, disk: Disk) -> None:
    def publish() -> None:
        done = run_here("publish", str(small_dataset), "--to", f"file://{disk.root}/set", "--workers", "1")
        if done.returncode:
            raise FullDiskError(done.stderr.rpartition("error: ")[2].strip())

    failures = ramp(disk, 64_000, publish)
    assert sum(failures.values()) >= 3
    assert not list((disk.root / "set").glob("lease.json*"))
    for line in (small_dataset / "SHA256SUMS").read_text().splitlines():
        name = line.partition("  ")[2]
        with contextlib.suppress(FileNotFoundError):
            assert (disk.root / "set" / name).read_bytes() == (small_dataset / name).read_bytes()


def writing(world: Path, dataset: Path, study: Path, out: Path) -> dict[str, list[str]]:
    """The commands that write into a folder, by name."""
    of_run = ["--data", str(dataset), "--out", str(out), "--device", "cpu"]
    small = ["model.name=resnet10t", "model.img_size=32", "run.batch_size=8", "schedule.epochs=1", "data.workers=0"]
    return {
        "build": ["build", "folder", "--set", f"source.path={world}", "--workers", "1", "--out", str(out)],
        "train": ["train", *of_run, *(part for each in small for part in ("--set", each))],
        "study": ["study", str(study), *of_run],
        "publish": ["publish", str(dataset), "--to", f"file://{out}", "--workers", "1"],
        "report": ["report", str(dataset), "--out", str(out / "page.html")],
        "card": ["card", str(dataset), "--out", str(out / "card.md")],
    }


def refused(arguments: list[str]) -> str:
    """Return the one sentence that a command ends with; a traceback would be raised here."""
    done = run_here(*arguments)
    assert done.returncode in (1, 2), (arguments, done.stderr)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text('name = "s"\n[set]\n"model.name" = "resnet10t"\n"model.img_size" = 32\n[grid]\n"run.seed" = [0]\n')
    return path


def test_read_only_outputs(world: Path, small_dataset: Path, study: Path, disk: Disk) -> None:
    disk.resize(1 << 30)
    commands = writing(world, small_dataset, study, disk.root / "new")
    for begun, more in (("half", ["--until", "inspect"]), ("done", [])):
        commands[f"build {begun}"] = [*commands["build"][:-1], str(disk.root / begun)]
        assert run_here(*commands[f"build {begun}"], *more).returncode == 0
    before = digests(disk.root)
    subprocess.run(["mount", "-o", "remount,ro", str(disk.root)], check=True)
    commands["remove"] = ["remove", str(disk.root / "done"), next(iter(animesion.open_dataset(disk.root / "done"))).key]
    for arguments in commands.values():
        assert "read-only file system" in refused(arguments)
    for name in ("verify", "stats"):
        done = run_here(name, str(disk.root / "done"))
        assert done.returncode == 0, done.stderr
    assert digests(disk.root) == before
    print(f"{len(commands) + 2} commands")


def test_files_where_folders_belong(world: Path, small_dataset: Path, study: Path, tmp_path: Path) -> None:
    file, tried = tmp_path / "file", 0
    file.write_text("mine")
    for out in (file, file / "inner"):
        for arguments in writing(world, small_dataset, study, out).values():
            assert "is a file" in refused(arguments)
            tried += 1
    assert file.read_text() == "mine"
    recipe = animesion.load_recipe("folder", [f"source.path={world}"])
    for place in ("curated.parquet", "features", ".receipts"):
        out = tmp_path / place.strip(".")
        animesion.build(recipe, out, workers=1, until="inspect")
        if place == "curated.parquet":
            (out / place).mkdir()
        else:
            (out / place).rename(out.with_suffix(".away"))
            (out / place).write_text("mine")
        with pytest.raises(AnimesionError, match=r"remove it, or choose another place$|is not a build"):
            animesion.build(recipe, out, workers=1)
        tried += 1
    print(f"{tried} commands")
