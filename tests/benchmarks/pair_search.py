"""Time, memory and recall of the search for all pairs of near hashes.

    python tests/benchmarks/pair_search.py [--largest 10000000] [--plot curve.png]
    python tests/benchmarks/pair_search.py --joins-only [--largest 1000000] [--largest-votes 300000]

The hashes are uniformly distributed 64-bit numbers; a tenth of them are planted within the radius (four bits at most)
of another one. Each measurement runs in a separate process, which gives its peak memory. `brute` compares every pair in
blocks with numpy. `faiss` is a range search of IndexBinaryFlat, if faiss-cpu is installed. Recall is the share of the
pairs of brute force.

The second table is of `animesion.dedup.joins`, in CPU seconds. `windows` looks up 91 windows of each image among the
hashes of all, within 8 bits; the windows drift from the hash by one bit each. `votes` compares the codes of 200 points
of each image, whose buckets are 12 to 16 times as large as those of evenly distributed codes would be; on 9,353 real
faces they were 11 to 19 times as large. A tenth of the images are copies: cut out of another one, or turned, scaled and
half of them mirrored with two thirds of the points left and two bits of each code flipped. Recall is the share of the
copies that are found with their original.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from animesion.dedup import joins, near, search

T = TypeVar("T")


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


METHODS = {"animesion": near.near_pairs, "brute": brute, "faiss": faiss_pairs}


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


WINDOWS, POINTS, MIRROR = 91, 200, 0xFFFFFFFF00000000


def window_join(n: int) -> tuple[dict[str, float], search.Pairs, search.Pairs]:
    """Measure `joins.window_pairs`; figures, the pairs that it found and those that were planted."""
    rng = np.random.default_rng(1)
    windows = np.empty((n, WINDOWS), dtype=np.uint64)
    windows[:, 0] = rng.integers(0, 2**64, n, dtype=np.uint64)
    for w in range(1, WINDOWS):
        np.bitwise_xor(windows[:, w - 1], np.uint64(1) << rng.integers(0, 64, n, dtype=np.uint64), out=windows[:, w])
    hashes = windows[:, 0].copy()
    copies, originals = np.split(rng.permutation(n)[: n // 10 * 2], 2)
    hashes[copies] = windows[originals, rng.integers(0, WINDOWS, len(copies))]
    for _ in range(4):
        hashes[copies] ^= np.uint64(1) << rng.integers(0, 64, len(copies), dtype=np.uint64)
    figures, (pairs, _) = timed(lambda: joins.window_pairs(hashes, windows))
    return figures, pairs, np.stack([copies, originals], axis=1)


def vote_join(n: int) -> tuple[dict[str, float], search.Pairs, search.Pairs]:
    """Measure `joins.vote_pairs`; figures, the pairs that it found and those that were planted."""
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((24, 64), dtype=np.float32)
    codes = np.empty((n, POINTS), dtype=np.uint64)
    for start in range(0, n, 1000):  # bits that depend on each other, as those of real descriptors do
        part = codes[start : start + 1000]
        bits = rng.standard_normal((part.size, 24), dtype=np.float32) @ directions > 0
        part[:] = np.packbits(bits, axis=1).view(np.uint64).reshape(part.shape)
    size = rng.integers(400, 4000, codes.shape, dtype=np.uint16)
    angle = rng.integers(0, 1 << 16, codes.shape, dtype=np.uint16)
    copies, originals = np.split(rng.permutation(n)[: n // 10 * 2], 2)
    for at, (i, j) in enumerate(zip(copies.tolist(), originals.tolist(), strict=True)):
        some = rng.choice(POINTS, POINTS * 2 // 3, replace=False)
        flips = np.uint64(1) << rng.integers(0, 64, (2, len(some)), dtype=np.uint64)
        codes[i, some] = codes[j, some] ^ flips[0] ^ flips[1] ^ np.uint64(MIRROR if at % 2 else 0)
        angles = angle[j, some].astype(np.int64)
        angle[i, some] = ((32768 - angles if at % 2 else angles) + rng.integers(0, 1 << 16)) % (1 << 16)
        size[i, some] = size[j, some] * rng.uniform(0.6, 1.7)
    image = np.repeat(np.arange(n, dtype=np.int64), POINTS)
    figures, (pairs, _) = timed(
        lambda: joins.vote_pairs(codes.reshape(-1), image, size.reshape(-1), angle.reshape(-1), MIRROR)
    )
    return figures, pairs, np.sort(np.stack([copies, originals], axis=1), axis=1)


JOINS = {"windows": window_join, "votes": vote_join}


def timed(run: Callable[[], T]) -> tuple[dict[str, float], T]:
    """CPU seconds of a call, peak memory before and after it in MB, and its result."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    result = run()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "before": before / 1024, "peak": peak / 1024}, result


