"""Memory and CPU-seconds of what pack and finalize do in the main process, by number of rows.

    python tests/benchmarks/pack_scale.py [--rows 1000000] [--encoded]

Writes a `curated.parquet` of kept rows as a booru has them, plans every encode and every shard as pack does, and counts
as finalize does for the card. No image is read: that is the work of the workers, a few
hundred rows at a time.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import animesion
from animesion.cards.facts import counted
from animesion.pipeline import encoded, finalize, pack
from animesion.schemas import CURATED, INDEX
from animesion.storage import parquet
from animesion.storage.workspace import Workspace


def curated(rows: int) -> pa.Table:
    """Kept rows of schema `CURATED`."""
    rng = np.random.default_rng(0)
    number = np.arange(rows)
    text = pa.array(number).cast(pa.string())
    label = np.minimum(rng.zipf(1.6, rows), 3263) - 1
    join = pc.binary_join_element_wise
    # digests do not compress
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)[rng.integers(0, 16, (rows, 64), dtype=np.uint8)]
    sha256 = pa.array(digits.view("S64").ravel().astype("U64"), pa.string())
    side = pa.array(rng.integers(64, 512, rows), pa.int32())
    zero = pa.array(np.zeros(rows), pa.int32())
    crop = np.stack([zero, zero, side, side], axis=1).astype(np.int32)
    columns: dict[str, Any] = {
        "key": join("danbooru", text, "-"),
        "kept": pa.array(np.ones(rows, dtype=bool)),
        "label": join("character", pa.array(label).cast(pa.string()), "_"),
        "class_id": pa.array(label),
        "split": pa.array(np.array(["train", "val", "test"])[(rng.random(rows) * 10 > 8).astype(int)]),
        "group": join("danbooru", text, "-"),
        "crop": pa.FixedSizeListArray.from_arrays(pa.array(crop.ravel()), 4),
        "width": side,
        "height": side,
        "plain": pa.array(np.ones(rows, dtype=bool)),
        "source": pa.repeat("danbooru", rows),
        "source_id": text,
        "page_url": join("https://danbooru.donmai.us/posts/", text, ""),
        "file_url": join("https://cdn.donmai.us/original/", pc.utf8_slice_codeunits(sha256, 0, 32), ""),
        "md5": pc.utf8_slice_codeunits(sha256, 0, 32),
        "rating": pa.repeat("g", rows),
        "sha256": sha256,
        "pixels_blake3": sha256,
        "part": pa.array(number // 500, pa.int32()),
        "offset": pa.array(number % 500 * 4096),
        "bytes": pa.array(rng.integers(1500, 3000, rows)),
        "extension": pa.repeat("jpg", rows),
    }
    for field in CURATED:
        if field.name not in columns:
            columns[field.name] = pa.repeat("" if field.type == pa.string() else 0, rows)
    return pa.table([columns[field.name].cast(field.type) for field in CURATED], schema=CURATED)


def main() -> None:
    """Write, plan, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--encoded", action="store_true", help="as if every image had to be encoded")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = arguments.rows
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch))
        if arguments.write:
            parquet.write(arguments.write, curated(rows))
            return
        path = workspace.path("curated.parquet")
        subprocess.run([sys.executable, __file__, "--rows", str(rows), "--write", str(path)], check=True)
        recipe = animesion.load_recipe("folder", ["source.path=/nowhere"])
        start = time.process_time()

        def show(what: str) -> None:
            nonlocal start
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"{what:<32} {time.process_time() - start:6.1f} CPU-s, at most {memory:.2f} GB so far", flush=True)
            start = time.process_time()

        show("start")
        kept = pack._kept(workspace)
        show("kept rows")
        if arguments.encoded:
            kept = kept.set_column(kept.column_names.index("extension"), "extension", pa.repeat("png", rows))
        images = encoded.Images(workspace, recipe, kept)
        jobs = images.jobs()
        digests = [job.inputs for job in jobs]
        show(f"{len(digests):,} jobs that encode")
        images.file[images.file < 0] = 0
        shard_jobs, index = pack._assign_to_shards(workspace, recipe, kept, images, None)
        show(f"{len(shard_jobs):,} jobs that write shards")
        size = sum(len(job.rows) for job in shard_jobs)
        assert size == rows == len(index)
        parquet.write(workspace.path("index.parquet"), index)
        del kept, images, jobs, shard_jobs, index
        show("index.parquet")
        index = parquet.read(workspace.path("index.parquet"), INDEX)
        table = parquet.read(path, CURATED, finalize._DESCRIBED)
        counted(table)
        finalize._grid(index, table)
        del table
        show("counts and grid of the card")


if __name__ == "__main__":
    main()
