"""Galleries: embeddings of known images with the names of their classes, in one file, to identify new images by.

A gallery is of one network: its card has the digest of the weights, and other weights are refused. The file is
safetensors, so that reading it runs no code; it comes from untrusted sources, and everything in it is checked. Images
become embeddings in `eval.identify`, the commands are `gallery` and `identify`.

An image is compared with the mean embedding of each class (as in Snell et al., "Prototypical Networks for Few-shot
Learning", NeurIPS 2017, arXiv 1703.05175). It is unknown if its similarity to all of them is below the threshold, see
`fit_threshold`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from animesion.errors import UsageError
from animesion.storage.workspace import atomic_file
from animesion_training.eval.similarity import FloatArray, IntArray, Threshold, area, prototypes, quantile_above
from animesion_training.eval.tta import TTA

FORMAT = 1
_KEY = "animesion_gallery"
_LARGEST_HEADER = 64 << 20  # bytes
_MOST_IMAGES, _MOST_CLASSES, _WIDEST = 5_000_000, 1_000_000, 1 << 17
_LONGEST_NAME = 1000  # characters


@dataclass(frozen=True)
class GalleryCard:
    """The description of a gallery.

    Attributes:
        network: name of the network.
        digest: SHA-256 of its weights, see `eval.embed.network_digest`.
        weights: path of the weights, relative to the folder of the gallery.
        img_size: side of the images in pixels.
        crop_pct: share of that side that is cropped.
        views: views whose embeddings are averaged, see `eval.tta.predict`.
        classes: names by class id.
        images: name of each image.
        threshold: similarity below which an image is unknown.
        rule: how the threshold was chosen.
        fitted: what it was fitted on; empty if it was given.
        format: version of the format.
    """

    network: str
    digest: str
    weights: str
    img_size: int
    crop_pct: float
    views: str
    classes: tuple[str, ...]
    images: tuple[str, ...]
    threshold: float
    rule: str
    fitted: str
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class Gallery:
    """A gallery in memory.

    Attributes:
        card: its description.
        vectors: embedding of each image, (N, D), float32, rows of length 1.
        labels: class id of each image, (N,).
    """

    card: GalleryCard
    vectors: FloatArray
    labels: IntArray

    @property
    def counts(self) -> IntArray:
        """Images of each class, (C,)."""
        return np.bincount(self.labels, minlength=len(self.card.classes)).astype(np.int64)

    def prototypes(self) -> FloatArray:
        """The mean embedding of each class, of length 1, (C, D)."""
        return prototypes(self.vectors, self.labels, np.arange(len(self.card.classes), dtype=np.int64))

    def add(self, vectors: FloatArray, names: Sequence[str], images: Sequence[str]) -> Gallery:
        """Return a gallery with further images; the threshold stays.

        Args:
            vectors: their embeddings, (M, D), rows of length 1.
            names: class of each; new names become new classes.
            images: name of each.

        Raises:
            UsageError: an embedding is in the gallery already, under whatever class.
        """
        for image, vector in zip(images, vectors, strict=True):
            alike = np.flatnonzero((self.vectors @ vector) > 1 - 1e-6)
            if len(alike):
                i = int(alike[0])
                raise UsageError(
                    f"{image} is in the gallery already, as {self.card.images[i]} of "
                    f"{self.card.classes[self.labels[i]]!r}: leave it out"
                )
        classes = tuple(dict.fromkeys((*self.card.classes, *names)))
        ids = {name: i for i, name in enumerate(classes)}
        labels = np.concatenate((self.labels, np.array([ids[name] for name in names], dtype=np.int64)))
        card = replace(self.card, classes=classes, images=(*self.card.images, *images))
        return Gallery(card, np.concatenate((self.vectors, vectors)), labels)

    def with_threshold(self, threshold: Threshold) -> Gallery:
        """The same gallery with another threshold."""
        card = replace(self.card, threshold=threshold.value, rule=threshold.rule, fitted=threshold.split)
        return replace(self, card=card)


@dataclass(frozen=True)
class Match:
    """A class of a gallery that an image resembles.

    Attributes:
        name: of the class.
        similarity: cosine of the image and the mean of the class, -1..1.
        images: number of its images in the gallery.
        nearest: name of the most similar of them.
    """

    name: str
    similarity: float
    images: int
    nearest: str


def matches(gallery: Gallery, vectors: FloatArray, top: int) -> list[tuple[Match, ...]]:
    """Find the most similar classes of images, best first.

    Args:
        gallery: the gallery.
        vectors: embeddings of images, (B, D), rows of length 1.
        top: classes for each, at most all.
    """
    to_classes = vectors @ gallery.prototypes().T
    counts = gallery.counts
    found = []
    for vector, scores in zip(vectors, to_classes, strict=True):
        best = np.argsort(-scores, kind="stable")[:top].tolist()
        own = gallery.vectors @ vector
        each = []
        for c in best:
            rows = np.flatnonzero(gallery.labels == c)
            nearest = gallery.card.images[int(rows[own[rows].argmax()])]
            each.append(Match(gallery.card.classes[c], float(scores[c]), int(counts[c]), nearest))
        found.append(tuple(each))
    return found


@dataclass(frozen=True)
class Fit:
    """A fitted threshold and what it does on the images that it was fitted on.

    Attributes:
        threshold: see there.
        images: of unknown classes, each compared with all classes but its own.
        recognised: share of images of known classes that are accepted under their right name; None without any.
        auroc: probability that an image of a known class is more similar to it than one of an unknown class to any;
            None likewise.
    """

    threshold: Threshold
    images: int
    recognised: float | None
    auroc: float | None


def fit_threshold(
    gallery: Gallery,
    vectors: FloatArray,
    names: Sequence[str],
    split: str,
    *,
    false_accept: float,
    inside: IntArray | None = None,
) -> Fit:
    """Choose the threshold at which a share of the images of unknown classes gets a name.

    Each image plays one of an unknown class: its own class is left out, and its similarity to the nearest other class
    counts. The result is therefore for this number of classes: among many, a stranger resembles one more closely.

    Args:
        gallery: the gallery.
        vectors: embeddings of images with known classes, (M, D), rows of length 1.
        names: class of each; it may be in the gallery or not.
        split: what they are, for the card.
        false_accept: the share, 0..1.
        inside: row of the gallery that each image is, (M,), so that it is left out of its class; None for others.

    Raises:
        UsageError: there is no other class to compare an image with.
    """
    ids = {name: i for i, name in enumerate(gallery.card.classes)}
    own = np.array([ids.get(name, -1) for name in names], dtype=np.int64)
    scores = vectors @ gallery.prototypes().T  # (M, C)
    known = own >= 0
    others = scores.copy()
    others[known, own[known]] = -np.inf
    strangers = others.max(1, initial=-np.inf)
    if not len(vectors) or not np.isfinite(strangers).all():
        raise UsageError(
            "the threshold of unknown images is fitted with one class left out, and the gallery has no other: add a "
            "class, fit it on other data with --fit-data, or give --threshold"
        )
    value = quantile_above(strangers, false_accept)
    threshold = Threshold(value, f"{false_accept:.1%} of images of unknown classes get a name", split)
    mine = _own_scores(gallery, vectors, own, inside)
    rows = np.isfinite(mine)
    if not rows.any():
        return Fit(threshold, len(vectors), None, None)
    right = (mine >= value) & (mine >= strangers)
    return Fit(threshold, len(vectors), float(right[rows].mean()), area(mine[rows], strangers))


def _own_scores(gallery: Gallery, vectors: FloatArray, own: IntArray, inside: IntArray | None) -> FloatArray:
    """Similarity of each image to the mean of its class without the image itself, (M,); -inf without such a mean."""
    sums = np.zeros((len(gallery.card.classes), vectors.shape[1]), dtype=np.float64)
    np.add.at(sums, gallery.labels, gallery.vectors)
    counts = gallery.counts
    result = np.full(len(vectors), -np.inf, dtype=np.float32)
    for i in np.flatnonzero(own >= 0).tolist():
        total, left = sums[own[i]], int(counts[own[i]])
        if inside is not None:
            total, left = total - gallery.vectors[inside[i]], left - 1
        length = float(np.linalg.norm(total))
        if left and length > 0:
            result[i] = vectors[i] @ total / length
    return result


# -- the file --------------------------------------------------------------------------------------------------------


def save(gallery: Gallery, path: Path) -> None:
    """Write a gallery, atomically.

    Raises:
        UsageError: names that a gallery cannot have.
    """
    problem = _problem(gallery.card, len(gallery.vectors))
    if problem:
        raise UsageError(f"the gallery cannot be written: {problem}")
    count, width = gallery.vectors.shape
    ends = (count * width * 4, count * width * 4 + count * 8)
    header = {
        "__metadata__": {_KEY: json.dumps(asdict(gallery.card), ensure_ascii=False, sort_keys=True)},
        "vectors": {"dtype": "F32", "shape": [count, width], "data_offsets": [0, ends[0]]},
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": list(ends)},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise UsageError(f"the gallery cannot be written: the names take more than {_LARGEST_HEADER >> 20} MiB")
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(gallery.vectors.astype("<f4").tobytes())
        file.write(gallery.labels.astype("<i8").tobytes())


def load(path: Path) -> Gallery:
    """Read a gallery.

    Raises:
        UsageError: the file does not exist, is no gallery, or is damaged.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UsageError(f"{path} is not a gallery, but a folder: `animesion gallery build` makes one from a run")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise UsageError(f"{path} is not a gallery: it does not start with a safetensors header")
            header = json.loads(file.read(length))
            card = _card(header, path)
            count, width = _shape(header, len(card.images), size - 8 - length, path)
            vectors = np.frombuffer(file.read(count * width * 4), dtype="<f4").reshape(count, width)
            labels = np.frombuffer(file.read(count * 8), dtype="<i8")
    except OSError as error:
        raise UsageError(f"cannot read the gallery {path}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not a gallery: its header is not JSON, or the file is truncated") from None
    # checked before they are counted: a count is as long as the largest label
    within = len(labels) > 0 and labels.min() >= 0 and labels.max() < len(card.classes)
    if not within or not np.bincount(labels, minlength=len(card.classes)).all():
        raise UsageError(f"{path} is damaged: its images and its {len(card.classes):,} classes do not fit together")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not np.isfinite(lengths).all() or np.abs(lengths - 1).max() > 1e-3:
        raise UsageError(f"{path} is damaged: its embeddings do not all have length 1")
    return Gallery(card, vectors.astype(np.float32), labels.astype(np.int64))


