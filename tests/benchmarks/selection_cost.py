"""Cost of selecting patches: GLS compared with attention rollout, TransFG's part selection and a pass of the encoder.

    python tests/benchmarks/selection_cost.py [--sizes 224 448] [--stride 16] [--repeats 5] [--device cpu]

One image and ViT-B/16. Prints multiply-adds (sums over heads are not counted), median times over alternating runs, and
both as ratios to GLS and as shares of one pass of the encoder. The methods receive attention weights and tokens; the
last row is the cost of extracting the weights from an encoder with fused attention. TransFG uses overlapping patches:
`--stride 12`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import reduce

import timm
import torch
from torch import Tensor

from animesion_training.analysis.profile import count
from animesion_training.tokens import TokenVisionTransformer
from animesion_training.tokens.rollout import class_rollout, record_attention, rollout
from animesion_training.tokens.twopass.similarity import global_local_similarity, select

DEPTH, HEADS, WIDTH, PATCH, TOP = 12, 12, 768, 16, 8


def part_selection(weights: Sequence[Tensor]) -> Tensor:
    """The patch with the highest attention of each head, by the product over blocks (TransFG, AAAI 2022, eq. 10-12)."""
    joint = reduce(lambda before, block: block @ before, weights)
    return joint[:, :, 0, 1:].argmax(-1)


def encoder(size: int) -> TokenVisionTransformer:
    """ViT-B/16 for square images of a side, without a classifier."""
    model = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=size)
    return TokenVisionTransformer(model, {}, 0).eval()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(size: int, stride: int, repeats: int, device: torch.device) -> None:
    """Measure at one image size and print."""
    patches = (size // PATCH) ** 2
    cut = ((size - PATCH) // stride + 1) ** 2
    model = encoder(size).to(device)
    image = torch.randn(1, 3, size, size, device=device)
    tokens = torch.randn(1, patches + 1, WIDTH, device=device)
    weights = [torch.rand(1, HEADS, patches + 1, patches + 1, device=device).softmax(-1) for _ in range(DEPTH)]
    overlapping = weights
    if stride != PATCH:
        overlapping = [torch.rand(1, HEADS, cut + 1, cut + 1, device=device).softmax(-1) for _ in range(DEPTH)]

    def recorded() -> None:
        with record_attention(model) as recorder:
            model(image)
            recorder.pop_weights()

    with torch.device("meta"):
        whole = count(encoder(size), (size, size)).multiply_adds
    # products of eleven blocks; the twelfth block gets the selected patches
    joined = (DEPTH - 2) * HEADS * (cut + 1) ** 3
    queries = DEPTH * (patches + 1) ** 2 * WIDTH
    rows: dict[str, tuple[int, Callable[[], object]]] = {
        "GLS": (
            3 * patches * WIDTH,  # products, and squares for the norm of both
            lambda: select(global_local_similarity(tokens[:, 0], tokens[:, 1:]), TOP),
        ),
        "rollout, class row": ((DEPTH - 1) * (patches + 1) ** 2, lambda: select(class_rollout(weights)[:, 1:], TOP)),
        "rollout": ((DEPTH - 1) * (patches + 1) ** 3, lambda: select(rollout(weights)[:, 0, 1:], TOP)),
        f"PSM, stride {stride}": (joined, lambda: part_selection(overlapping[: DEPTH - 1])),
        "one pass": (whole, lambda: model(image)),
        "pass with weights": (whole + queries, recorded),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    with torch.inference_mode():
        for repeat in range(repeats + 1):  # alternate, so that a machine that slows down affects all equally
            for name, (_, work) in rows.items():
                taken = timed(work, device)
                if repeat:  # the first run warms up
                    seconds[name].append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{size} px, {patches} patches, {device}, {torch.get_num_threads()} threads, {repeats} runs")
    print(f"{'':<20} {'M mult-adds':>12} {'/ GLS':>10} {'% of pass':>10} {'ms':>10} {'/ GLS':>8} {'% of pass':>10}")
    for name, (adds, _) in rows.items():
        own, first, last = medians[name], medians["GLS"], medians["one pass"]
        print(
            f"{name:<20} {adds / 1e6:>12,.2f} {adds / rows['GLS'][0]:>10,.0f} {100 * adds / whole:>10.4f} "
            f"{1000 * own:>10.3f} {own / first:>8,.1f} {100 * own / last:>10.3f}"
        )


def main() -> None:
    """Measure at every size and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument(
        "--stride", type=int, default=PATCH, help="stride in pixels of the patches that PSM selects from"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        measure(size, arguments.stride, arguments.repeats, torch.device(arguments.device))


if __name__ == "__main__":
    main()
