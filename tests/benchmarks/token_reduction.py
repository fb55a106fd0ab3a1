"""Savings of token reductions in multiply-adds, and the part of them that shows in images per second.

    python tests/benchmarks/token_reduction.py [--model vit_small_patch16] [--size 448] [--keep-rate 0.25] [--cache]

All rows run alternately in one process, so a machine that slows down affects all equally; medians are printed. `fewer`
is the multiply-adds of the plain model divided by those of the row, `faster` the same for times, and `realised` the
second divided by the first. Weights are untrained. The number of tokens that ATS keeps depends on images and weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from animesion_training import create_model
from animesion_training.analysis.profile import count
from animesion_training.tokens import TokenVisionTransformer
from animesion_training.tokens.cache import CrossLayerCache
from animesion_training.tokens.reductions import REDUCTIONS, make_reduction

CLASSES = 200


def build(model: str, size: int, name: str, keep_rate: float, cache: bool) -> Any:
    """A model with the reduction `name`, or the plain model if it is empty."""
    torch.manual_seed(0)
    host: Any = create_model(model, CLASSES, size)
    plugins: dict[str, Any] = {}
    if name:
        shape = {"depth": len(host.blocks), "width": host.embed_dim, "tokens": host.patch_embed.num_patches}
        plugins["reduction"] = make_reduction(name, keep_rate=keep_rate, **shape)
        if cache:
            plugins["cache"] = CrossLayerCache(host.embed_dim, depth=len(host.blocks))
    return TokenVisionTransformer(host, plugins, CLASSES).eval()


def timed(model: Any, images: torch.Tensor) -> float:
    """Seconds of one batch."""

    def wait() -> None:
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    wait()
    start = time.perf_counter()
    model(images)
    wait()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--keep-rate", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", action="store_true", help="add the cross-layer cache")
    options = parser.parse_args()
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    models = {
        name or "plain": build(options.model, options.size, name, options.keep_rate, options.cache).to(options.device)
        for name in ("", *REDUCTIONS)
    }
    costs = {name: count(model, (options.size, options.size)).multiply_adds for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            timed(model, images)
        for _ in range(options.rounds):
            for name, model in models.items():
                times[name].append(timed(model, images))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    print(f"{options.model} at {options.size}, keep rate {options.keep_rate}, batch {options.batch}, {options.device}")
    print(f"{'':12} {'images/s':>9} {'GMACs':>7} {'fewer':>6} {'faster':>7} {'realised':>9}")
    for name in models:
        fewer, faster = costs["plain"] / costs[name], seconds["plain"] / seconds[name]
        rate, cost = options.batch / seconds[name], costs[name] / 1e9
        print(f"{name:12} {rate:9.2f} {cost:7.2f} {fewer:6.2f} {faster:7.2f} {faster / fewer:9.0%}")


if __name__ == "__main__":
    main()
