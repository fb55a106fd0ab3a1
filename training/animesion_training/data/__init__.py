"""Load labelled images: sources, sampling, schedule, decoding, augmentation and caching.

    data = open_data("out/daf-re")
    stream = Stream(data, "train", batch_size=256, size=128, seed=1)
    augment = Augment()
    for batch in stream:
        images = augment(batch.images.to(device), batch.seeds.to(device))

The order of samples is a pure function of seed and epoch (`schedule`, `sampling`); how they are read and decoded
(`sources`, `stream`, `cache`) does not change it. Models, losses and the training loop are left to the rest of the
package.
"""

from __future__ import annotations

from animesion_training.data.augment import Augment, ColorJitter, RandomErasing
from animesion_training.data.blend import blend
from animesion_training.data.cache import CachedStream, cache_samples
from animesion_training.data.decode import (
    RandomResizedCrop,
    Resize,
    ResizeCenterCrop,
    ResizeRandomCrop,
    Transform,
)
from animesion_training.data.positions import Batch
from animesion_training.data.samples import DataSplits, Samples, divide_split
from animesion_training.data.sampling import SAMPLINGS
from animesion_training.data.sources import open_data
from animesion_training.data.stream import Stream
from animesion_training.data.trivial_augment import TrivialAugmentWide

__all__ = [
    "SAMPLINGS",
    "Augment",
    "Batch",
    "CachedStream",
    "ColorJitter",
    "DataSplits",
    "RandomErasing",
    "RandomResizedCrop",
    "Resize",
    "ResizeCenterCrop",
    "ResizeRandomCrop",
    "Samples",
    "Stream",
    "Transform",
    "TrivialAugmentWide",
    "blend",
    "cache_samples",
    "divide_split",
    "open_data",
]
