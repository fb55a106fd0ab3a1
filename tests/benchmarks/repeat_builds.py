"""CPU-seconds of a build, and of what is built again when nothing, the split, or one image in a hundred has changed.

    python tests/benchmarks/repeat_builds.py [--images 20000] [--classes 3263] [--workers 1] [--folder FOLDER] [--check]

The images are small drawn JPEGs with label files, a long tail of classes in the form of DAF:re. Each build is a process
of its own, and its figures include the start of Python. `--check` compares with a build from nothing, byte by byte. The
time of the workers is read from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from growing import cpu_seconds
from PIL import Image

import animesion
from animesion.progress import Progress

RECIPE = "daf-re"
SETTINGS = ["classes.minimum=1", "duplicates.copies=off", "split.strategy=grouped"]
#: Files whose bytes must not depend on how often a dataset was built.
OUTPUTS = ("data/*", "curated.parquet", "index.parquet", "dataset.json", "report.html", "README.md", "plots/*")


def draw(folder: Path, first: int, last: int, classes: int) -> None:
    """Images `first` to `last` as faces/BBBB/ID.jpg, and label files of all images so far."""
    for i in range(first, last):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((80, 80), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
        path = folder / "faces" / f"{i % 1000:04d}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
    labels = folder / "labels"
    labels.mkdir(exist_ok=True)
    # a class for every image first, then a long tail: few classes have many images
    tail = np.random.default_rng(0).zipf(1.6, last * 2) - 1
    tail = tail[tail < classes]
    ids = [i if i < classes else int(tail[i]) for i in range(last)]
    rows = [f"{class_id},{i % 1000:04d}/{i}.jpg\n" for i, class_id in enumerate(ids)]
    (labels / "train.csv").write_text("".join(rows))
    (labels / "classid_classname.csv").write_text("".join(f"{c},character_{c}\n" for c in range(classes)))


class Stages(Progress):
    """CPU-seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def started(self, stage: str, total: int | None) -> None:
        self._start = cpu_seconds()

    def finished(self, stage: str) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + cpu_seconds() - self._start


def one_build(out: Path, workers: int, settings: list[str]) -> None:
    """Build in this process and print the figures as JSON."""
    stages = Stages()
    update = "update" in settings
    recipe = animesion.load_recipe(RECIPE, [value for value in settings if value != "update"])
    result = animesion.build(recipe, out, workers=workers, replace=True, update=update, progress=stages)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"stages": stages.seconds, "kept": result.kept, "memory": memory}))


def build(folder: Path, out: Path, workers: int, *settings: str) -> tuple[float, float, dict[str, float], float]:
    """CPU-seconds and wall seconds of a build in a process of its own, CPU-seconds by stage, and its memory in MB."""
    places = [f'source.labels="{folder}/labels"', f'source.images="{folder}/faces"']
    command = [sys.executable, __file__, "--one", str(out), "--workers", str(workers)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*command, *SETTINGS, *places, *settings], check=True, stdout=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, wall, found["stages"], found["memory"]


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every output."""
    paths = [path for pattern in OUTPUTS for path in out.glob(pattern)]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def main() -> None:
    """Build, repeat, change, grow, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=3_263)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to draw and build; a folder that is kept")
    parser.add_argument("--check", action="store_true", help="compare with a build from nothing")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one_build(arguments.one, arguments.workers, arguments.settings)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        images, workers, out = arguments.images, arguments.workers, folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder / "faces", ignore_errors=True)
        draw(folder, 0, images, arguments.classes)
        whole = 0.0

        def show(what: str, *settings: str, into: Path = out) -> None:
            nonlocal whole
            seconds, wall, stages, memory = build(folder, into, workers, *settings)
            whole = whole or seconds
            listed = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
            figures = f"{seconds:7.1f} CPU-s {100 * seconds / whole:6.1f} % {wall:7.1f} s {memory:6.0f} MB"
            print(f"{what:<24} {figures}  {listed}", flush=True)

        print(f"{images:,} images, {arguments.classes:,} classes, {workers} workers, {os.cpu_count()} cores")
        show("whole build")
        show("again")
        show("another split", "split.seed=1")
        if arguments.check:
            shutil.rmtree(folder / "fresh", ignore_errors=True)
            show("the same from nothing", "split.seed=1", into=folder / "fresh")
            print("the same bytes" if digests(out) == digests(folder / "fresh") else "OTHER BYTES")
        shards = {name: digest for name, digest in digests(out).items() if name.endswith(".tar")}
        draw(folder, images, images + images // 100, arguments.classes)
        show("1 % more images", "split.seed=1", "update")
        untouched = shards.items() <= digests(out).items()
        print("the shards before are untouched" if untouched else "OTHER SHARDS")


if __name__ == "__main__":
    main()
