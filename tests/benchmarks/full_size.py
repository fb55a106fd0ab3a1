"""A DAF:re of full size, built, verified and browsed: CPU-seconds by stage, wall seconds, peak memory and bytes.

    python tests/benchmarks/full_size.py LABELS [--share 1] [--workers 1] [--folder FOLDER] [--steps build verify]
    python tests/benchmarks/full_size.py LABELS --share 0.01 --steps build --figures growth.jsonl
    python tests/benchmarks/full_size.py --plot growth.png --figures growth.jsonl

LABELS has `per_class_counts.csv`, `classid_classname.csv` and the label files that there are of DAF:re; rows that are
missing are made up until every class and split has its published size. The images are drawn: JPEGs of 2 KB, two in a
hundred of them another image of their class in half the size. `--share 0.1` takes every tenth class; `browse` asks for
those of the whole set. The copies search
of the recipe is on. Memory is that of the main process; the time of the workers is read from /proc, which needs Linux.
`--figures` appends those of the build to a file of JSON lines, and `--plot` draws such a file.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import browse_scale
import numpy as np
from PIL import Image
from repeat_builds import Stages

import animesion

SPLITS = ("train", "val", "test")
STEPS = ("build", "verify", "browse")


def rows(labels: Path, share: float) -> dict[str, list[tuple[int, str]]]:
    """Class id and path of each image, by split: those of the label files, and made up ones."""
    with (labels / "per_class_counts.csv").open(newline="", encoding="utf-8") as file:
        counts = list(csv.DictReader(file))
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in SPLITS}
    for path in sorted(labels.glob("*.csv")):
        split = path.stem.partition("_")[0]
        if split in found:
            for line in path.read_text(encoding="utf-8").splitlines():
                class_id, _, name = line.partition(",")
                if class_id.isdigit():
                    found[split].append((int(class_id), name))
    number = 10_000_000  # above the ids of Danbooru in 2018
    for split, listed in found.items():
        there = np.bincount([class_id for class_id, _ in listed], minlength=len(counts))
        for row in counts:
            for _ in range(int(row[split]) - int(there[int(row["class_id"])])):
                listed.append((int(row["class_id"]), f"{number % 1000:04d}/{number}.jpg"))
                number += 1
    step = round(1 / share)
    return {split: sorted(row for row in listed if row[0] % step == 0) for split, listed in found.items()}


def draw(folder: Path, labels: Path, share: float) -> int:
    """Write the images and label files; returns the number of images."""
    wanted = rows(labels, share)
    out = folder / "labels"
    out.mkdir(parents=True)
    (out / "classid_classname.csv").write_bytes((labels / "classid_classname.csv").read_bytes())
    total, last = 0, None
    for split, listed in wanted.items():
        (out / f"{split}.csv").write_text("".join(f"{class_id},{name}\n" for class_id, name in listed))
        for class_id, name in listed:
            path = folder / "faces" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if total % 50 == 49 and last is not None and last[0] == class_id:
                image, side = last[1], 64
            else:
                coarse = np.random.default_rng(total).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                image, side = Image.fromarray(coarse).resize((128, 128), Image.Resampling.BICUBIC), 128
            content = io.BytesIO()
            (image if side == 128 else image.resize((side, side))).save(content, "JPEG", quality=60)
            path.write_bytes(content.getvalue())
            total, last = total + 1, (class_id, image)
    return total


def one(step: str, folder: Path, workers: int) -> None:
    """A step in this process; prints its figures as JSON."""
    stages = Stages()
    built = folder / "built"
    if step == "build":
        places = [f'source.labels="{folder}/labels"', f'source.images="{folder}/faces"']
        result = animesion.build(animesion.load_recipe("daf-re", places), built, workers=workers, progress=stages)
        print(f"kept {result.kept:,}, dropped {json.dumps(result.dropped)}", file=sys.stderr)
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
    elif step == "verify":
        found = animesion.verify(built, workers=workers)
        print(f"verify: {found}"[:2000], file=sys.stderr)
    else:
        with contextlib.redirect_stdout(sys.stderr):
            browse_scale.measure(built, len(animesion.open_dataset(built)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"stages": stages.seconds, "peak": peak}))


def plot(figures: Path, path: Path) -> None:
    """Draw CPU-seconds by stage and memory over the number of images, with what is proportional to it, into a PNG."""
    from matplotlib.figure import Figure

    found = sorted(map(json.loads, figures.read_text().splitlines()), key=lambda each: each["images"])
    images = [each["images"] for each in found]
    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    seconds.loglog(images, [sum(each["stages"].values()) for each in found], "ko-", label="build")
    for stage in found[-1]["stages"]:
        # shorter times than the clock of a process tells are left out
        points = [(each["images"], spent) for each in found if (spent := each["stages"].get(stage, 0)) >= 0.1]
        seconds.loglog(*zip(*points, strict=True), "o-", label=stage, linewidth=1, markersize=3)
    memory.loglog(images, [each["peak"] for each in found], "ko-", label="main process")
    for axes, last, unit in (
        (seconds, sum(found[-1]["stages"].values()), "CPU-seconds"),
        (memory, found[-1]["peak"], "peak memory in MB"),
    ):
        axes.loglog(images, [last * n / images[-1] for n in images], ":", color="grey", label="linear")
        axes.set(xlabel="images", ylabel=unit)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small", ncols=2)
    figure.savefig(path)


def main() -> None:
    """Draw, then measure each step in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, nargs="?")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to draw and build; a folder that is kept")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--figures", type=Path, help="JSON lines of builds, to add to or to plot")
    parser.add_argument("--plot", type=Path, help="draw the figures into this PNG, and build nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one, given.folder, given.workers)
        return
    if given.plot:
        plot(given.figures, given.plot)
        return
    if given.labels is None:
        parser.error("LABELS is needed, the folder of DAF:re's label files")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "labels").exists():
            print(f"{draw(folder, given.labels, given.share):,} images drawn", flush=True)
        for step in given.steps:
            command = [sys.executable, __file__, str(given.labels), "--folder", str(folder), "--one", step]
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(
                [*command, "--workers", str(given.workers)], check=True, stdout=subprocess.PIPE, text=True
            )
            wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            figures = json.loads(done.stdout.splitlines()[-1])
            print(f"{step}: {seconds:,.0f} CPU-s, {wall:,.0f} s, {figures['peak']:,.0f} MB", flush=True)
            if step == "build" and given.figures:
                images = sum(1 for _ in (folder / "faces").glob("*/*.jpg"))
                with given.figures.open("a") as file:
                    file.write(json.dumps({"images": images, **figures}) + "\n")
            for stage, spent in figures["stages"].items():
                print(f"  {stage}: {spent:,.0f} CPU-s", flush=True)
        total = sum(entry.stat().st_size for entry in (folder / "built").rglob("*") if entry.is_file())
        print(f"{total / 2**20:,.0f} MB in the folder", flush=True)


if __name__ == "__main__":
    main()
