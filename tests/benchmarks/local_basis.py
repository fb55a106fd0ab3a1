"""Make `animesion/images/local_basis.npz`: the directions on which SIFT descriptors are projected to codes.

    python tests/benchmarks/local_basis.py FACES.tar ILLUSTRATIONS.tar LEAVES.tar

Reads up to 1,500 images of each tar. The directions are the 32 main axes of the even and of the odd part of descriptors
under mirroring, each 32 turned at random, which evens out the variance of the bits (as iterative quantisation starts:
Gong and Lazebnik, "Iterative Quantization", 2011). Prints how many bits differ between the codes of two descriptors
that have nothing to do with each other.
"""

from __future__ import annotations

import argparse
import io
import random
import tarfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from animesion.images import local_features

OUT = Path(local_features.__file__).with_name("local_basis.npz")


def descriptors(tar: Path, count: int) -> np.ndarray:
    """SIFT descriptors of some images of a tar, shape (n, 128)."""
    found = []
    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.isfile()]
        for member in random.Random(0).sample(members, min(count, len(members))):
            file = archive.extractfile(member)
            assert file is not None
            image = Image.open(io.BytesIO(file.read())).convert("L")
            grey = np.asarray(image.resize(local_features.frame(image.size), Image.Resampling.BICUBIC))
            values = cv2.SIFT.create(200, 3, 0.04, 10, 1.6, True).detectAndCompute(grey, None)[1]
            found += [] if values is None else [values]
    return np.concatenate(found)


def mirror() -> np.ndarray:
    """The permutation of a descriptor's 4 x 4 x 8 values that mirrors its patch."""
    cells = np.arange(128).reshape(4, 4, 8)
    return cells[::-1][:, :, [-k % 8 for k in range(8)]].reshape(-1)


def axes(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The 32 axes of largest variance, turned at random: shape (128, 32)."""
    found = np.linalg.eigh(values.T @ values)[1][:, ::-1][:, :32]
    return found @ np.linalg.qr(rng.normal(size=(32, 32)))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", nargs="+", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    values = np.concatenate([descriptors(tar, 1500) for tar in arguments.tars])
    values = values[rng.choice(len(values), min(len(values), 120_000), replace=False)].astype(np.uint8)
    roots = np.rint(16 * np.sqrt(values.astype(np.float64)))
    roots /= np.sqrt(values.sum(axis=1, dtype=np.float64, keepdims=True))
    swapped = mirror()
    mean = (roots.mean(axis=0) + roots.mean(axis=0)[swapped]) / 2
    centred = roots - mean
    even, odd = centred + centred[:, swapped], centred - centred[:, swapped]
    directions = np.rint(np.concatenate([axes(even, rng), axes(odd, rng)], axis=1) * 2**15)
    # rounding keeps a direction even or odd only if both halves are rounded alike
    directions[:, :32] = np.rint((directions[:, :32] + directions[swapped, :32]) / 2)
    directions[:, 32:] = np.trunc((directions[:, 32:] - directions[swapped, 32:]) / 2)
    thresholds = np.median(roots @ directions, axis=0)
    thresholds[32:] = 0
    np.savez_compressed(OUT, directions=directions.astype(np.int16), thresholds=thresholds)
    bits = roots @ directions > thresholds
    half = len(bits) // 2
    differing = (bits[:half] != bits[half : 2 * half]).sum(axis=1)
    print(f"{len(values):,} descriptors; unrelated ones differ in {differing.mean():.1f} bits on average")
    for limit in (8, 10, 12, 14):
        print(f"at most {limit} bits: {(differing <= limit).mean():.6f}")


if __name__ == "__main__":
    main()
