"""Time and peak memory of `curate.decide` on very many images.

    python tests/benchmarks/curate_scale.py [--images 1000000] [--flip]

The rows are synthetic: 3,000 classes of uneven sizes, a tenth of the images near duplicates of another one, two in a
hundred with equal bytes, posts in families. They have the form that the stage loads, with the columns that decisions do
not need in Arrow. `rows` is their memory, `peak` the peak of the whole process.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import time
from typing import Any

import numpy as np
import pyarrow as pa

import animesion
from animesion.pipeline.curate import decide
from animesion.schemas import RAW


def rows(n: int) -> dict[str, Any]:
    """Columns of `n` images, the same in every run."""
    rng = np.random.default_rng(1)
    hashes, flipped = rng.integers(0, 2**64, n, dtype=np.uint64), rng.integers(0, 2**64, n, dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (n, 768), dtype=np.uint8)
    copies, of = rng.choice(n, n // 10, replace=False), rng.integers(0, n, n // 10)
    hashes[copies] = hashes[of] ^ (np.uint64(1) << rng.integers(0, 64, len(of), dtype=np.uint64))
    thumbnails[copies] = thumbnails[of]
    digests = np.arange(n)
    equal = copies[: n // 50]
    digests[equal], hashes[equal] = of[: n // 50], hashes[of[: n // 50]]
    classes = np.minimum(2999, rng.zipf(1.3, n) - 1)
    offsets = pa.py_buffer((np.arange(n + 1) * 768).astype(np.int64))
    images = pa.Array.from_buffers(pa.large_binary(), n, [None, offsets, pa.py_buffer(thumbnails)])
    text = pa.chunked_array([pa.array([""] * n)])
    columns: dict[str, Any] = {
        "key": [f"danbooru-{i:09d}" for i in range(n)],
        "labels": [[f"character_{c}"] for c in classes.tolist()],
        "families": [[f"post:{i // 3}"] for i in range(n)],
        "source": ["danbooru"] * n,
        "source_id": [str(i) for i in range(n)],
        "order": list(range(n)),
        "class_order": [-1] * n,
        "sha256": [f"{d:064x}" for d in digests.tolist()],
        "pixels_blake3": [f"{d:064x}" for d in digests.tolist()],
        "extension": ["jpg"] * n,
        "width": rng.integers(200, 2000, n).tolist(),
        "height": rng.integers(200, 2000, n).tolist(),
        "bytes": rng.integers(20_000, 2_000_000, n).tolist(),
        "crop": [None] * n,
        "faces": [-1] * n,
        "face": [0] * n,
        "face_score": [0.0] * n,
        "phash": hashes,
        "phash_flip": flipped,
        "thumbnail": pa.chunked_array([images]),
        "plain": pa.chunked_array([pa.array([True] * n)]),
        "part": pa.chunked_array([pa.array([0] * n, pa.int32())]),
        "offset": pa.chunked_array([pa.array([0] * n, pa.int64())]),
    }
    for name in ("reason", "detail", "seen_reason", "seen_detail", "split"):
        columns[name] = [""] * n
    return columns | {name: text for name in RAW.names if name not in columns}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the functions that take the most time")
    arguments = parser.parse_args()
    settings = ["source.path=x", f"duplicates.flip={str(arguments.flip).lower()}", "classes.minimum=5"]
    recipe = animesion.load_recipe("folder", settings)
    columns = rows(arguments.images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    profile = cProfile.Profile()
    start = time.perf_counter()
    if arguments.profile:
        profile.enable()
    table, facts = decide(columns, recipe, {})
    profile.disable()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.images:,} images: {seconds:.1f} s; rows {before:,.0f} MB, peak {peak:,.0f} MB")
    print(f"kept {facts['kept']:,} of {len(table):,}, clusters {facts['clusters']:,}, dropped {facts['dropped']}")
    if arguments.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
