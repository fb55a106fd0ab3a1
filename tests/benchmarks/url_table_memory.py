"""Peak memory and time of a dry run over a large table of URLs.

    python tests/benchmarks/url_table_memory.py [--rows 5000000] [--hosts 50000] [--rows-per-group 1000000]

Writes a Parquet table to a temporary folder, with 1 % of its rows repeated and a skewed distribution of hosts, runs
`animesion build urls --dry-run` over it in a child process and prints that process's peak RSS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BUILD = "from animesion.cli import main; main()"
PIECE = 100_000


def write(path: Path, rows: int, hosts: int, rows_per_group: int, seed: int = 0) -> int:
    """Write the table.

    Returns:
        Number of distinct URLs.
    """
    rng = np.random.default_rng(seed)
    different = 0
    schema = pa.schema([("url", pa.string()), ("label", pa.string()), ("file_size", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        held: list[pa.Table] = []
        for start in range(0, rows, PIECE):
            count = min(PIECE, rows - start)
            numbers = np.arange(start, start + count)
            again = rng.random(count) < 0.01
            again[0] = False
            numbers[again] = numbers[np.flatnonzero(again) - 1]
            different += len(np.unique(numbers))  # no number occurs in two pieces
            # a few hosts have most of the files, most hosts have a few; each file belongs to one host
            host = (hosts * ((numbers * 0.618033988749895) % 1.0) ** 3).astype(np.int64)
            urls = [
                f"https://h{h}.example/photos/{n:08d}.jpg" for h, n in zip(host.tolist(), numbers.tolist(), strict=True)
            ]
            labels = [f"class {n % 1000}" for n in numbers.tolist()]
            sizes = (20_000 + numbers * 7919 % 200_000).tolist()
            held.append(pa.table([urls, labels, sizes], schema=schema))
            if sum(map(len, held)) >= rows_per_group:
                writer.write_table(pa.concat_tables(held), row_group_size=rows_per_group)
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held), row_group_size=rows_per_group)
    return different


def dry_run(table: Path) -> tuple[dict[str, object], float, float, float]:
    """Result of a dry run over a table, its peak RSS in MB, its wall time and its CPU time in seconds."""
    source = [f"source.path={table}", "source.contact=benchmark@example.org"]
    command = [sys.executable, "-c", BUILD, "build", "urls", "--dry-run", "--json", "--out", str(table.parent / "out")]
    command += [part for each in source for part in ("--set", each)]
    script = (
        "import json, resource, subprocess, sys, time; began = time.perf_counter();"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([used.ru_maxrss, time.perf_counter() - began, used.ru_utime + used.ru_stime]));"
        "sys.stdout.write(done.stdout.decode())"
    )
    # started from a small process, because the peak of a child includes that of its parent before exec
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *command], stdout=subprocess.PIPE, check=True, env=environment)
    first, _, rest = done.stdout.decode().partition("\n")
    kilobytes, seconds, processor = json.loads(first)
    return json.loads(rest), kilobytes / 1024, seconds, processor


def main() -> None:
    """Measure once and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--hosts", type=int, default=50_000)
    parser.add_argument("--rows-per-group", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "urls.parquet")
        urls = write(table, arguments.rows, arguments.hosts, arguments.rows_per_group)
        print(f"table: {arguments.rows:,} rows, {urls:,} distinct URLs, {table.stat().st_size / 1e6:,.0f} MB")
        facts, peak, seconds, processor = dry_run(table)
        if facts["listed"] != urls:
            raise SystemExit(f"listed {facts['listed']} of {urls}")
        print(f"dry run: {facts['listed']:,} listed on {facts['hosts']:,} hosts, {facts['requests']:,} requests")
        print(f"peak RSS {peak:,.0f} MB, {seconds:,.1f} s, {processor:,.1f} s of CPU time")


if __name__ == "__main__":
    main()
