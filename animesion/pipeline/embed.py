"""Embed images with a timm model or SSCD, to find duplicates that a perceptual hash misses (crops, borders).

`duplicates.embedding.model` switches it on. Embeddings are written to `features/embeddings-part-*.parquet` and reused
as long as images, model and settings are the same. `animesion.dedup.clusters` decides which pairs are duplicates.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from animesion import model_files
from animesion.config.recipe import EmbeddingSection, Recipe
from animesion.config.settings import params_digest
from animesion.errors import UsageError
from animesion.images import codec
from animesion.pipeline.sscd import BATCH, Sscd
from animesion.schemas import EMBEDDINGS, FEATURES, RAW
from animesion.storage import parquet
from animesion.storage.receipts import Receipt
from animesion.storage.workspace import Workspace, sha256_file

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger("animesion")

Vectors = npt.NDArray[np.float32]


class Embedder(Protocol):
    """Turns images into vectors; created once, in the process of the build."""

    def __call__(self, images: Sequence[Image.Image]) -> Vectors:
        """Embeddings of unit length, shape (n, d), of n RGB images of any size."""


def load(settings: EmbeddingSection) -> Embedder:
    """The embedder of a recipe.

    Raises:
        UsageError: it cannot be loaded.
    """
    if settings.model == "sscd":
        return Sscd(None if settings.weights == "pretrained" else Path(settings.weights))
    return TimmEmbedder(settings)


class TimmEmbedder:
    """A timm model without its classifier.

    Args:
        settings: name of the model, and the source of its weights.

    Raises:
        UsageError: timm or torch is missing, the model is unknown, or its weights cannot be loaded.
    """

    def __init__(self, settings: EmbeddingSection) -> None:
        try:
            import timm
            import torch
        except ImportError:
            raise UsageError(
                "duplicates.embedding needs timm and torch: install them with `pip install animesion[train]`"
            ) from None
        if not timm.is_model(settings.model.partition(".")[0]):
            raise UsageError(f"duplicates.embedding.model: timm has no model named {settings.model}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # makes weights that are not loaded reproducible
            try:
                model = timm.create_model(settings.model, pretrained=settings.weights == "pretrained", num_classes=0)
            except Exception as error:  # the hub's client documents no base class of its errors
                raise UsageError(
                    f"duplicates.embedding: the weights of {settings.model} cannot be loaded "
                    f"({' '.join(str(error).split())[:120]}): give a file in duplicates.embedding.weights"
                ) from None
        if settings.weights not in ("pretrained", "random"):
            _load_weights(model, Path(settings.weights))
        config = cast("dict[str, Any]", model.pretrained_cfg)
        self._model: nn.Module = model.eval()
        self._size = (int(config["input_size"][2]), int(config["input_size"][1]))
        self._mean, self._std = (np.array(config[name], dtype=np.float32) for name in ("mean", "std"))

    def __call__(self, images: Sequence[Image.Image]) -> Vectors:
        """Embeddings of unit length, shape (n, d), of n RGB images of any size, stretched to the model's input size."""
        import torch

        batches = []
        for start in range(0, len(images), BATCH):
            pixels = [
                np.asarray(each.resize(self._size, Image.Resampling.BICUBIC, reducing_gap=3.0), dtype=np.float32)
                for each in images[start : start + BATCH]
            ]
            batch = (np.stack(pixels) / 255 - self._mean) / self._std
            with torch.inference_mode():
                # (batch, height, width, 3) -> (batch, 3, height, width)
                inputs = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
                outputs = self._model(inputs)
                batches.append(torch.nn.functional.normalize(outputs.flatten(1), dim=1).numpy())
        return np.concatenate(batches)


