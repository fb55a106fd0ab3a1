"""Heads that read all patches: average, bilinear (B-CNN, low-rank, improved) and covariance pooling (MPN-COV).

They are heads of a `TokenVisionTransformer` with `reads="patches"`. Heads that read one feature are in `models.heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.options import whole_number
from animesion_training.tokens.autocast import without_autocast
from animesion_training.tokens.feature_head import FeatureHead

#: Name -> description.
PATCH_HEADS = {
    "pool": "one linear layer on the mean of the patches",
    "blp": "bilinear pooling (Lin et al., ICCV 2015)",
    "lrblp": "bilinear pooling of 64 projected channels (Kong and Fowlkes, CVPR 2017)",
    "iblp": "bilinear pooling with a matrix square root (Lin and Maji, BMVC 2017)",
    "mpncov": "covariance pooling of 64 projected channels with a matrix square root (Li et al., CVPR 2018)",
}

#: Keeps the gradient of the signed square root finite at 0.
_ROOT_EPS = 1e-10
#: Keeps the scale of a matrix of zeros from being 0.
_TRACE_EPS = 1e-12


class AveragePoolHead(FeatureHead):
    """A linear layer on the mean of the patches.

    Args:
        width: D.
        num_classes: number of classes.

    Shape:
        (B, N, D) to (B, num_classes).
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = width
        self.reset(num_classes)

    def last_layer(self, num_classes: int) -> nn.Module:
        """See `FeatureHead.last_layer`."""
        return _classifier(self.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Patches (B, N, D) to their mean (B, D)."""
        return x.mean(dim=1)


class BilinearHead(FeatureHead):
    """Bilinear pooling: products of all pairs of channels, averaged over patches, and a linear layer.

    The products are replaced by their signed square roots and normalised to length 1 (Lin et al., ICCV 2015). With
    `dim`, channels are projected first (low-rank, Kong and Fowlkes, CVPR 2017). With `matrix_root`, the matrix of
    products is first replaced by its square root, with the Newton-Schulz iteration (improved, Lin and Maji, BMVC 2017).
    Computed in float32, also under autocast.

    Args:
        width: D.
        num_classes: number of classes.
        dim: d, number of channels after the projection; None for no projection.
        matrix_root: see above.
        iterations: iterations of the matrix square root, at least 2.

    Shape:
        (B, N, D) to (B, num_classes), from d^2 or D^2 products.

    Raises:
        UsageError: an invalid value.
    """

    project: nn.Linear | None

    def __init__(
        self, width: int, num_classes: int, dim: int | None = None, *, matrix_root: bool = False, iterations: int = 5
    ) -> None:
        super().__init__()
        self.project = nn.Linear(width, whole_number("dim", dim)) if dim is not None else None
        self.matrix_root = matrix_root
        self.iterations = whole_number("iterations", iterations, 2)
        self.num_features = (width if dim is None else dim) ** 2
        self.reset(num_classes)

    def last_layer(self, num_classes: int) -> nn.Module:
        """See `FeatureHead.last_layer`."""
        return _classifier(self.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Patches (B, N, D) to d^2 or D^2 products, of length 1 together; float32 at least."""
        channels = x if self.project is None else self.project(x)
        with without_autocast(channels):
            channels = channels.to(torch.promote_types(channels.dtype, torch.float32))
            products = channels.transpose(1, 2) @ channels / channels.shape[1]  # (B, d, d)
            if self.matrix_root:
                products = matrix_root(products, self.iterations)
            flat = products.flatten(1)
            return functional.normalize(flat.sign() * (flat.abs() + _ROOT_EPS).sqrt(), dim=1)


class MPNCOVHead(FeatureHead):
    """Matrix power normalised covariance: projection, batch norm, ReLU; the covariance over patches, its square root.

    The upper triangle of the root is the input of a linear layer (iSQRT-COV, Li et al., arXiv 1712.01034). Computed in
    float32, also under autocast.

    Args:
        width: D.
        num_classes: number of classes.
        dim: d, number of channels after the projection.
        iterations: iterations of the matrix square root, at least 2.

    Shape:
        (B, N, D) to (B, num_classes), from d (d + 1) / 2 numbers.

    Raises:
        UsageError: an invalid value.
    """

    upper: Tensor

    def __init__(self, width: int, num_classes: int, dim: int = 64, *, iterations: int = 5) -> None:
        super().__init__()
        self.project = nn.Linear(width, whole_number("dim", dim), bias=False)
        self.norm = nn.BatchNorm1d(dim)
        self.act = nn.ReLU()
        self.iterations = whole_number("iterations", iterations, 2)
        self.num_features = dim * (dim + 1) // 2
        self.reset(num_classes)

    def last_layer(self, num_classes: int) -> nn.Module:
        """See `FeatureHead.last_layer`."""
        return _classifier(self.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Patches (B, N, D) to the upper triangle of the root, row by row, (B, d (d + 1) / 2), float32 at least."""
        channels = self.project(x)
        channels = self.act(self.norm(channels.flatten(0, 1))).view_as(channels)
        with without_autocast(channels):
            channels = channels.to(torch.promote_types(channels.dtype, torch.float32))
            centered = channels - channels.mean(dim=1, keepdim=True)
            covariance = centered.transpose(1, 2) @ centered / channels.shape[1]  # (B, d, d)
            root = matrix_root(covariance, self.iterations)
            rows, columns = torch.triu_indices(root.shape[1], root.shape[2], device=root.device)
            return root[:, rows, columns]


def matrix_root(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximate matrix square roots by the Newton-Schulz iteration, scaled by traces (arXiv 1712.01034).

    Args:
        matrices: (B, d, d), symmetric and positive semi-definite; the root of zeros is zeros.
        iterations: at least 2; about ten give the root of well-conditioned matrices up to rounding.

    Returns:
        (B, d, d).
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    trace = matrices.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None].clamp_min(_TRACE_EPS)
    scaled = matrices / trace  # eigenvalues in [0, 1], where the iteration converges
    # the first step starts from `root = scaled` and `inverse = eye`; the last one computes the root alone
    inverse = 0.5 * (3 * eye - scaled)
    root = scaled @ inverse
    for _ in range(iterations - 2):
        step = 0.5 * (3 * eye - inverse @ root)
        root, inverse = root @ step, step @ inverse
    return 0.5 * root @ (3 * eye - inverse @ root) * trace.sqrt()


def patch_head(name: str, width: int, **options: Any) -> Callable[[int], nn.Module]:
    """Return a function that makes a head for a number of classes, as `TokenVisionTransformer` takes it.

    Args:
        name: one of `PATCH_HEADS`.
        width: D.
        **options: arguments of the head: `dim` for `lrblp` and `mpncov`, `iterations` for `iblp` and `mpncov`.

    Raises:
        UsageError: an unknown name or option; the message lists the possible ones.
    """
    kinds: dict[str, tuple[Callable[..., nn.Module], set[str]]] = {
        "pool": (AveragePoolHead, set()),
        "blp": (BilinearHead, set()),
        "lrblp": (partial(BilinearHead, dim=64), {"dim"}),
        "iblp": (partial(BilinearHead, matrix_root=True), {"iterations"}),
        "mpncov": (MPNCOVHead, {"dim", "iterations"}),
    }
    if name not in kinds:
        raise UsageError(f"there is no head '{name}'{nearest(name, PATCH_HEADS)}; there are {', '.join(PATCH_HEADS)}")
    make, known = kinds[name]
    if unknown := sorted(options.keys() - known):
        available = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise UsageError(f"head {name} has no option {', '.join(unknown)}: {available}")
    return partial(make, width, **options)


def _classifier(in_features: int, num_classes: int) -> nn.Linear:
    layer = nn.Linear(in_features, num_classes)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
