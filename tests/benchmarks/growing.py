"""CPU-seconds of the stage `compare` in a build that grows, with and without what the build before found.

    python tests/benchmarks/growing.py FOLDER [--share 0.01]

The folder has one folder of images per class. The build is made without a share of the images, every nth of them, and
again with all. Time of the workers is read from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import animesion
from animesion.pipeline import compare


def cpu_seconds() -> float:
    """Time of this process and of its children."""
    total = sum(os.times()[:4])
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def build(images: Path, out: Path, what: str) -> None:
    """Build as far as curate and print what comparing took."""
    run = compare.run

    def timed(*arguments: Any) -> Any:
        start = cpu_seconds()
        receipt = run(*arguments)
        facts = receipt.facts
        done = f"{facts['searched']:7,} images searched, {facts['compared']:7,} pairs compared"
        print(f"{what:<24} {done}, {cpu_seconds() - start:6.1f} CPU-s", flush=True)
        return receipt

    recipe = animesion.load_recipe("folder", [f'source.path="{images}"', 'source.family=""', "name=growing"])
    with mock.patch.object(compare, "run", timed):
        animesion.build(recipe, out, workers=1, until="curate")


def main() -> None:
    """Build, grow, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.01)
    arguments = parser.parse_args()
    files = sorted(path.relative_to(arguments.folder) for path in arguments.folder.rglob("*") if path.is_file())
    later = files[:: round(1 / arguments.share)]
    with tempfile.TemporaryDirectory() as scratch:
        images, out, other = (Path(scratch) / name for name in ("images", "out", "other"))
        shutil.copytree(arguments.folder, images)
        for path in later:
            (images / path).unlink()
        print(f"{len(files) - len(later):,} images and {len(later):,} more")
        build(images, out, "first")
        for path in later:
            shutil.copy(arguments.folder / path, images / path)
        shutil.copytree(out, other)
        (other / "features" / "compared.parquet").unlink()
        build(images, out, "grown")
        build(images, other, "grown, from nothing")
        names = ("curated.parquet", *(f"features/{name}.parquet" for name in ("pairs", "compared", "searched")))
        equal = all((out / name).read_bytes() == (other / name).read_bytes() for name in names)
        print("the same tables" if equal else "OTHER TABLES")


if __name__ == "__main__":
    main()
