"""Training on a CPU with memory that is kept between steps, compared with the allocator's default.

    python tests/benchmarks/kept_heap.py [--model tf_efficientnet_lite0] [--selector cal] [--size 128] [--batch 32]
        [--steps 6] [--repeats 3]

Each measurement is a process of its own with one thread: CPU milliseconds and page faults of a step, and the peak of
resident memory. The two take turns; the table has medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time


def measure(given: argparse.Namespace) -> None:
    """Print the figures of one process as JSON."""
    import torch

    from animesion_training.memory import kept_heap
    from animesion_training.models import create_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = create_model(given.model, 20, given.size, selector=given.selector or None).train()
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    images = torch.randn(given.batch, 3, given.size, given.size).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with kept_heap() if given.one == "kept" else contextlib.nullcontext():
        for _ in range(3):
            step()
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
        for _ in range(given.steps):
            step()
        after, end = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    figures = {
        "CPU ms": 1000 * (end - start) / given.steps,
        "faults": (after.ru_minflt - before.ru_minflt) / given.steps,
        "MB": after.ru_maxrss / 1024,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--selector", default="cal")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=("default", "kept"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(given)
        return
    found: dict[str, list[dict[str, float]]] = {"default": [], "kept": []}
    for _ in range(given.repeats):
        for kind, figures in found.items():
            line = subprocess.run(
                [sys.executable, *sys.argv, "--one", kind], check=True, capture_output=True, text=True
            ).stdout
            figures.append(json.loads(line.splitlines()[-1]))
    medians = {
        kind: {name: statistics.median(each[name] for each in figures) for name in figures[0]}
        for kind, figures in found.items()
    }
    for kind, values in medians.items():
        print(f"{kind:8}", ", ".join(f"{value:,.0f} {name}" for name, value in values.items()))
    ratios = {name: medians["kept"][name] / max(1.0, value) for name, value in medians["default"].items()}
    print("ratio   ", ", ".join(f"{value:.2f} {name}" for name, value in ratios.items()))


if __name__ == "__main__":
    main()
