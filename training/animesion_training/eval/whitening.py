"""Fit the whitening of embeddings on a split of known classes, and write the network with it.

What images of one class differ in says nothing about who they show. So embeddings are centred, and each direction is
divided by the deviation within classes along it, those with little of it less than they would be (within-class
covariance normalisation, Hatch et al., Interspeech 2006).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from animesion.errors import UsageError
from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.eval.identify import ImageEmbedder
from animesion_training.eval.similarity import FloatArray, IntArray
from animesion_training.eval.tta import TTA
from animesion_training.models.create import bare
from animesion_training.models.embedding import Whitening
from animesion_training.weights import WeightsCard, write_weights

#: Exponent of features, and the share of the largest variance that is added to each.
POWER, SHRINKAGE = 0.25, 0.1


def fitted(vectors: FloatArray, labels: IntArray, power: float = POWER, shrinkage: float = SHRINKAGE) -> Whitening:
    """Fit a whitening.

    Args:
        vectors: embeddings (N, D), rows of length 1.
        labels: class of each, (N,).
        power: exponent of their absolute values, above 0.
        shrinkage: share of the largest variance that is added to each, above 0.

    Raises:
        UsageError: no class has two images that differ.
    """
    x = vectors.astype(np.float64)
    x = np.sign(x) * np.abs(x) ** power
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    _, rows, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.zeros((len(counts), x.shape[1]))
    np.add.at(means, rows, x)
    within = x - (means / counts[:, None])[rows]
    variances, axes = np.linalg.eigh(within.T @ within / max(1, len(x)))
    if not variances.size or variances[-1] < 1e-12:
        raise UsageError("whitening needs several images of a class: no class has two that differ")
    whitening = Whitening(x.shape[1])
    # symmetric, so that the map is the closest to none
    matrix = axes * (np.maximum(variances, 0) + shrinkage * variances[-1]) ** -0.5 @ axes.T
    whitening.power.fill_(power)
    whitening.mean.copy_(torch.from_numpy(x.mean(0)))
    whitening.matrix.copy_(torch.from_numpy(matrix * variances[-1] ** 0.5))
    return whitening


def whiten(
    checkpoint: Path,
    data: DataSplits,
    split: str,
    out: Path,
    context: DistributedContext,
    *,
    views: TTA = "none",
    power: float = POWER,
    shrinkage: float = SHRINKAGE,
    advance: Callable[[int], None] = lambda count: None,
) -> WeightsCard:
    """Write the weights of a network with a whitening of its embeddings; its logits stay.

    Args:
        checkpoint: a run, or a weights file or checkpoint that describes its network.
        data: known classes, best those that the network was trained on.
        split: split of them.
        out: weights file to write.
        context: device to compute on.
        views: views of an image whose embeddings are averaged.
        power: see `fitted`.
        shrinkage: see `fitted`.
        advance: called with the number of images that were embedded.

    Raises:
        UsageError: unusable weights or data, several processes, or embeddings that are whitened already.
        AnimesionError: an image cannot be read.
    """
    if context.world_size > 1:
        raise UsageError("embeddings are whitened by one process: start it without torchrun")
    embedder = ImageEmbedder(checkpoint, context, views, advance)
    network = bare(embedder.network)
    if hasattr(network, "whitening"):
        raise UsageError(f"{checkpoint} has whitened embeddings already: give the weights that it was made of")
    found = embedder.split(data, split)
    network.add_module("whitening", fitted(found.vectors, found.labels, power, shrinkage))
    facts = {
        "whitening": {
            "data": Path(data.path).name, "split": split, "images": len(found.labels), "views": views, "power": power,
            "shrinkage": shrinkage,
        }
    }  # fmt: skip
    card = replace(embedder.card, facts={**embedder.card.facts, **facts})
    write_weights(out, card, network.state_dict())
    return card
