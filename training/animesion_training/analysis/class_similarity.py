"""How similar classes are to a network: by what it confuses, and by the mean embeddings of their images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from animesion_training.analysis.predictions import Predictions
from animesion_training.eval.similarity import prototypes


@dataclass(frozen=True, eq=False)
class ClassSimilarity:
    """Similarity of the classes that have images in a split; all arrays are in the order of `ids`.

    Attributes:
        ids: class ids, ascending, (K,).
        counts: images of each, (K,).
        confusion: share of the images of the class of a row that are named as the class of a column, (K, K); rows sum
            to less than 1 where a class without images is guessed.
        cosines: of the mean embeddings, (K, K); (0, 0) for a network without embeddings.
    """

    ids: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    confusion: npt.NDArray[np.float64]
    cosines: npt.NDArray[np.float64]

    def pairs(self, most: int = 200) -> list[tuple[int, int, float, float | None]]:
        """Pairs of different classes: ids, share of confused images of both in either direction, and cosine.

        The largest cosines are first; of a network without embeddings, the largest confusions.
        """
        count = len(self.ids)
        first, second = np.triu_indices(count, 1)
        both = self.counts[first] + self.counts[second]
        wrong = self.confusion * self.counts[:, None]
        confused = (wrong[first, second] + wrong[second, first]) / both
        cosines = self.cosines[first, second] if self.cosines.size else None
        order = np.lexsort((-confused,) if cosines is None else (-confused, -cosines))[:most]
        return [
            (
                int(self.ids[first[i]]),
                int(self.ids[second[i]]),
                float(confused[i]),
                None if cosines is None else float(cosines[i]),
            )
            for i in order.tolist()
        ]

    def order(self) -> list[int]:
        """An order of rows in which similar classes are next to each other, by average-linkage clustering."""
        from scipy.cluster.hierarchy import leaves_list, linkage
        from scipy.spatial.distance import squareform

        count = len(self.ids)
        if count < 3:
            return list(range(count))
        similar = self.cosines if self.cosines.size else (self.confusion + self.confusion.T) / 2
        distance = np.clip(1 - similar, 0, None)
        distance = (distance + distance.T) / 2
        np.fill_diagonal(distance, 0)
        leaves: list[int] = leaves_list(linkage(squareform(distance, checks=False), "average")).tolist()
        return leaves


def class_similarity(found: Predictions) -> ClassSimilarity:
    """Compute the similarity of the classes of a split from its predictions."""
    ids, rows = np.unique(found.labels, return_inverse=True)
    counts = np.bincount(rows)
    guessed = found.guesses[:, 0]
    among = np.isin(guessed, ids)
    confusion = np.zeros((len(ids), len(ids)), dtype=np.float64)
    np.add.at(confusion, (rows[among], np.searchsorted(ids, guessed[among])), 1)
    means = prototypes(found.vectors, found.labels, ids).astype(np.float64)
    cosines = means @ means.T if means.shape[1] else np.zeros((0, 0))
    return ClassSimilarity(ids, counts.astype(np.int64), confusion / counts[:, None], cosines)