def _load_weights(model: Any, path: Path) -> None:
    """Load weights from a file, without running code from it; weights of a classifier are ignored."""
    from animesion.checkpoints import cut_prefix, read_checkpoint

    try:
        found = read_checkpoint(path)
        weights, notes = cut_prefix(found.tensors, set(model.state_dict()), path)
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except (UsageError, RuntimeError) as error:
        message = " ".join(str(error).split())[:160]
        raise UsageError(f"duplicates.embedding.weights: {path} cannot be loaded into the model ({message})") from None
    if missing := [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise UsageError(f"duplicates.embedding.weights: {path} has no weights for {missing[0]} of the model")
    if notes := [*found.notes, *notes]:
        _log.warning("%s", f"{path}: {'; '.join(notes)}")


def run(workspace: Workspace, recipe: Recipe, parts: int, advance: Callable[[int], None]) -> list[Receipt]:
    """Embed every part that has no valid receipt, in this process; returns the receipts of all parts.

    Raises:
        UsageError: the model or its weights cannot be loaded.
    """
    embedder: Embedder | None = None
    units = [f"embed/part-{part:05d}" for part in range(parts)]
    workspace.forget("embed", set(units))
    receipts = []
    for part, unit in enumerate(units):
        inspected = workspace.receipt(f"inspect/part-{part:05d}")
        assert inspected is not None
        inputs = inspected.inputs | {name: known["sha256"] for name, known in inspected.outputs.items()}
        digest = _params(recipe)
        receipt = workspace.done(unit, _code(recipe), digest, inputs)
        features = parquet.read(
            workspace.path(f"features/part-{part:05d}.parquet"), FEATURES, ("key", "reason", "crop", "width")
        )
        if receipt is None:
            embedder = embedder or load(recipe.duplicates.embedding)
            keys, vectors = _embed_part(workspace, recipe, part, features, embedder)
            # A list column from one flat array and n + 1 offsets, as a list of lists would copy every number.
            flat = pa.array(vectors.reshape(-1), pa.float32())
            offsets = np.arange(len(keys) + 1, dtype=np.int32) * vectors.shape[1]
            column = pa.ListArray.from_arrays(offsets, flat)
            name = f"features/embeddings-part-{part:05d}.parquet"
            written = parquet.write(
                workspace.path(name), pa.table([pa.array(keys, pa.string()), column], schema=EMBEDDINGS)
            )
            receipt = workspace.commit(unit, _code(recipe), digest, inputs, {name: written})
        receipts.append(receipt)
        advance(len(features))
    return receipts


def _embed_part(
    workspace: Workspace, recipe: Recipe, part: int, features: pa.Table, embedder: Embedder
) -> tuple[list[str], Vectors]:
    """Keys and embeddings, shape (n, d), of the n images of a part that decode, in the order of its table."""
    crops = {row["key"]: row["crop"] for row in features.filter(pc.equal(features["reason"], "")).to_pylist()}
    raw = parquet.read(workspace.path(f"raw/part-{part:05d}.parquet"), RAW, ("key", "reason", "offset", "bytes"))
    limits = codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels)
    keys: list[str] = []
    vectors: list[Vectors] = []
    batch: list[Image.Image] = []
    with workspace.path(f"raw/part-{part:05d}.tar").open("rb") as tar:
        for row in raw.to_pylist():
            if row["key"] not in crops:
                continue
            tar.seek(row["offset"])
            image = codec.decode(tar.read(row["bytes"]), limits, known=True).image
            crop = crops[row["key"]]
            batch.append(image if crop is None else image.crop(tuple(crop)))
            keys.append(row["key"])
            if len(batch) == BATCH:
                vectors.append(embedder(batch))
                batch = []
    if batch:
        vectors.append(embedder(batch))
    return keys, np.concatenate(vectors) if keys else np.empty((0, 0), dtype=np.float32)


def read(workspace: Workspace, parts: int, keys: pa.Array) -> Vectors:
    """Embeddings of n images by key, shape (n, d); a row of zeros for an image without one."""
    paths = [workspace.path(f"features/embeddings-part-{part:05d}.parquet") for part in range(parts)]
    table = parquet.read_many(paths, EMBEDDINGS)
    flat = pc.list_flatten(table["embedding"]).to_numpy()
    vectors = flat.reshape(len(table), -1) if len(table) else np.empty((0, 1), dtype=np.float32)
    rows = pc.index_in(keys, value_set=table["key"].combine_chunks().cast(keys.type))
    has_embedding = rows.is_valid().to_numpy(zero_copy_only=False)
    embeddings = np.zeros((len(keys), vectors.shape[1]), dtype=np.float32)
    embeddings[has_embedding] = vectors[rows.drop_null().to_numpy()]
    return embeddings


def _code(recipe: Recipe) -> str:
    """Versions of the code that embeddings depend on."""
    used = []
    for name in ("torch", "onnxruntime") if recipe.duplicates.embedding.model == "sscd" else ("timm", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            used.append(f"{name}-{version(name)}")
    return "/".join(["embed-1", f"pillow-{PIL.__version__}", *used])


def _params(recipe: Recipe) -> str:
    settings = recipe.duplicates.embedding
    weights = settings.weights
    if settings.model == "sscd" and weights == "pretrained":
        weights = model_files.digest(model_files.path_of("sscd"))
    elif weights not in ("pretrained", "random"):
        try:
            weights = sha256_file(Path(weights))
        except OSError as error:
            raise UsageError(f"duplicates.embedding.weights: cannot read {weights} ({error.strerror})") from None
    limits = {name: getattr(recipe.filter, name) for name in ("max_side", "max_pixels")}
    return params_digest({"model": settings.model, "weights": weights, "limits": limits})
