"""One of the jobs that search very many hashes: its CPU-seconds, memory and pairs, beside the model's.

    python tests/benchmarks/near_job.py [--hashes 100000000] [--radius 8] [--jobs 3]

The hashes are evenly distributed 64-bit numbers in a file, which takes 8 bytes each; no copies are planted. The chosen
jobs are spread over the list of all jobs, each in a process of its own. Memory is that of the process without the pages
of the file, which the workers of a machine share.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from animesion.dedup import near
from animesion.executors.shared import StoredArray

_BLOCK = 1 << 22


def anonymous() -> float:
    """Memory of this process without mapped files, in MB; Linux only."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("RssAnon:")[2].split()[0]) / 1024


def one() -> None:
    """Run the job that is on standard input, and print its figures."""
    job: near.NearJob = pickle.load(sys.stdin.buffer)
    largest, inner = 0.0, near._in_buckets

    def watched(*given: object) -> list[near.HashArray]:
        nonlocal largest
        found = inner(*given)  # type: ignore[arg-type]
        largest = max(largest, anonymous())
        return found

    near._in_buckets = watched  # type: ignore[assignment]
    start = time.process_time()
    pairs = len(job.run())
    print(json.dumps([time.process_time() - start, largest, pairs]))


def main() -> None:
    """Write the hashes, run some jobs, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hashes", type=int, default=100_000_000)
    parser.add_argument("--radius", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=3, help="number of jobs to run")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one()
        return
    n, radius = given.hashes, given.radius
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hashes"
        rng = np.random.default_rng(1)
        with path.open("wb") as file:
            for start in range(0, n, _BLOCK):
                file.write(rng.integers(0, 2**64, min(_BLOCK, n - start), dtype=np.uint64).data)
        agreeing, _ = near._plan(n, radius)
        every = np.memmap(path, np.uint64, "r")
        jobs = near.near_jobs(StoredArray(path, "<u8", (n,)), every, radius, agreeing, near.JOB_HASHES)
        bands = radius + agreeing
        print(f"{n:,} hashes, radius {radius}: {bands} bands, {agreeing} of them a key; {len(jobs):,} jobs")
        ranges = len(jobs) // len({job.first for job in jobs})
        bits = agreeing * 64 // bands
        step = max(1, len(jobs) // given.jobs)
        for job in jobs[step // 2 :: step][: given.jobs]:
            orders = math.comb(bands - 1 - job.first[-1], agreeing - len(job.first))
            model = orders * (n * 3e-8 + n * n / 2 ** (bits + 1) * 8e-9) / ranges
            done = subprocess.run(
                [sys.executable, __file__, "--one"], input=pickle.dumps(job), stdout=subprocess.PIPE, check=True
            )
            seconds, memory, pairs = json.loads(done.stdout)
            print(
                f"bands {job.first}, keys {job.keys}, {orders} orders: {seconds:.1f} CPU-s (model {model:.1f}), "
                f"{memory:,.0f} MB, {pairs:,} pairs",
                flush=True,
            )


if __name__ == "__main__":
    main()
