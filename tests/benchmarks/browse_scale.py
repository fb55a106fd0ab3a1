"""Memory and answer times of `animesion browse` on a dataset of very many images.

    python tests/benchmarks/browse_scale.py [--images 1000000] [--classes 3263]

The tables are synthetic and the shards are missing. Classes have a long tail; an eighth of the images are dropped, and
an eighth are in clusters of two. Requests go through HTTP to the server of `animesion browse`. "start" ends with its
first page.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from aiohttp.test_utils import TestClient, TestServer

import animesion
from animesion.report import live
from animesion.schemas import CURATED, INDEX
from animesion.storage import parquet

_REPEATS = 5


def write(folder: Path, n: int, classes: int) -> None:
    """Write the tables, `dataset.json` and `recipe.toml` of a dataset of `n` images."""
    rng = np.random.default_rng(1)
    shares = 1 / np.arange(20, 20 + classes)
    labels = np.sort(rng.choice(classes, n, p=shares / shares.sum()))
    numbers = np.arange(n)
    kept = numbers % 8 > 0
    split = np.where(kept, np.array(["train", "val", "test"])[np.minimum(2, numbers % 10 // 4)], "")
    keys = [f"danbooru-{i:09d}" for i in range(n)]
    digests = [hashlib.sha256(f"{i}".encode()).hexdigest() for i in range(n)]
    columns: dict[str, object] = {
        "key": keys,
        "kept": kept,
        "reason": np.where(kept, "", "near duplicate"),
        "split": split,
        "label": [f"character_{label}" for label in labels.tolist()],
        "class_id": np.where(kept, labels, -1),
        "cluster": [f"danbooru-{i - i % 16:09d}" if i % 16 < 2 else "" for i in range(n)],
        "crop": pa.FixedSizeListArray.from_arrays(pa.array(np.tile([0, 0, 96, 96], n), pa.int32()), 4),
        "width": 300 + numbers % 500,
        "height": 300 + numbers % 700,
        "bytes": 50_000 + numbers,
        "offset": numbers,
        "source_id": [str(i) for i in range(n)],
        "page_url": [f"https://danbooru.donmai.us/posts/{i}" for i in range(n)],
        "sha256": digests,
        "pixels_blake3": digests,
        "extension": ["jpg"] * n,
        "part": numbers // 500,
    }
    blank = {field.name: np.full(n, "" if field.type == pa.string() else 0) for field in CURATED}
    arrays = [
        values
        if isinstance(values := columns.get(field.name, blank[field.name]), pa.Array)
        else pa.array(values).cast(field.type)
        for field in CURATED
    ]
    parquet.write(folder / "curated.parquet", pa.table(arrays, schema=CURATED))
    places = np.flatnonzero(kept)
    index = {
        "key": [keys[i] for i in places.tolist()],
        "split": split[kept],
        "label": labels[kept],
        "shard": [f"data/{name}-00000.tar" for name in split[kept].tolist()],
        **dict.fromkeys(("offset", "size", "sample_offset", "sample_size"), np.zeros(len(places), dtype=np.int64)),
        "sha256": [digests[i] for i in places.tolist()],
    }
    parquet.write(
        folder / "index.parquet", pa.table([pa.array(index[f.name]).cast(f.type) for f in INDEX], schema=INDEX)
    )
    (folder / "recipe.toml").write_text(animesion.load_recipe("folder", ["source.path=x"]).to_toml())
    counts = np.zeros((classes, 3), dtype=np.int64)
    np.add.at(counts, (labels[kept], np.minimum(2, places % 10 // 4)), 1)
    names = ("train", "val", "test")
    shards = {
        name: {"samples": int(counts[:, i].sum()), "bytes": 1024, "shards": [
            {"path": f"data/{name}-00000.tar", "samples": int(counts[:, i].sum()), "bytes": 1024, "sha256": "0" * 64}
        ]}
        for i, name in enumerate(names)
    }  # fmt: skip
    facts = {
        "name": "synthetic",
        "format": 1,
        "recipe": "",
        "images": len(places),
        "classes": classes,
        "image_field": "jpg",
        "fields": ["cls", "jpg", "json"],
        "splits": shards,
        "split_strategy": "grouped",
        "funnel": {"seen": n, "kept": len(places), "dropped": {"near duplicate": n - len(places)}},
        "class_names": [f"character_{c}" for c in range(classes)],
        "class_counts": [dict(zip(names, row, strict=True)) for row in counts.tolist()],
    }
    (folder / "dataset.json").write_text(json.dumps(facts))


def measure(folder: Path, n: int) -> None:
    """Serve the dataset and print memory and times."""
    before = _peak()
    start = time.perf_counter(), time.process_time()
    browser = live.Browser(animesion.open_dataset(folder), folder / "decisions.toml")
    asyncio.run(_ask(browser, n, start))
    peak = _peak()
    print(f"peak {peak / 1e6:,.0f} MB, {(peak - before) / n:,.0f} bytes per image above {before / 1e6:,.0f} MB")


async def _ask(browser: live.Browser, n: int, start: tuple[float, float]) -> None:
    async with TestClient(TestServer(live.application(browser, "token"), host="127.0.0.1")) as client:

        async def get(path: str) -> tuple[float, int]:
            began = time.perf_counter()
            async with client.get(path) as response:
                content = await response.read()
                assert response.status in (200, 404), (path, response.status)
            return time.perf_counter() - began, len(content)

        await get("/")
        wall, used = time.perf_counter() - start[0], time.process_time() - start[1]
        print(f"start: {wall:.1f} s, {used:.1f} CPU-seconds")
        key = f"danbooru-{n // 2:09d}"
        for path in (
            "/", "/api/classes/0", "/api/classes/3000", "/api/clusters", f"/api/clusters?offset={n // 20}",
            "/api/clusters?conflicts=1", f"/api/drops?reason=near+duplicate&offset={n // 10}", "/api/pairs?kind=copy",
            f"/api/image/{key}",
        ):  # fmt: skip
            first, size = await get(path)
            again = [(await get(path))[0] for _ in range(_REPEATS)]
            usual = statistics.median(again)
            print(f"{path:>55}: first {first * 1e3:8.1f} ms, then {usual * 1e3:6.1f} ms, {size:,} bytes")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Write, serve in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=3263)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # processes of their own, as the largest size of a process is that of its parent at least
        for step in (
            functools.partial(write, Path(scratch), arguments.images, arguments.classes),
            functools.partial(measure, Path(scratch), arguments.images),
        ):
            process = multiprocessing.get_context("spawn").Process(target=step)
            process.start()
            process.join()
            if process.exitcode:
                parser.exit(1)


if __name__ == "__main__":
    main()
