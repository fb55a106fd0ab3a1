"""Train a small timm model to recognise copies, for `near_duplicates.py --embedding MODEL --weights FILE`.

    python tests/benchmarks/copy_embedder.py --faces FACES.tar --out WEIGHTS.pth [--steps 42] [--hold 1000]

Contrastive learning (InfoNCE, arXiv 1807.03748, two altered views of an image against all others of the batch) on the
faces that `near_duplicates.py --images HOLD` does not use. Views are zoomed, shifted, mirrored, framed and brightened.
The model shows what embeddings can detect on a machine without network access. Do not use it for anything else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from near_duplicates import faces
from torch import Tensor
from torch.nn import functional

SIDE, BATCH, TEMPERATURE = 160, 128, 0.07


def views(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image randomly altered, shape (B, 3, S, S), 0 to 1."""
    n = len(images)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    zoom = draw(0.86, 1.12)  # above 1 leaves a black frame
    mirror = torch.where(torch.rand(n, generator=rng) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * mirror, zoom * draw(0.97, 1.03)
    theta[:, 0, 2], theta[:, 1, 2] = draw(-0.08, 0.08), draw(-0.08, 0.08)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    out = functional.grid_sample(images, grid, align_corners=False)
    frame = draw(0.0, 1.0).round()[:, None, None, None]  # black or white
    inside = functional.grid_sample(torch.ones_like(images[:, :1]), grid, align_corners=False)
    out = out + frame * (1 - inside)
    out = out * draw(0.75, 1.3)[:, None, None, None] + draw(-0.05, 0.05)[:, None, None, None]
    return out.clamp(0, 1)


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faces", type=Path, required=True, help="tar of images")
    parser.add_argument("--out", type=Path, required=True, help="weights, .pth")
    parser.add_argument("--model", default="test_resnet.r160_in1k")
    parser.add_argument("--steps", type=int, default=42, help="about five seconds each on a CPU")
    parser.add_argument("--hold", type=int, default=1000, help="number of images that are held out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    images = faces(arguments.faces, 10**6)[arguments.hold :]
    pixels = torch.from_numpy(np.stack([np.asarray(image.resize((SIDE, SIDE))) for image in images]))
    model = timm.create_model(arguments.model, num_classes=0)
    mean, std = (torch.tensor(model.pretrained_cfg[name])[None, :, None, None] for name in ("mean", "std"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    lost = 0.0
    for step in range(arguments.steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / arguments.steps)
        chosen = pixels[torch.randperm(len(pixels), generator=rng)[:BATCH]].permute(0, 3, 1, 2) / 255
        first, second = (
            functional.normalize(model((views(chosen, rng) - mean) / std).flatten(1), dim=1) for _ in range(2)
        )
        scores = first @ second.T / TEMPERATURE
        due = torch.arange(BATCH)
        loss = (functional.cross_entropy(scores, due) + functional.cross_entropy(scores.T, due)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        lost = 0.95 * lost + 0.05 * loss.item() if step else loss.item()
    torch.save(model.state_dict(), arguments.out)
    print(f"{len(images):,} images, {arguments.steps} steps of {BATCH}, loss {lost:.3f}")


if __name__ == "__main__":
    main()
