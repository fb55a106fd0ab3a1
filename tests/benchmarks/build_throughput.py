"""Throughput of `build folder`, compared with two lower bounds: decoding every image once, and writing every byte once.

    python tests/benchmarks/build_throughput.py [--data TAR] [--workers 2] [--repeats 3]

Prints medians over alternating runs and their ratios. Without the real faces it generates as many images of that size.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from animesion.dataset import shards

FACES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "holo-faces" / "faces-train-128.tar"
BUILD = "from animesion.cli import main; main()"


def drawn(path: Path, count: int = 9353) -> Path:
    """A tar of smooth random 128 px JPEGs in 20 class folders, as a substitute for the real faces."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            out = io.BytesIO()
            coarse.resize((128, 128), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
            info = tarfile.TarInfo(f"class-{i % 20:02d}/{i:05d}.jpg")
            info.size = out.tell()
            archive.addfile(info, io.BytesIO(out.getvalue()))
    return path


def decode(contents: list[bytes]) -> int:
    """Decode to RGB and nothing else."""
    for content in contents:
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB")
    return len(contents)


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FACES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(arguments.workers) as pool:
        folder = Path(name)
        data = arguments.data if arguments.data.exists() else drawn(folder / "drawn.tar")
        with tarfile.open(data) as archive:
            contents = [archive.extractfile(member).read() for member in archive if member.isreg()]
        count, size = len(contents), sum(map(len, contents))
        batches = [contents[i :: arguments.workers] for i in range(arguments.workers)]
        list(pool.map(decode, [contents[:10]] * arguments.workers))

        def write() -> None:
            with (folder / "floor.tar").open("wb") as out:
                for i, content in enumerate(contents):
                    out.write(shards.member(f"{i}.jpg", content))
                out.write(shards.END)
                out.flush()
                os.fsync(out.fileno())

        def build() -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            command = [sys.executable, "-c", BUILD, "build", "folder", "--set", f"source.path={data}"]
            command += ["--workers", str(arguments.workers), "--out", str(folder / "out")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        runs: dict[str, list[float]] = {"decode only": [], "tar write only": [], "build folder": []}
        for _ in range(arguments.repeats):  # alternate, so that a machine that slows down affects all equally
            runs["decode only"].append(timed(lambda: sum(pool.map(decode, batches))))
            runs["tar write only"].append(timed(write))
            runs["build folder"].append(timed(build))
    medians = {what: statistics.median(times) for what, times in runs.items()}
    print(f"{data.name}: {count:,} images, {size / 1e6:.1f} MB, {arguments.workers} workers, {arguments.repeats} runs")
    print(f"{'':<15} {'seconds':>8} {'images/s':>11} {'build / this':>13}")
    for what, seconds in medians.items():
        print(f"{what:<15} {seconds:>8.2f} {count / seconds:>11,.0f} {medians['build folder'] / seconds:>12.1f}x")


if __name__ == "__main__":
    main()
