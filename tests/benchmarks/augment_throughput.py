"""Throughput of TrivialAugmentWide on whole batches, compared with torchvision's, which processes one image at a time.

    python tests/benchmarks/augment_throughput.py [--size 128] [--batch 256] [--repeats 9] [--threads 2] [--device cpu]

torchvision runs on uint8 tensors on the same device, and on Pillow images without the conversion from and to tensors.
The rows run alternately; the table shows medians of wall and CPU time, then each operation alone. With more than one
thread on a shared machine, set OMP_WAIT_POLICY=passive, or waiting threads spin.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from animesion_training.data import Augment, TrivialAugmentWide
from animesion_training.data.trivial_augment import LEVELS, OPERATIONS, OperationDraws

Work = Callable[[], object]


def random_images(count: int, size: int) -> Tensor:
    """Smooth random images with a little noise, shape (B, 3, S, S), uint8, channels last."""
    rng = np.random.default_rng(0)
    batch = np.empty((count, size, size, 3), dtype=np.uint8)
    for out in batch:
        coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        soft = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        out[...] = (soft + rng.integers(-6, 7, soft.shape)).clip(0, 255)
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def augmented(transform: Callable[[Any], Any], images: Iterable[Any]) -> list[Any]:
    return [transform(image) for image in images]


def seeds(count: int, device: torch.device) -> Tensor:
    """New random seeds, shape (count,)."""
    return torch.randint(-(2**62), 2**62, (count,), device=device)


def measured(rows: dict[str, Work], repeats: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each row; rows alternate, so a machine that slows down affects all equally."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(repeats + 2):
        for name, work in rows.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    # the first two runs warm up
    return {name: tuple(map(statistics.median, zip(*runs[2:], strict=True))) for name, runs in times.items()}


def table(rows: dict[str, Work], count: int, repeats: int, device: torch.device) -> None:
    """Print the times of the rows, compared with the first row."""
    results = measured(rows, repeats, device)
    first = next(iter(results.values()))
    print(f"{'':<34} {'ms':>8} {'CPU ms':>8} {'images/s':>10} {'this / first':>13} {'of CPU':>7}")
    for name, (wall, cpu) in results.items():
        ratios = f"{wall / first[0]:>12.2f}x {cpu / first[1]:>6.2f}x"
        print(f"{name:<34} {1e3 * wall:>8.2f} {1e3 * cpu:>8.2f} {count / wall:>10,.0f} {ratios}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, device, repeats = arguments.batch, arguments.device, arguments.repeats
    images = random_images(count, arguments.size)
    pillow = [to_pil_image(image) for image in images]
    images = images.to(device)
    trivial, reference = TrivialAugmentWide(translate=32), v2.TrivialAugmentWide()

    print(f"{count} images of {arguments.size} px, {arguments.threads} threads, {device}, {repeats} runs\n")
    rows: dict[str, Work] = {
        "batch": lambda: trivial(images, seeds(count, device)),
        "torchvision v2, tensors": lambda: [reference(image) for image in images],
        "torchvision v2, Pillow": lambda: [reference(image) for image in pillow],
    }
    table(rows, count, repeats, device)
    print()
    plain, with_it = Augment(), Augment(trivial=trivial)
    rows = {
        "Augment: flip, normalise": lambda: plain(images, seeds(count, device)),
        "Augment: flip, trivial, normalise": lambda: with_it(images, seeds(count, device)),
    }
    table(rows, count, repeats, device)

    part = max(1, count // len(OPERATIONS))
    print(f"\neach operation alone on {part} images, ms of wall time")
    print(f"{'':<14} {'batch':>8} {'tensors':>8} {'Pillow':>8}")
    for place, (name, key) in enumerate(zip(OPERATIONS, reference._AUGMENTATION_SPACE, strict=True)):
        levels = torch.arange(part, device=device) % LEVELS
        drawn = OperationDraws(torch.full_like(levels, place), levels, levels % 2 == 0)
        only = v2.TrivialAugmentWide()
        only._AUGMENTATION_SPACE = {key: reference._AUGMENTATION_SPACE[key]}
        alone: dict[str, Work] = {
            "batch": partial(trivial.apply, images[:part], drawn),
            "tensors": partial(augmented, only, images[:part]),
            "Pillow": partial(augmented, only, pillow[:part]),
        }
        walls = [1e3 * wall for wall, _ in measured(alone, repeats, device).values()]
        print(f"{name:<14} " + " ".join(f"{wall:>8.2f}" for wall in walls))


if __name__ == "__main__":
    main()
