"""Time a step of torch's optimizers with and without their fused kernels, and compare the weights.

python tests/benchmarks/optimizer_step.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch

from animesion_training.engine import optim
from animesion_training.recipe import OptimizerSection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(chosen.device)
    for model in chosen.models:
        for name in ("sgd", "adam", "adamw"):
            times, ends = {}, []
            for fused in (False, True):
                torch.manual_seed(0)
                network = timm.create_model(model, num_classes=20).to(device)
                settings = OptimizerSection(name=name, lr=0.01, options={"fused": fused})
                optimizer = optim.make_optimizer(network, settings, device)
                for parameter in network.parameters():
                    parameter.grad = torch.randn_like(parameter)
                seconds = []
                for _ in range(chosen.steps):
                    start = time.perf_counter()
                    optimizer.step()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - start)
                times[fused] = 1000 * statistics.median(seconds)
                ends.append([parameter.detach() for parameter in network.parameters()])
            apart = max(float((one - other).abs().max()) for one, other in zip(*ends, strict=True))
            print(f"{model} {name}: {times[False]:.1f} ms, fused {times[True]:.1f} ms, weights apart by {apart:.1g}")


if __name__ == "__main__":
    main()
