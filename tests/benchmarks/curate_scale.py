"""CPU time and peak memory of the stage curate on very many images, from the tables of a build to `curated.parquet`.

    python tests/benchmarks/curate_scale.py [--images 1000000] [--folder DIR] [--flip] [--profile]
    python tests/benchmarks/curate_scale.py --images 3000000 --engine ray --workers 2 [--job-hashes 1000000]

Writes the tables and receipts that the stages fetch and inspect leave, in parts of 500 images, and runs the stage in a
process of its own. The images are synthetic: 3,000 classes of uneven sizes, a tenth of the images near duplicates of
another one, two in a hundred with equal bytes, posts in families, with URLs and authors as a booru has them. `--folder`
keeps the tables (1.1 GB per million images), and uses those that it has.

By default, near hashes are searched in the process of the stage. With `--engine`, they are searched by workers: the
figures of each follow, where the CPU-seconds are those of its jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import hashlib
import multiprocessing
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from metered import Metered, peak

import animesion
from animesion.dedup import near
from animesion.pipeline import curate
from animesion.pipeline.fetch import PART_ITEMS
from animesion.schemas import FEATURES, RAW, THUMBNAIL_SIDE
from animesion.storage import parquet
from animesion.storage.workspace import Workspace, write_atomic

_SEED = 1
_THUMBNAIL = 3 * THUMBNAIL_SIDE**2


def write(folder: Path, n: int) -> None:
    """Write the raw and feature tables of `n` images, the same in every run."""
    rng = np.random.default_rng(_SEED)
    hashes, flipped = rng.integers(0, 2**64, n, dtype=np.uint64), rng.integers(0, 2**64, n, dtype=np.uint64)
    copies, of = rng.choice(n, n // 10, replace=False), rng.integers(0, n, n // 10)
    hashes[copies] = hashes[of] ^ (np.uint64(1) << rng.integers(0, 64, len(of), dtype=np.uint64))
    drawn, digests = np.arange(n), np.arange(n)  # seed of the thumbnail, and of the bytes
    drawn[copies] = of
    equal = copies[: n // 50]
    digests[equal], hashes[equal] = of[: n // 50], hashes[of[: n // 50]]
    classes = np.minimum(2999, rng.zipf(1.3, n) - 1)
    sizes, lengths = rng.integers(200, 2000, (n, 2)), rng.integers(20_000, 2_000_000, n)
    noise = rng.bytes(1 << 24)
    workspace = Workspace(folder)
    # no power failure matters here, and five of them per part take longer than all else
    setattr(os, "fsync", lambda descriptor: None)  # noqa: B010, to a checker of types this is another function
    for part, start in enumerate(range(0, n, PART_ITEMS)):
        rows = np.arange(start, min(start + PART_ITEMS, n))
        count, chosen = len(rows), rows.tolist()
        sha256 = [hashlib.sha256(f"{digest}".encode()).hexdigest() for digest in digests[rows].tolist()]
        ids = [f"{1000 + 7 * i}" for i in chosen]
        keys = [f"danbooru-{number}" for number in ids]
        raw = {
            "key": keys,
            "source": ["danbooru"] * count,
            "source_id": ids,
            "order": rows,
            "labels": [[f"character_{c} (series_{c % 400})"] for c in classes[rows].tolist()],
            "families": [[f"post:{i // 3}"] for i in chosen],
            "class_order": np.full(count, -1),
            "flags": [[]] * count,
            "rating": ["gsqe"[i % 4] for i in chosen],
            "page_url": [f"https://danbooru.donmai.us/posts/{number}" for number in ids],
            "file_url": [f"https://cdn.donmai.us/original/{d[:2]}/{d[2:4]}/{d[:32]}.jpg" for d in sha256],
            "author": [f"artist_{i * 7919 % 50_000}" for i in chosen],
            "md5": [d[:32] for d in sha256],
            "bytes": lengths[rows],
            "sha256": sha256,
            "extension": ["jpg"] * count,
            "offset": np.full(count, 512),
            "boxes": [None] * count,
        }
        at = drawn[rows] * 7919 % (len(noise) - _THUMBNAIL)
        features = {
            "key": keys,
            "format": ["jpg"] * count,
            "mode": ["RGB"] * count,
            "plain": [True] * count,
            "width": sizes[rows, 0],
            "height": sizes[rows, 1],
            "pixels_blake3": sha256,
            "faces": np.full(count, -1),
            "face": np.zeros(count),
            "face_score": np.zeros(count),
            "phash": hashes[rows],
            "phash_flip": flipped[rows],
            "thumbnail": [noise[each : each + _THUMBNAIL] for each in at.tolist()],
            "jpeg_quality": 85 + rows % 15,
            "sharpness": 50.0 + rows % 97,
            "light": np.full(count, 250),
            "dark": np.full(count, 7),
            "contrast": 60.0 + rows % 13,
            "chroma": 20.0 + rows % 11,
            "border": np.zeros(count),
            "panels": np.ones(count),
            "lines": np.zeros(count),
        }
        empty = {name: [""] * count for name in ("split", "licence", "reason", "detail")}
        outputs = {}
        for name, schema, columns in (("raw", RAW, empty | raw), ("features", FEATURES, empty | features)):
            path = f"{name}/part-{part:05d}.parquet"
            outputs[name] = {path: parquet.write(workspace.path(path), _table(columns, schema, count))}
        tar = f"raw/part-{part:05d}.tar"  # no pixel is read
        outputs["raw"][tar] = write_atomic(workspace.path(tar), b"")
        facts = {"items": count, "fetched": count, "bytes": int(lengths[rows].sum())}
        workspace.commit(f"fetch/part-{part:05d}", "benchmark", "", {}, outputs["raw"], facts)
        seen: dict[str, Any] = {"crashed": [], "detections": "", "followed": []}
        workspace.commit(f"inspect/part-{part:05d}", "benchmark", "", {}, outputs["features"], seen)


def _table(columns: Mapping[str, Any], schema: pa.Schema, rows: int) -> pa.Table:
    """A table; a column that is not given is null."""
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        of_numpy = isinstance(values, np.ndarray)
        array = pa.nulls(rows) if values is None else pa.array(values) if of_numpy else pa.array(values, field.type)
        arrays.append(array.cast(field.type))
    return pa.table(arrays, schema=schema)


def stage(folder: Path, images: int, *, flip: bool, profiled: bool, engine: str, workers: int, job_hashes: int) -> None:
    """Run the stage and print what it took."""
    near.JOB_HASHES = job_hashes
    if not engine:
        near.SHARED_FROM = 1 << 32
    settings = ["source.path=x", f"duplicates.flip={str(flip).lower()}", "duplicates.copies=off", "classes.minimum=5"]
    recipe = animesion.load_recipe("folder", settings)
    workspace = Workspace(folder)
    workspace.path(".receipts/curate.json").unlink(missing_ok=True)
    before = peak()
    profile = cProfile.Profile()
    start, used = time.perf_counter(), time.process_time()
    with profile if profiled else contextlib.nullcontext(), Metered(engine, workers) as executor:
        receipt = curate.run(workspace, recipe, executor, -(-images // PART_ITEMS), {})
    wall, used = time.perf_counter() - start, time.process_time() - used
    after, facts = peak(), receipt.facts
    print(
        f"{images:,} images: {wall:.1f} s, {used:.1f} CPU-seconds; peak {after / 1e6:,.0f} MB, of which "
        f"{(after - before) / images:,.0f} bytes per image above {before / 1e6:,.0f} MB"
    )
    executor.show()
    print(f"kept {facts['kept']:,} of {facts['seen']:,}, clusters {facts['clusters']:,}, dropped {facts['dropped']}")
    print(f"curated.parquet {receipt.outputs['curated.parquet']['sha256']}")
    if profiled:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


def _apart(step: Callable[[], None]) -> None:
    """Run a step in a process of its own, as the largest size of a process is that of its parent at least."""
    process = multiprocessing.get_context("spawn").Process(target=step)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(1)


def main() -> None:
    """Write the tables, run the stage, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the tables here, and use those of an earlier run")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--engine", default="", help="local, ray or ray:ADDRESS; without it, no workers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--job-hashes", type=int, default=near.JOB_HASHES, help="hashes in a range of keys")
    parser.add_argument("--profile", action="store_true", help="print the functions that take the most time")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        done = folder / f"images-{arguments.images}"
        if not done.exists():
            _apart(functools.partial(write, folder, arguments.images))
            done.touch()
        settings = {name: getattr(arguments, name) for name in ("flip", "engine", "workers", "job_hashes")}
        _apart(functools.partial(stage, folder, arguments.images, profiled=arguments.profile, **settings))


if __name__ == "__main__":
    main()
