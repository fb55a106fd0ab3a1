"""Speed of each fine-grained method, compared with the plain vision transformer: inference and training steps.

    python tests/benchmarks/method_speed.py [--host vit_small_patch16] [--size 224] [--batch 8] [--repeats 5]
        [--device cuda] [--precision bf16]

A training step is forward, cross-entropy, backward and an AdamW update of the trained parameters: all of them, or with
`--freeze` those that the method adds to a frozen backbone. Rows alternate; the table compares medians of their times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from animesion_training.analysis.profile import count
from animesion_training.engine import norms, optim
from animesion_training.models import create_model
from animesion_training.precision import autocast

PREFIXES = (
    "", "evit50_", "evit25_", "evit10_", "evit50_clca_", "evit25_clca_", "tome50_", "ats50_", "dynamicvit50_",
    "cropr50_", "dpcknn50_", "sit50_", "patchmerger50_", "glsim_", "rams_", "transfg_", "ffvt_", "ila_", "ilap_",
    "ilapp_", "adapter_", "convpass_", "vptdeep_", "vqt_", "lora_", "cal_",
)  # fmt: skip


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def runs(
    model: nn.Module, images: Tensor, labels: Tensor, precision: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Functions that run one batch of inference, and one training step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    losses = {"with_losses": True} if getattr(model, "has_losses", False) else {}

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), autocast(precision, images.device):
            model(images)

    def step() -> None:
        norms.train_mode(model)
        with autocast(precision, images.device):
            out = model(images, **losses)
        logits, more = out if losses else (out, {})
        loss = nn.functional.cross_entropy(logits.float(), labels) + sum(more.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return infer, step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="vit_small_patch16")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--freeze", action="store_true", help="freeze the backbone")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
    labels = torch.randint(200, (arguments.batch,), device=device)
    rows = {}
    for prefix in PREFIXES:
        torch.manual_seed(0)
        model = create_model(f"{prefix}{arguments.host}", 200, arguments.size)
        if arguments.freeze:
            optim.freeze(model, ["backbone"])
        cost = count(model, (arguments.size, arguments.size)).multiply_adds / 1e9
        rows[prefix.rstrip("_") or "plain"] = (cost, *runs(model.to(device), images, labels, arguments.precision))
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rows}
    for turn in range(arguments.repeats + 1):
        for name, (_, infer, step) in rows.items():
            taken = timed(infer, device), timed(step, device)
            if turn:  # the first run warms up
                for kept, seconds in zip(times[name], taken, strict=True):
                    kept.append(seconds)
    speeds = {name: [arguments.batch / statistics.median(each) for each in both] for name, both in times.items()}
    print(f"{arguments.host}, {arguments.size} px, batches of {arguments.batch}, {device}, {arguments.precision}")
    print(f"{'':<14} {'G mult-adds':>11} {'infer img/s':>11} {'/ plain':>8} {'train img/s':>11} {'/ plain':>8}")
    for name, (infer, train) in speeds.items():
        plain = speeds["plain"]
        print(
            f"{name:<14} {rows[name][0]:>11.2f} {infer:>11.1f} {infer / plain[0]:>7.2f}x {train:>11.1f} "
            f"{train / plain[1]:>7.2f}x"
        )


if __name__ == "__main__":
    main()
