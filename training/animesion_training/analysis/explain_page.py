"""Collect the data of the page of `animesion explain`, which `animesion.report.page` renders."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from animesion.report.facts import clip
from animesion.report.images import Album, encoded
from animesion_training.analysis.class_similarity import ClassSimilarity
from animesion_training.analysis.explain import Explained
from animesion_training.analysis.layers import LayerSimilarity
from animesion_training.analysis.predictions import Predictions

#: Longest side of the pictures of an explained image, in pixels.
SIDE = 224

#: Most classes in a matrix, and pairs in a table.
CLASSES, PAIRS = 40, 200

#: A page can be as large as it takes; the album counts bytes against this.
_NO_LIMIT = 1 << 40

#: Steps of a coordinate from the middle of the map to its edge.
_STEPS = 5000

_QUALITY = 65


@dataclass(frozen=True)
class Distances:
    """Mean attention distances, see `layers.mean_attention_distance`.

    Attributes:
        values: in pixels, (blocks, heads).
        pixels: side of the images.
        images: their number.
    """

    values: Tensor
    pixels: int
    images: int


class PageData:
    """The parts of a page, each added by a method.

    Args:
        title: title of the page.
        network: what the network is, in words.
        about: what data it is about; empty for single images.
        method: the sentence on the method of the maps.
    """

    def __init__(self, title: str, network: str, about: str, method: str) -> None:
        self._album = Album()
        self._data: dict[str, Any] = {
            "kind": "explain",
            "name": clip(title),
            "title": clip(title),
            "network": clip(network),
            "about": clip(about),
            "method": method,
            "rows": [],
            "mistakes": None,
            "map": None,
            "classes": None,
            "layers": None,
        }

    def rows(self, rows: Sequence[Explained]) -> None:
        """Add explained images."""
        self._data["rows"] = [self._row(row) for row in rows]

    def mistakes(self, found: Predictions, explained: Callable[[int], Explained | None], most: int) -> None:
        """Add the most confident wrong predictions, by pair of classes.

        Args:
            found: predictions for the split.
            explained: the explained image at a position; None for one without a map.
            most: upper limit of images.
        """
        wrong = found.wrong
        shown = set(wrong[:most].tolist())
        groups: list[dict[str, Any]] = []
        for true, guessed, rows in found.confused():
            items = [self._row(each) for i in rows if i in shown and (each := explained(i)) is not None]
            if items:
                groups.append(
                    {
                        "label": clip(found.classes[true]),
                        "guess": clip(found.classes[guessed]),
                        "count": len(rows),
                        "more": len(rows) - len(items),
                        "items": items,
                    }
                )
        self._data["mistakes"] = {
            "images": len(found),
            "wrong": len(wrong),
            "shown": sum(len(group["items"]) for group in groups),
            "groups": groups,
        }

    def map(self, found: Sequence[Predictions], places: npt.NDArray[np.float32], method: str) -> None:
        """Add a map of the embeddings of splits.

        Args:
            found: predictions for the splits, with thumbnails.
            places: (N, 2) in -1 to 1, of the images of all splits one after another.
            method: how they were placed, in words.
        """
        steps = np.rint(places * _STEPS).astype(np.int64)
        classes = found[0].classes
        self._data["map"] = {
            "unit": _STEPS,
            "method": method,
            "x": steps[:, 0].tolist(),
            "y": steps[:, 1].tolist(),
            "label": [int(each) for part in found for each in part.labels],
            "guess": [int(each) for part in found for each in part.guesses[:, 0]],
            "split": [i for i, part in enumerate(found) for _ in range(len(part))],
            "image": [self._picture(each) for part in found for each in part.thumbnails],
            "keys": [clip(key) for part in found for key in part.keys],
            "classes": [clip(name) for name in classes],
            "splits": [clip(part.split) for part in found],
        }

    def classes(self, found: ClassSimilarity, names: Sequence[str]) -> None:
        """Add the similarity of classes; of many, those in the most similar pairs."""
        pairs = found.pairs(PAIRS)
        chosen: dict[int, None] = {}
        for one, other, _, _ in pairs if len(found.ids) > CLASSES else []:
            if len(chosen) < CLASSES - 1:
                chosen |= dict.fromkeys((one, other))
        rows = [i for i in found.order() if not chosen or int(found.ids[i]) in chosen]
        cosines = found.cosines[np.ix_(rows, rows)] if found.cosines.size else np.zeros((0, 0))
        self._data["classes"] = {
            "names": [clip(names[found.ids[i]]) for i in rows],
            "total": len(found.ids),
            "cosines": np.round(cosines, 4).tolist(),
            "confusion": np.round(found.confusion[np.ix_(rows, rows)], 4).tolist(),
            "pairs": [
                [clip(names[one]), clip(names[other]), round(confused, 4), None if cosine is None else round(cosine, 4)]
                for one, other, confused, cosine in pairs
            ],
        }

    def layers(self, cka: LayerSimilarity | None, one: str, other: str, distance: Distances | None) -> None:
        """Add the similarity of layers and attention distances, where there are any."""
        if cka is None and distance is None:
            return
        self._data["layers"] = {
            "cka": None
            if cka is None
            else {
                "one": clip(one),
                "other": clip(other),
                "rows": [clip(name) for name in cka.rows],
                "columns": [clip(name) for name in cka.columns],
                "values": [[None if v is None else round(v, 4) for v in row] for row in cka.values],
                "images": cka.images,
            },
            "distance": None
            if distance is None
            else {
                "values": [[round(v, 2) for v in row] for row in distance.values.tolist()],
                "pixels": distance.pixels,
                "images": distance.images,
            },
        }

    @property
    def json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {**self._data, "images": self._album.images}

    def _row(self, row: Explained) -> dict[str, Any]:
        return {
            "name": clip(row.name),
            "label": clip(row.label),
            "target": clip(row.target),
            "problem": clip(row.problem),
            "guesses": [[clip(name), round(p, 4)] for name, p in row.guesses],
            "panels": [[panel.title, self._picture(panel.pixels, side=SIDE)] for panel in row.panels],
            "neighbours": [
                {
                    "key": clip(each.key),
                    "label": clip(each.label),
                    "similarity": round(each.similarity, 4),
                    "image": self._picture(each.pixels, side=SIDE),
                }
                for each in row.neighbours
            ],
        }

    def _picture(self, pixels: npt.NDArray[np.uint8], side: int = 0) -> int:
        image = Image.fromarray(pixels)
        if side:
            return self._album.add(encoded(image, side), _NO_LIMIT)
        content = io.BytesIO()
        image.save(content, "WEBP", quality=_QUALITY, method=2)  # thousands of them: faster, a little larger
        return self._album.add(content.getvalue(), _NO_LIMIT)
