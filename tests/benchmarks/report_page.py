"""Time to write and to open the report of 3,263 classes, compared with a blank page in the same browser.

    python tests/benchmarks/report_page.py [--classes 3263] [--images 4] [--repeats 5] [--rows 463437]

The images are generated and built with the `folder` source, and the page is opened from disk in headless Chromium,
without the start of the browser. "ready" is the time until the class table is displayed. "searched" is the time from
the last key to the rows of the result. "scrolled" is the time between frames while the table scrolls by five rows per
frame from its first class to its last and back; a browser draws at most one frame per 16.7 ms. `--rows` is the number
of images in a table, without pixels, from which facts are collected and filtered, and timed. The map of `animesion
browse` is timed on the images that were built. Work of Python is in CPU-seconds, that of the browser in seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

import animesion
from animesion.report import facts, page
from animesion.report.images import COLUMNS, Images, Rows
from animesion.report.selection import Filter, Places, matching
from animesion.schemas import CURATED

SIDE = 96

#: Scrolls the table and returns the milliseconds between frames.
SCROLL = """() => new Promise((done) => {
  const list = document.querySelector('.list'), gaps = [];
  let last = 0, step = 170;
  const frame = (now) => {
    if (last) gaps.push(now - last);
    last = now;
    list.scrollTop += step;
    if (list.scrollTop + list.clientHeight >= list.scrollHeight - 1) step = -170;
    if (step < 0 && list.scrollTop <= 0) done(gaps);
    else requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
})"""


def build(folder: Path, classes: int, images: int) -> Path:
    """Build a dataset of smooth random patterns, no two of them similar."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / "source" / f"character_{label:04d}").mkdir(parents=True)
        for i in range(images):
            coarse = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(folder / "source" / f"character_{label:04d}" / f"{i}.jpg")
    recipe = animesion.load_recipe("folder", [f'source.path="{folder / "source"}"', "duplicates.near=false"])
    animesion.build(recipe, folder / "built")
    return folder / "built"


def opened(path: Path, blank: Path, repeats: int) -> None:
    """Print times of the page and of a blank one, measured alternately."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("skipped: opening the page requires the playwright package")
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        times: dict[str, list[float]] = {"blank": [], "ready": [], "searched": []}
        frames: list[float] = []
        for _ in range(repeats):
            view = browser.new_page(viewport={"width": 1280, "height": 800})
            start = time.perf_counter()
            view.goto(blank.as_uri())
            times["blank"].append(time.perf_counter() - start)
            start = time.perf_counter()
            view.goto(path.as_uri() + "#classes")
            view.wait_for_selector(".list .row")
            times["ready"].append(time.perf_counter() - start)
            frames += view.evaluate(SCROLL)
            start = time.perf_counter()
            view.fill("input[type=search]", "_0042")
            view.wait_for_selector("text=1 of")
            times["searched"].append(time.perf_counter() - start)
            rows = view.locator(".list .row").count()
            view.close()
        browser.close()
    for name, taken in times.items():
        print(f"{name:>9}: {statistics.median(taken):.3f} s (median of {repeats}, most {max(taken):.3f})")
    late = sum(gap > 34 for gap in frames) / len(frames)
    print(
        f" scrolled: {len(frames):,} frames, {statistics.median(frames):.1f} ms each (median), "
        f"{np.quantile(frames, 0.99):.1f} ms (99th percentile), {late:.1%} took two frames or more"
    )
    print(f"rows in the page after the search: {rows}")
    print(f"page over blank: {statistics.median(times['ready']) / statistics.median(times['blank']):.1f}x")


def collected(dataset: Any, rows: int, classes: int) -> None:
    """Print the time to collect facts from a table of many images with a long tail of classes."""
    rng = np.random.default_rng(1)
    shares = 1 / np.arange(20, 20 + classes)
    labels = np.sort(rng.choice(classes, rows, p=shares / shares.sum()))
    numbers = np.arange(rows)
    kept = numbers % 8 > 0
    columns: dict[str, Any] = {
        "key": [f"danbooru-{i}" for i in range(rows)],
        "kept": kept,
        "class_id": labels,
        "part": 0,
        "offset": 0,
        "width": 300 + numbers % 500,
        "height": 300 + numbers % 700,
        "bytes": 50_000 + numbers,
        "label": [f"c{label}" for label in labels],
        "reason": np.where(kept, "", "near duplicate"),
        "cluster": [f"danbooru-{i - i % 16}" if i % 16 < 2 else "" for i in range(rows)],
        "crop": pa.FixedSizeListArray.from_arrays(pa.array(np.tile([0, 0, 96, 96], rows), pa.int32()), 4),
    }
    blank = {name: columns.get(name, "") for name in COLUMNS}
    arrays = [
        values
        if isinstance(values, pa.Array)
        else pa.array(np.broadcast_to(values, rows)).cast(CURATED.field(name).type)
        for name, values in blank.items()
    ]
    table = Rows(pa.table(arrays, names=COLUMNS))
    start = time.process_time()
    facts.overview(dataset, table)
    facts.clusters(table)
    facts.Members(table, classes)
    facts.dropped(table, "near duplicate")
    took = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"facts of {rows:,} images: {took:.1f} CPU s, {took / rows * 1e6:.1f} us per image; peak {peak:.1f} GB in total"
    )
    at = rng.random((rows, 2), dtype=np.float32)
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    area = " ".join(f"{0.5 + 0.3 * np.cos(each):.3f},{0.5 + 0.3 * np.sin(each):.3f}" for each in angles)
    for name, query in {"by a text": {"text": "4711"}, "by an area of 60 corners": {"area": area}}.items():
        start = time.process_time()
        found = len(matching(table, Filter.of(query), (), at))
        print(f"filtered {name}: {time.process_time() - start:.2f} CPU s, {found:,} of {rows:,} images")


def main() -> None:
    """Build, write, open, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=3263)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=463_437)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        built = build(folder, arguments.classes, arguments.images)
        dataset = animesion.open_dataset(built)
        start = time.process_time()
        data = facts.of_dataset(dataset)
        (folder / "report.html").write_text(page.render(data), encoding="utf-8")
        took = time.process_time() - start
        images = sum(len(samples) for samples in data["classes"]["samples"])
        megabytes = (folder / "report.html").stat().st_size / 1e6
        classes = len(data["classes"]["names"])
        without = sum(not any(each["image"] >= 0 for each in samples) for samples in data["classes"]["samples"])
        print(
            f"written: {took:.1f} CPU s, {megabytes:.1f} MB, {images:,} images of {classes:,} classes, "
            f"{without} without"
        )
        rows = Images(dataset).rows
        start = time.process_time()
        places = Places(dataset, rows)
        print(f"map of {len(rows):,} images by {places.kind}: {time.process_time() - start:.2f} CPU s")
        collected(dataset, arguments.rows, arguments.classes)
        (folder / "blank.html").write_text("<!doctype html><title>blank</title>")
        opened(folder / "report.html", folder / "blank.html", arguments.repeats)


if __name__ == "__main__":
    main()