def _card(header: Any, path: Path) -> GalleryCard:
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"{path} is not a gallery: write one with `animesion gallery build`")
    values = json.loads(text)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UsageError(f"{path} is a gallery of format {str(found)[:20]!r}, and this version reads {FORMAT}")
    fields = {
        "network": str, "digest": str, "weights": str, "img_size": int, "crop_pct": float, "views": str,
        "classes": list, "images": list, "threshold": float, "rule": str, "fitted": str, "format": int,
    }  # fmt: skip
    for name, kind in fields.items():
        value = values.get(name)
        if kind is float and type(value) is int:
            values[name] = value = float(value)
        if type(value) is not kind:
            raise UsageError(f"{path} is damaged: {name} in its card is no {kind.__name__}")
    if unknown := sorted(values.keys() - fields.keys()):
        raise UsageError(f"{path} is damaged: its card has {unknown[0][:40]!r}, which no gallery has")
    card = GalleryCard(**{**values, "classes": tuple(values["classes"]), "images": tuple(values["images"])})
    if problem := _problem(card, len(card.images)):
        raise UsageError(f"{path} is damaged: {problem}")
    return card


def _problem(card: GalleryCard, count: int) -> str:
    """What is wrong with a card, or an empty string."""
    names = (*card.classes, *card.images, card.network, card.weights, card.rule, card.fitted)
    for name in names:
        # names are printed: control characters could be commands of a terminal
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
            return f"{str(name)[:60]!r} is no name: up to {_LONGEST_NAME} printable characters"
    if not all(card.classes) or len(set(card.classes)) < len(card.classes):
        return "a class has no name, or two have the same"
    if not 1 <= len(card.classes) <= _MOST_CLASSES or not 1 <= count <= _MOST_IMAGES or len(card.images) != count:
        return f"it has {count:,} images of {len(card.classes):,} classes"
    if len(card.digest) != 64 or not set(card.digest) <= set("0123456789abcdef"):
        return "the digest of its weights is no SHA-256"
    if card.views not in get_args(TTA):
        return f"views are {card.views[:40]!r}"
    numbers = {"img_size": (1, 8192), "crop_pct": (1e-6, 1), "threshold": (-1.001, 1.001)}
    for name, (low, high) in numbers.items():
        value = getattr(card, name)
        if not math.isfinite(value) or not low <= value <= high:
            return f"{name} is {value!r}"
    return ""


