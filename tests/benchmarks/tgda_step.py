"""Cost of the views in a TGDA step, compared with the networks that process them.

    python tests/benchmarks/tgda_step.py [--teacher resnet18 --teacher-size 128] [--student lrnet14 --student-size 64]
        [--batch 16] [--repeats 9] [--device cpu] [--precision fp32] [--threads N]

In a step, the teacher processes B images, B crops and B drops of them are created, and the teacher processes those 2 B.
The student processes all 3 B at its own size, forward and backward. Parts run alternately; the table shows medians. Two
more rows are not part of the sum: the crops in a batch, and the same crops in a loop over the images. The largest
difference between the two is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from animesion_training.data import views
from animesion_training.losses.distillation import distillation_loss
from animesion_training.models import create_model

CLASSES = 200


def crop_loop(images: Tensor, boxes: Tensor) -> Tensor:
    """The crops one by one, shape (B, C, H, W); waits for the device."""
    size = images.shape[2:]
    cut = [image[None, :, y0:y1, x0:x1] for image, (y0, y1, x0, x1) in zip(images, boxes.tolist(), strict=True)]
    return torch.cat([functional.interpolate(each, size, mode="bilinear", align_corners=True) for each in cut])


def parts_of_a_step(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The parts by name in the order of a step, then the rows for comparison; each can be called separately."""
    device, batch = torch.device(arguments.device), arguments.batch
    layout = torch.channels_last
    teacher: Any = create_model(arguments.teacher, CLASSES, arguments.teacher_size, selector="cal").eval()
    student: Any = create_model(arguments.student, CLASSES, arguments.student_size).train()
    teacher, student = (model.to(device, memory_format=layout) for model in (teacher, student))
    teacher.requires_grad_(False)
    side = arguments.teacher_size
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)
    seeds, targets = torch.arange(batch, device=device), torch.randint(CLASSES, (batch,), device=device)

    def cast() -> Any:
        if arguments.precision == "fp32":
            return nullcontext()
        return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[arguments.precision])

    def taught(pixels: Tensor) -> Any:
        with torch.no_grad(), cast():
            return teacher.forward_parts(pixels)

    # an untrained head attends to noise: blobs at random positions give crops like those of a trained one
    side_of_map = taught(images).attention.shape[-1]
    at = torch.rand(batch, 32, 2, 1, device=device)
    steps = torch.linspace(0, 1, side_of_map, device=device)
    rows, columns = (-((steps - at) ** 2) / 0.05).exp().unbind(2)
    attention = rows[..., None] * columns[..., None, :]
    draws = views.draw(seeds, attention)
    boxes = views.crop_boxes(views.select_maps(attention, draws.maps)[0], (side, side), draws.crop_threshold)
    made = views.views(images, attention, draws)
    raw, aug = taught(images).logits, taught(made).logits

    def learn() -> None:
        small = (arguments.student_size,) * 2
        with cast():
            logits = [student(functional.interpolate(each, small, mode="bicubic")) for each in (images, made)]
        terms = distillation_loss(logits[0], raw, targets, logits[1], aug)
        torch.stack(list(terms.values())).sum().backward()
        student.zero_grad(set_to_none=True)

    print(f"largest difference of the crops: {(views.crop(images, boxes) - crop_loop(images, boxes)).abs().max():.1e}")
    return {
        "teacher, images": lambda: taught(images),
        "views": lambda: views.views(images, attention, views.draw(seeds, attention)),
        "teacher, views": lambda: taught(made),
        "student, all": learn,
        "crops, batched": lambda: views.crop(images, boxes),
        "crops, one by one": lambda: crop_loop(images, boxes),
    }


def measure(parts: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each part."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 2):
        for name, part in parts.items():
            wait()
            start = time.perf_counter()
            part()
            wait()
            if turn > 1:  # the first two runs warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="resnet18")
    parser.add_argument("--teacher-size", type=int, default=128)
    parser.add_argument("--student", default="lrnet14")
    parser.add_argument("--student-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found = measure(parts_of_a_step(arguments), arguments.repeats, arguments.device)
    step = [name for name in found if not name.startswith("crops")]
    networks = sum(found[name] for name in step if name != "views")
    print(
        f"{arguments.teacher} at {arguments.teacher_size}, {arguments.student} at {arguments.student_size}, batch "
        f"{arguments.batch}, {arguments.precision} on {arguments.device}, medians of {arguments.repeats}"
    )
    for name, taken in found.items():
        share = f"{taken / networks:>8.2%} of the networks" if name in step else ""
        print(f"{name:<20} {taken:>10.2f} ms {share}")
    print(f"views / networks: {found['views'] / networks:.2%}")


if __name__ == "__main__":
    main()
