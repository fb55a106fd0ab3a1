"""Top-k classes or tags of trained weights for image files and folders, or for the faces in the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from animesion.images import given
from animesion.schemas import TAG_CATEGORIES
from animesion_training.distributed import DistributedContext
from animesion_training.eval.pieces import FaceCrop, batches, load_detector, pieces
from animesion_training.eval.reading import Reading
from animesion_training.eval.tag_metrics import DEFAULT_THRESHOLD
from animesion_training.text.facts import read_facts
from animesion_training.text.tokenizer import TagTokenizer
from animesion_training.tokens.tag_text import TagText
from animesion_training.weights import WeightsCard, load_model

#: Guesses of a classifier for each image.
_TOP = 5


@dataclass(frozen=True)
class Prediction:
    """Predictions for one image or face.

    Attributes:
        path: path or URL of the image, or `-`.
        guesses: class names and probabilities, most probable first; empty when there is a problem, and for taggers.
        tags: of a tagger: tags and probabilities by category, most probable first. Of a network that reads tags and
            predicts masked ones (ViLT): the tags that it expects, with the number of places that expect them, at most
            1; the key is the categories that it reads. Empty for others, and when there is a problem.
        problem: why the image cannot be read, or that it contains no face; empty without a problem.
        box: the face with its margin: left, top, right, bottom in pixels of the upright image.
        score: score of the face by the detector.
    """

    path: str
    guesses: tuple[tuple[str, float], ...] = ()
    tags: Mapping[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    problem: str = ""
    box: tuple[int, int, int, int] | None = None
    score: float = 0.0


def predict(
    weights: Path,
    images: Iterable[given.Given],
    context: DistributedContext,
    *,
    top: int | None = None,
    batch_size: int = 32,
    faces: FaceCrop | None = None,
) -> Iterator[Prediction]:
    """Predict the classes of images, or their tags, in their order.

    Tags are those whose probability reaches their threshold in the weights, or 0.5 if the weights have none.

    Args:
        weights: a run, or a weights file or checkpoint that describes its network.
        images: see `animesion.images.given.read`.
        context: device to compute on.
        top: number of guesses per image, at most the number of classes, and of the tags that a network that reads
            tags expects; 5 if it is None. For a tagger, the most tags of each category; all that reach their threshold
            if it is None.
        batch_size: images per batch.
        faces: how to crop faces; predictions are then of faces, several per image possible. None for whole images.

    Raises:
        UsageError: an image whose path does not exist, unusable weights, or a detector that is not ready.
    """
    detector = load_detector(faces)
    model, card = load_model(weights)
    model = model.to(context.device)
    reading, expected = Reading.of(card, weights), _Expected.of(model, card, weights)
    names = card.classes or tuple(str(i) for i in range(card.num_classes))
    found = (piece for image in images for piece in pieces(image, detector, faces))
    for chosen, problems, normalised in batches(found, reading, context.device, batch_size):
        with torch.inference_mode():
            logits, tags = expected(normalised, top or _TOP) if expected else (model(normalised), [{}] * len(chosen))
            logits = logits.float()
        if card.is_tagger:
            every = [Prediction("", tags=_tags(card, row, top)) for row in logits.sigmoid().tolist()]
        else:
            best = logits.softmax(1).topk(min(top or _TOP, card.num_classes))
            every = [
                Prediction("", tuple((names[i], value) for i, value in zip(ids, values, strict=True)), each)
                for values, ids, each in zip(best.values.tolist(), best.indices.tolist(), tags, strict=True)
            ]
        for piece, problem, one in zip(chosen, problems, every, strict=True):
            if problem:
                yield Prediction(piece.name, problem=problem, box=piece.box, score=piece.score)
            else:
                yield replace(one, path=piece.name, box=piece.box, score=piece.score)


@dataclass(frozen=True)
class _Expected:
    """The tags that a network expects beside an image, all of which are masked: those of its masked-language head.

    Attributes:
        model: the network.
        plugin: its part that reads tags.
        tokenizer: of its vocabulary.
        categories: that it reads.
    """

    model: nn.Module
    plugin: TagText
    tokenizer: TagTokenizer
    categories: str

    @classmethod
    def of(cls, model: nn.Module, card: WeightsCard, weights: Path) -> _Expected | None:
        """None for a network that reads no tags, predicts none, or does not name them."""
        plugin = getattr(model, "tags", None)
        if not isinstance(plugin, TagText) or plugin.tagger is None:
            return None
        names, categories = read_facts(card.facts, str(weights))
        if not names:
            return None
        return cls(model, plugin, TagTokenizer(names, plugin.length), ", ".join(categories) or "tags")

    def __call__(self, images: Tensor, top: int) -> tuple[Tensor, list[dict[str, tuple[tuple[str, float], ...]]]]:
        """Logits of the classes of a batch (B, C), and the most expected tags of each image."""
        logits, tag_logits = self.model(images, with_tags=True)
        masked = self.plugin.unknown.expand(len(images), -1)
        return logits, [{self.categories: tuple(tags)} for tags in self.tokenizer.read(tag_logits, masked, top)]


def _tags(card: WeightsCard, values: Sequence[float], top: int | None) -> dict[str, tuple[tuple[str, float], ...]]:
    """The tags of an image that reach their thresholds, by category."""
    thresholds = card.thresholds or (DEFAULT_THRESHOLD,) * card.num_classes
    found: dict[str, list[tuple[str, float]]] = {category: [] for category in card.tag_categories}
    for name, category, value, threshold in zip(card.classes, card.categories, values, thresholds, strict=True):
        if value >= threshold:
            found[category].append((name, value))
    ordered = {name: sorted(found[name], key=lambda tag: -tag[1])[:top] for name in TAG_CATEGORIES if name in found}
    return {name: tuple(tags) for name, tags in ordered.items()}