def _shape(header: dict[str, Any], count: int, room: int, path: Path) -> tuple[int, int]:
    """Check the entries of the two tensors, and return the shape of the first."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    vectors = entries.get("vectors")
    shape = vectors.get("shape") if isinstance(vectors, dict) else None
    width = shape[1] if isinstance(shape, list) and len(shape) == 2 else 0
    if type(width) is not int or not 1 <= width <= _WIDEST:
        raise UsageError(f"{path} is damaged: it has no embeddings of 1 to {_WIDEST:,} numbers")
    ends = (count * width * 4, count * width * 4 + count * 8)
    expected = {
        "vectors": {"dtype": "F32", "shape": [count, width], "data_offsets": [0, ends[0]]},
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": list(ends)},
    }
    if entries != expected or ends[1] != room:
        raise UsageError(f"{path} is damaged: its tensors are not those of {count:,} images")
    return count, width


def mismatch(card: GalleryCard, digest: str, network: str) -> str:
    """Why a network cannot be used with a gallery; empty if it is the one that made it."""
    if card.digest == digest:
        return ""
    return (
        f"the gallery was made with other weights ({card.network}, {card.digest[:12]}) than these ({network}, "
        f"{digest[:12]}), whose embeddings are not comparable: give those of the gallery, or build it again"
    )
