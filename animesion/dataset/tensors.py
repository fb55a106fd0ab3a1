"""The samples of a split as tensors, for PyTorch's `DataLoader`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from animesion.images import codec

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from animesion.dataset.dataset import Dataset


class Tensors:
    """A dataset of `(image, class id)` that can be indexed, pickled and sent to workers. `Dataset.torch` makes it.

    Images are float32 of shape (3, size, size), RGB, 0 to 1: the shorter side is resized to `size` with Lanczos, and
    the centre square is cropped.

    Args:
        dataset: the dataset.
        split: the split; None for all.
        size: side of the images in pixels.
        transform: makes something else of an RGB image; `size` is then unused.
    """

    def __init__(
        self, dataset: Dataset, split: str | None, size: int, transform: Callable[[Image.Image], Any] | None
    ) -> None:
        self.dataset, self.split, self.size, self.transform = dataset, split, size, transform
        column = dataset.index["split"]
        rows = pc.equal(column, split) if split is not None else pc.is_valid(column)
        self._positions = np.flatnonzero(rows.to_numpy())

    def __repr__(self) -> str:
        shape = f"{self.size} px" if self.transform is None else repr(self.transform)
        return f"<Tensors of {self.dataset.name}, {self.split or 'all splits'}: {len(self):,} samples, {shape}>"

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        sample = self.dataset[int(self._positions[position])]
        image = sample.decode()
        return (self._tensor(image) if self.transform is None else self.transform(image)), sample.label

    def _tensor(self, image: Image.Image) -> torch.Tensor:
        import torch

        small = codec.resized(image, None, self.size, "short-side")
        left, top = (small.width - self.size) // 2, (small.height - self.size) // 2
        square = small.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float().div_(255)
