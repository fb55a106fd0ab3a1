"""Predictions for every image of a split: guesses, losses and embeddings, their table, and the wrong ones by pair."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.dataset import text_tables
from animesion.errors import AnimesionError, UsageError
from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.eval.reading import Reading
from animesion_training.eval.similarity import FloatArray, IntArray
from animesion_training.models.cal import CALClassifier
from animesion_training.models.create import bare
from animesion_training.models.embedding import FeatureTap
from animesion_training.weights import WeightsCard


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for a split, in its order.

    Attributes:
        split: name of the split.
        classes: names by class id.
        keys: of the images, N of them.
        labels: class ids, (N,).
        guesses: class ids, most probable first, (N, k).
        scores: their probabilities, (N, k).
        losses: cross-entropy of the label in nats, (N,).
        vectors: embeddings of length 1, (N, D); (N, 0) for a network without embeddings.
        thumbnails: the images as the network sees them, (N, t, t, 3) uint8; t is 0 where none were asked for.
    """

    split: str
    classes: tuple[str, ...]
    keys: Sequence[str]
    labels: IntArray
    guesses: IntArray
    scores: FloatArray
    losses: FloatArray
    vectors: FloatArray
    thumbnails: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def wrong(self) -> IntArray:
        """Positions of the images with a wrong first guess, most confident first."""
        wrong = np.flatnonzero(self.guesses[:, 0] != self.labels)
        return wrong[np.lexsort((wrong, -self.scores[wrong, 0]))]

    def confused(self) -> list[tuple[int, int, list[int]]]:
        """Pairs of classes (true, guessed) with the positions of their images.

        The pair with the most images is first, then the more confident one; in a pair, the most confident is first.
        """
        pairs: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in self.wrong.tolist():
            pairs[int(self.labels[i]), int(self.guesses[i, 0])].append(i)
        ordered = sorted(pairs.items(), key=lambda pair: (-len(pair[1]), -self.scores[pair[1][0], 0], pair[0]))
        return [(true, guessed, rows) for (true, guessed), rows in ordered]

    def to_csv(self) -> str:
        """One line per image, in the order of the split.

        Columns: `key`, `label`, `guess_1` to `guess_k`, `score_1` to `score_k` (probabilities), `correct` (`true` or
        `false`) and `loss` (cross-entropy in nats).
        """
        count = self.guesses.shape[1]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                "key",
                "label",
                *(f"guess_{i + 1}" for i in range(count)),
                *(f"score_{i + 1}" for i in range(count)),
                "correct",
                "loss",
            ]
        )
        names = [text_tables.cell_of(name) for name in self.classes]
        for i, key in enumerate(self.keys):
            writer.writerow(
                [
                    text_tables.cell_of(key),
                    names[self.labels[i]],
                    *(names[guess] for guess in self.guesses[i].tolist()),
                    *(f"{score:.6f}" for score in self.scores[i].tolist()),
                    "true" if self.guesses[i, 0] == self.labels[i] else "false",
                    f"{self.losses[i]:.6f}",
                ]
            )
        return text.getvalue()


def predict_split(
    model: nn.Module,
    card: WeightsCard,
    data: DataSplits,
    split: str,
    context: DistributedContext,
    *,
    top: int = 5,
    batch_size: int = 128,
    thumbnails: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Predictions:
    """Predict every image of a split, with embeddings where the network has them.

    Args:
        model: in evaluation mode, on the device of the context.
        card: of its weights.
        data: with the classes of the network.
        split: name of the split.
        context: device to compute on, one process.
        top: number of guesses, at most the number of classes.
        batch_size: images per batch.
        thumbnails: longest side of thumbnails in pixels, 0 for none.
        advance: called with the number of images of each batch.

    Raises:
        UsageError: a network with images that are not square.
        AnimesionError: an image cannot be read, or outputs are not finite.
    """
    reading = Reading.of(card, "the network", batch_size=batch_size, advance=advance)
    tap = _tap(model)
    cal = isinstance(bare(model), CALClassifier)
    rows: list[list[np.ndarray]] = []
    with torch.inference_mode():
        for x, batch in reading.outputs(lambda images, batch: images, data, split, context):
            labels = batch.labels.to(context.device)
            with tap or nullcontext():
                logits = model(x).float()
            if not logits.isfinite().all():
                raise AnimesionError("the outputs of the network are not finite: use other weights")
            vectors = torch.zeros(len(x), 0)
            if tap is not None:
                try:
                    vectors = functional.normalize(tap.take().float(), dim=1)
                except UsageError:  # several vectors of an image
                    tap = None
                    rows = [[*row[:-1], np.zeros((len(row[0]), 0), dtype=np.float32)] for row in rows]
            elif cal:
                vectors = bare(model).forward_features(x)  # type: ignore[operator]
            best = logits.softmax(1).topk(min(top, logits.shape[1]))
            losses = functional.cross_entropy(logits, labels, reduction="none")
            values = (
                batch.indices,
                batch.labels,
                best.indices,
                best.values,
                losses,
                _small(batch.images, thumbnails),
                vectors,
            )
            rows.append([each.cpu().numpy() for each in values])
    joined = [np.concatenate(each) for each in zip(*rows, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    indices, labels_, guesses, scores, losses_, small, found = (each[order] for each in joined)
    samples = data.select(split)
    keys = [samples.keys[i] for i in indices.tolist()]
    return Predictions(split, data.classes, keys, labels_, guesses, scores, losses_, found.astype(np.float32), small)


def _small(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, S, S) uint8 as thumbnails (B, t, t, 3) uint8."""
    if not side:
        return torch.zeros(len(images), 0, 0, 3, dtype=torch.uint8)
    side = min(side, images.shape[-1])
    shrunk = functional.interpolate(images.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
    return shrunk.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def _tap(model: nn.Module) -> FeatureTap | None:
    """Reads the embeddings during the forward pass; None for a network that has them elsewhere, or has none."""
    if isinstance(bare(model), CALClassifier):  # its head is not called as a module
        return None
    try:
        return FeatureTap(model)
    except UsageError:
        return None
