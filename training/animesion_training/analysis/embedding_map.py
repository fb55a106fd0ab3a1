"""Embeddings of images as points of a plane, by t-SNE; images with similar embeddings are near each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from animesion.errors import UsageError

#: Number of neighbours that count as near, in the words of t-SNE its perplexity.
PERPLEXITY = 30.0


def tsne(vectors: npt.NDArray[np.float32], *, seed: int = 0) -> npt.NDArray[np.float32]:
    """Place embeddings in the plane (van der Maaten and Hinton, JMLR 2008; Barnes-Hut, JMLR 2014).

    It starts from the two principal components (Kobak and Berens, Nature Communications 2019), and distances are
    Euclidean, which order vectors of length 1 as their cosines do. At most 50 principal components are used.

    Args:
        vectors: (N, D), N >= 4.
        seed: of the randomised principal components.

    Returns:
        (N, 2), in -1 to 1, with the aspect ratio of the result.

    Raises:
        UsageError: fewer than four images, or scikit-learn is not installed.
    """
    if len(vectors) < 4:
        raise UsageError(f"a map needs at least four images, not {len(vectors)}")
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ModuleNotFoundError:
        raise UsageError(
            "a map of embeddings needs scikit-learn: pip install 'animesion[explain]', or leave it out with --no-map"
        ) from None
    components = min(50, *vectors.shape)
    if components < vectors.shape[1]:
        vectors = PCA(components, random_state=seed).fit_transform(vectors)
    if not np.ptp(vectors, axis=0).any():
        raise UsageError("all embeddings are equal, so there is no map of them")
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    place = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors)
    place = place - (place.max(0) + place.min(0)) / 2
    found: npt.NDArray[np.float32] = (place / np.abs(place).max()).astype(np.float32)
    return found
