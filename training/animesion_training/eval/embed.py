"""Compute the embeddings of a split or of single images. `similarity` computes metrics of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import animesion
from animesion.errors import AnimesionError
from animesion_training.data import Batch, DataSplits, Samples
from animesion_training.distributed import DistributedContext
from animesion_training.eval import tta
from animesion_training.eval.reading import Reading, of_all
from animesion_training.eval.similarity import Embedded, FloatArray, IntArray
from animesion_training.models.create import bare
from animesion_training.models.embedding import Embedder


def embed_split(
    model: nn.Module, data: DataSplits, split: str, reading: Reading, context: DistributedContext
) -> Embedded:
    """Compute the embedding of every sample of a split, which all processes return; arguments are those of `score`.

    The embeddings of several views are averaged.

    Raises:
        AnimesionError: an image cannot be read, or see `check_lengths`; all processes raise it.
    """
    embedder = Embedder(model).eval()

    def forward(images: Tensor, batch: Batch) -> Tensor:
        return embed(embedder, images, reading.img_size, reading.tta)

    def embedded() -> tuple[list[FloatArray], list[IntArray]]:
        vectors: list[FloatArray] = []
        indices: list[IntArray] = []
        for found, batch in reading.outputs(forward, data, split, context):
            vectors.append(found.cpu().numpy())
            check_lengths(vectors[-1])
            indices.append(batch.indices.cpu().numpy())
        return vectors, indices

    parts = of_all(context, embedded)
    rows = np.concatenate([each for part in parts for each in part[1]] or [np.zeros(0, dtype=np.int64)])
    found = np.concatenate([each for part in parts for each in part[0]] or [np.zeros((0, 1), dtype=np.float32)])
    order = np.argsort(rows, kind="stable")
    samples = data.select(split)
    chosen = rows[order]
    keys = [samples.keys[i] for i in chosen.tolist()]
    return Embedded(found[order], samples.labels[chosen], _groups(data, samples)[chosen], keys, data.classes)


def embed(embedder: Embedder, images: Tensor, size: int, views: tta.TTA = "none") -> Tensor:
    """Compute embeddings (B, D) of images (B, 3, L, L) as the mean over views, of length 1; see `tta.predict`."""
    if views == "none":
        return embedder(images)  # type: ignore[no-any-return]
    total = torch.stack([embedder(view) for view in tta.views(images, size, views)]).sum(0)
    return functional.normalize(total, dim=1)


def check_lengths(vectors: FloatArray) -> None:
    """Check that embeddings (B, D) have length 1.

    Raises:
        AnimesionError: they are not finite, or 0, as those of a network whose activations have died out.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.abs(lengths - 1) < 1e-3).all():
        what = "0" if np.isfinite(lengths).all() else "not finite"
        raise AnimesionError(f"the network gives an image an embedding that is {what}: use other weights")


def _groups(data: DataSplits, samples: Samples) -> IntArray:
    """Number of the group of each sample, (N,): that of a built dataset; otherwise each sample is one of its own."""
    folder = Path(data.path)
    if not (folder / "dataset.json").is_file():
        return np.arange(len(samples), dtype=np.int64)
    curated = animesion.open_dataset(folder).curated
    group_of = dict(zip(curated["key"].to_pylist(), curated["group"].to_pylist(), strict=True))
    numbers: dict[str, int] = {}
    names = [group_of.get(key) or f" {key}" for key in samples.keys]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def network_digest(model: nn.Module) -> str:
    """Compute the SHA-256 of the weights of a network, by name, whatever file they are from."""
    digest = hashlib.sha256()
    for name, value in sorted(bare(model).state_dict().items()):
        content = value.detach().cpu().contiguous()
        digest.update(f"{name} {content.dtype} {tuple(content.shape)}\n".encode())
        digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