def measure_join(method: str, n: int) -> dict[str, float]:
    """Figures of a join, its number of pairs, and the share of the planted pairs among them."""
    figures, pairs, planted_pairs = JOINS[method](n)
    found = np.isin(planted_pairs @ [n, 1], pairs @ [n, 1])
    return {**figures, "pairs": len(pairs), "recall": float(found.mean())}


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
    parser.add_argument("--largest-votes", type=int, default=300_000, help="largest number of images of `votes`")
    parser.add_argument("--joins-only", action="store_true", help="only the second table")
    parser.add_argument("--plot", type=Path, help="plot seconds and memory over the number of hashes into a PNG")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        method, n, radius = arguments.one
        print(json.dumps(measure_join(method, int(n)) if method in JOINS else measure(method, int(n), int(radius))))
        return
    if not arguments.joins_only:
        searches(arguments)
    joined(arguments.largest, arguments.largest_votes)


def run_one(*words: object) -> dict[str, float] | str:
    """Figures of a measurement in a process of its own, or why there are none."""
    done = subprocess.run([sys.executable, __file__, "--one", *map(str, words)], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["?"])[-1][:80] if done.returncode else dict(json.loads(done.stdout))


def joined(largest: int, largest_votes: int) -> None:
    """Measure the joins and print a table."""
    sizes = [n for n in (10**4, 10**5, 3 * 10**5, 10**6) if n <= largest]
    rows = [("windows", n) for n in sizes] + [("votes", n) for n in sizes if n <= largest_votes]
    print(f"{'join':<10} {'images':>11} {'CPU s':>8} {'peak MB':>8} {'of join':>9} {'pairs':>10} {'recall':>7}")
    for method, n in rows:
        got = run_one(method, n, 8)
        if isinstance(got, str):
            print(f"{method:<10} {n:>11,} left out: {got}")
            continue
        print(
            f"{method:<10} {n:>11,} {got['seconds']:8.2f} {got['peak']:8.0f} {got['peak'] - got['before']:9.0f} "
            f"{got['pairs']:>10,} {got['recall']:7.4f}",
            flush=True,
        )


def searches(arguments: argparse.Namespace) -> None:
    """Measure the searches for near hashes, print a table, and plot it."""
    rows = [("animesion", n, 4) for n in (10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7) if n <= arguments.largest]
    rows += [("animesion", n, r) for n, r in ((100_000, 8), (100_000, 10), (1_000_000, 8)) if n <= arguments.largest]
    rows += [(method, 100_000, radius) for radius in (4, 10) for method in ("brute", "faiss")]
    print(f"{'method':<10} {'hashes':>11} {'radius':>6} {'seconds':>8} {'peak MB':>8} {'of search':>9} {'pairs':>10}")
    seen = {}
    for method, n, radius in rows:
        got = run_one(method, n, radius)
        if isinstance(got, str):
            print(f"{method:<10} {n:>11,} {radius:>6} left out: {got}")
            continue
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
