"""Time, memory and recall of the search for all pairs of near hashes.

    python tests/benchmarks/pair_search.py [--largest 10000000] [--plot curve.png]

The hashes are uniformly distributed 64-bit numbers; a tenth of them are planted within the radius (four bits at most)
of another one. Each measurement runs in a separate process, which gives its peak memory. `brute` compares every pair in
blocks with numpy. `faiss` is a range search of IndexBinaryFlat, if faiss-cpu is installed. Recall is the share of the
pairs of brute force.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from animesion.dedup import search


def planted(n: int, radius: int) -> search.HashArray:
    """Hashes with near duplicates among them, the same in every run; shape (n,)."""
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    copies = hashes[rng.integers(0, n, n // 10)]
    for _ in range(min(radius, 4)):
        copies ^= np.uint64(1) << rng.integers(0, 64, len(copies), dtype=np.uint64)
    hashes[rng.choice(n, len(copies), replace=False)] = copies
    return hashes


def brute(hashes: search.HashArray, radius: int) -> search.Pairs:
    """Pairs by exhaustive comparison in numpy."""
    found = []
    for start in range(0, len(hashes), 256):
        near = np.bitwise_count(hashes[start : start + 256, None] ^ hashes[None, start:]) <= radius
        i, j = np.nonzero(near)
        found.append(np.stack([i[i < j], j[i < j]], axis=1) + start)
    return np.concatenate(found)


def faiss_pairs(hashes: search.HashArray, radius: int) -> search.Pairs:
    """Pairs by exhaustive comparison in faiss."""
    import faiss

    faiss.omp_set_num_threads(1)
    codes = hashes.view(np.uint8).reshape(-1, 8)
    index = faiss.IndexBinaryFlat(64)
    index.add(codes)
    found = []
    for start in range(0, len(hashes), 4096):
        limits, _, others = index.range_search(codes[start : start + 4096], radius + 1)
        counts = limits[1:].astype(np.int64) - limits[:-1].astype(np.int64)
        i = start + np.repeat(np.arange(len(limits) - 1), counts)
        found.append(np.stack([i, others], axis=1)[i < others])
    return np.concatenate(found)


METHODS = {"animesion": search.near_pairs, "brute": brute, "faiss": faiss_pairs}


def measure(method: str, n: int, radius: int) -> dict[str, float]:
    """Seconds of a search, its number of pairs, and the peak memory of this process before and after it in MB."""
    hashes = planted(n, radius)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    pairs = METHODS[method](hashes, radius)
    seconds = time.perf_counter() - start
    digest = int(np.bitwise_xor.reduce((pairs.min(1) * n + pairs.max(1)).astype(np.int64), initial=0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "before": before / 1024, "peak": peak / 1024, "pairs": len(pairs), "digest": digest}


def plot(seen: dict[tuple[str, int, int], dict[str, float]], path: Path) -> None:
    """Plot seconds and memory of our search at radius 4 over the number of hashes, and the exhaustive searches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    found = sorted((n, got) for (method, n, radius), got in seen.items() if (method, radius) == ("animesion", 4))
    sizes = [n for n, _ in found]
    # times below the resolution of the clock are drawn at a lower limit
    time_axes.loglog(sizes, [max(got["seconds"], 1e-4) for _, got in found], "o-", label="animesion")
    memory_axes.loglog(sizes, [got["peak"] for _, got in found], "o-", label="whole process")
    memory_axes.loglog(sizes, [max(got["peak"] - got["before"], 1.0) for _, got in found], "o--", label="the search")
    for method, mark in (("faiss", "s"), ("brute", "^")):
        one = seen.get((method, 100_000, 4))
        if one:
            time_axes.loglog([100_000], [one["seconds"]], mark, label=f"{method}, all with all")
    for axes, unit in ((time_axes, "seconds"), (memory_axes, "peak memory in MB")):
        axes.set(xlabel="hashes, radius 4", ylabel=unit)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=10_000_000)
    parser.add_argument("--plot", type=Path, help="plot seconds and memory over the number of hashes into a PNG")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), int(arguments.one[2]))))
        return
    rows = [("animesion", n, 4) for n in (10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7) if n <= arguments.largest]
    rows += [("animesion", n, r) for n, r in ((100_000, 8), (100_000, 10), (1_000_000, 8)) if n <= arguments.largest]
    rows += [(method, 100_000, radius) for radius in (4, 10) for method in ("brute", "faiss")]
    print(f"{'method':<10} {'hashes':>11} {'radius':>6} {'seconds':>8} {'peak MB':>8} {'of search':>9} {'pairs':>10}")
    seen = {}
    for method, n, radius in rows:
        command = [sys.executable, __file__, "--one", method, str(n), str(radius)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{method:<10} {n:>11,} {radius:>6} left out: {(done.stderr.strip().splitlines() or ['?'])[-1][:80]}")
            continue
        got = json.loads(done.stdout)
        seen[method, n, radius] = got
        print(
            f"{method:<10} {n:>11,} {radius:>6} {got['seconds']:8.2f} {got['peak']:8.0f} "
            f"{got['peak'] - got['before']:9.0f} {got['pairs']:>10,}",
            flush=True,
        )
    for radius in (4, 10):
        ours, all_pairs = (seen.get((method, 100_000, radius)) for method in ("animesion", "brute"))
        if ours and all_pairs:
            recall = ours["pairs"] / all_pairs["pairs"]
            same = "the same pairs" if ours["digest"] == all_pairs["digest"] else "OTHER PAIRS"
            ratio = all_pairs["seconds"] / ours["seconds"]
            print(f"radius {radius}: recall {recall:.4f}, {same}; brute force takes {ratio:,.0f}x")
    if arguments.plot:
        plot(seen, arguments.plot)


if __name__ == "__main__":
    main()
