"""Loading from an object store: speed beside decoding alone, and the bytes that each of several ranks downloads.

    python tests/benchmarks/remote_loading.py [--data TAR] [--latency 0.02] [--copies 8] [--repeats 3] [--ranks]

A server on loopback, in a process of its own, answers each request for a range after the latency, as an object store
does. The dataset is built from a tar of class folders, and its shards are repeated `--copies` times under other names
and digests. Each epoch has an empty cache of its own, so it downloads everything while it decodes. All are deleted at
the end: for a minute after files were deleted, ext4 takes a millisecond to create one. The floor is that of
`loader_throughput.py`: as many threads that decode files in memory. Rows alternate; CPU time is that of the loading
process, without the server. `--ranks` prints the largest download of one of N ranks instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import loader_throughput  # type: ignore[import-not-found]  # beside this script
import pyarrow as pa
import pyarrow.parquet as pq

from animesion_training.data import Augment, Stream, open_data
from animesion_training.data.remote import RemoteFiles

SIZE, BATCH = 128, 256


class Handler(BaseHTTPRequestHandler):
    """Serves the files of a folder, whole or in ranges, after a delay."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *arguments: Any, root: Path, latency: float) -> None:
        self.root, self.latency = root, latency
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer with the range."""
        time.sleep(self.latency)
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        start, end = 0, size
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(size, int(last or size - 1) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file:
            while start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


def serve(root: Path, latency: float, end: Connection) -> None:
    """Serve a folder, and tell the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, root=root, latency=latency))
    end.send(server.server_address[1])
    server.serve_forever()


def repeat_shards(folder: Path, copies: int) -> None:
    """Repeat the training shards of a dataset; zeros behind the end of a tar give each copy a digest of its own."""
    facts = json.loads((folder / "dataset.json").read_text())
    table = pq.read_table(folder / "index.parquet")
    train = facts["splits"]["train"]
    rows = table.filter(pa.compute.equal(table["split"], "train"))
    tables = [table]
    for shard in list(train["shards"]):
        content = (folder / shard["path"]).read_bytes()
        of_shard = rows.filter(pa.compute.equal(rows["shard"], shard["path"]))
        for copy in range(1, copies):
            name = shard["path"].replace("train-", f"train-copy{copy}-")
            longer = content + bytes(512 * copy)
            (folder / name).write_bytes(longer)
            digest = hashlib.sha256(longer).hexdigest()
            train["shards"].append({**shard, "path": name, "bytes": len(longer), "sha256": digest})
            columns = {column: of_shard[column] for column in of_shard.column_names}
            columns["shard"] = pa.array([name] * len(of_shard), pa.string())
            columns["key"] = pa.array([f"{key}-{copy}" for key in of_shard["key"].to_pylist()], pa.string())
            tables.append(pa.table(columns, schema=table.schema))
    train["samples"] = sum(shard["samples"] for shard in train["shards"])
    train["bytes"] = sum(shard["bytes"] for shard in train["shards"])
    (folder / "dataset.json").write_text(json.dumps(facts))
    pq.write_table(pa.concat_tables(tables), folder / "index.parquet")


def epoch(url: str, cache: Path, workers: int) -> tuple[float, float]:
    """Images/s and CPU-ms per image of an epoch; the cache is empty."""
    data, augment = open_data(url, cache=cache), Augment()
    stream = Stream(data, "train", BATCH, SIZE, workers=workers)
    count, cpu, wall = 0, time.process_time(), time.perf_counter()
    for batch in stream:
        count += len(augment(batch.images, batch.seeds))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    files = stream.samples.source
    assert isinstance(files, RemoteFiles)
    assert files.fetched_bytes >= sum(stream.samples.sizes)
    stream.close()
    return count / wall, 1000 * cpu / count


def floor(home: Path, images: int, workers: int) -> tuple[float, float]:
    """Images/s and CPU-ms per image of threads that only decode."""
    run = loader_throughput.floor(home, SIZE, workers)
    for _ in run():
        pass
    count, cpu, wall = 0, time.process_time(), time.perf_counter()
    while count < images:
        count += sum(len(batch) for batch in run())
    return count / (time.perf_counter() - wall), 1000 * (time.process_time() - cpu) / count


def downloads(folder: Path, home: Path) -> None:
    """Print the largest download of a rank, in shares of that of one process divided by the number of ranks."""

    def largest(ranks: int, pairs: bool) -> int:
        parts = []
        for rank in range(ranks):
            data = open_data(f"file://{folder}", cache=home / "tables")
            stream = Stream(data, "train", BATCH, SIZE, rank=rank, world_size=ranks, pairs=pairs, workers=2)
            files = stream.samples.source
            assert isinstance(files, RemoteFiles)
            files.folder = home / f"rank-{rank}"
            files.folder.mkdir()
            for _ in stream:
                pass
            parts.append(files.fetched_bytes)
            shutil.rmtree(files.folder)
        return max(parts)

    whole = largest(1, False)
    print(f"one process downloads {whole:,} bytes; the one of N that downloads most, in N-ths of that:")
    print("ranks   plain   with mirror images")
    for ranks in (2, 3, 4, 8):
        plain, paired = (largest(ranks, pairs) * ranks / whole for pairs in (False, True))
        print(f"{ranks:5}   {plain:.3f}   {paired:.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=loader_throughput.FACES, help="tar of class folders of JPEGs")
    parser.add_argument("--built", type=Path, help="a dataset that is built already, instead of --data")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", action="store_true", help="print what ranks download, of one copy")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        if arguments.built:
            shutil.copytree(arguments.built, home / "built")
        else:
            loader_throughput.prepare(home, arguments.data)
        if arguments.ranks:
            downloads(home / "built", home)
            return
        repeat_shards(home / "built", arguments.copies)
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(home / "built", arguments.latency, theirs), daemon=True
        )
        server.start()
        url = f"http://127.0.0.1:{ours.recv()}"
        images = len(open_data(home / "built").select("train"))
        rows = []
        for turn in range(arguments.repeats):
            rows.append((epoch(url, home / f"cache-{turn}", arguments.workers), floor(home, images, arguments.workers)))
            (speed, cpu), (least, least_cpu) = rows[-1]
            print(
                f"from the store {speed:,.0f} images/s, {cpu:.3f} CPU-ms; floor {least:,.0f}, {least_cpu:.3f}",
                flush=True,
            )
        server.kill()
        speed = statistics.median(a[0] / b[0] for a, b in rows)
        cpu = statistics.median(b[1] / a[1] for a, b in rows)
        print(f"{images:,} images, latency {1000 * arguments.latency:.0f} ms, {arguments.workers} threads")
        print(f"medians of the paired ratios: speed {speed:.3f}, CPU time {cpu:.3f}")


if __name__ == "__main__":
    main()
