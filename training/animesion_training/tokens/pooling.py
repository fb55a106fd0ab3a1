"""Heads that read all patches: average, bilinear (B-CNN, low-rank, improved) and covariance pooling (MPN-COV).

They go on a `TokenVisionTransformer` with `reads="patches"`. Heads that read one feature are in `models.heads`.
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
from animesion_training.tokens.autocast import without_autocast
from animesion_training.tokens.options import whole_number

#: Name -> what it does.
PATCH_HEADS = {
    "pool": "one linear layer on the mean of the patches",
    "blp": "bilinear pooling (Lin et al., ICCV 2015)",
    "lrblp": "bilinear pooling of 64 projected channels (Kong and Fowlkes, CVPR 2017)",
    "iblp": "bilinear pooling with a matrix square root (Lin and Maji, BMVC 2017)",
    "mpncov": "covariance pooling of 64 projected channels with a matrix square root (Li et al., CVPR 2018)",
}

_ROOT_EPS = 1e-10
_TRACE_EPS = 1e-12


class AveragePoolHead(nn.Module):
    """A linear layer on the mean of the patches.

    Args:
        width: D.
        num_classes: number of classes.

    Shape:
        (B, N, D) to (B, num_classes).
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc = _classifier(width, num_classes)

    def forward(self, patches: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.fc(patches.mean(dim=1))
        return logits


class BilinearHead(nn.Module):
    """Products of all pairs of channels, mean over patches; signed square roots, length 1, a linear layer.

    Lin et al., ICCV 2015. With `dim`, channels are projected first (low-rank, Kong and Fowlkes, CVPR 2017);
    with `matrix_root`, the matrix of products is replaced by its square root before all else (improved, Lin and Maji,
    BMVC 2017), by Newton's and Schulz' iteration. Computed in float32, whatever autocast says.

    Args:
        width: D.
        num_classes: number of classes.
        dim: d, channels that products are made of, None for all of them as they are.
        matrix_root: see above.
        iterations: of the matrix square root.

    Shape:
        (B, N, D) to (B, num_classes), of d^2 or D^2 products.

    Raises:
        UsageError: a value that makes no sense.
    """

    project: nn.Linear | None

    def __init__(
        self, width: int, num_classes: int, dim: int | None = None, *, matrix_root: bool = False, iterations: int = 5
    ) -> None:
        super().__init__()
        self.project = nn.Linear(width, whole_number("dim", dim)) if dim is not None else None
        self.matrix_root = matrix_root
        self.iterations = whole_number("iterations", iterations, 2)
        self.fc = _classifier((width if dim is None else dim) ** 2, num_classes)

    def forward(self, patches: Tensor) -> Tensor:
        """See the class."""
        channels = patches if self.project is None else self.project(patches)
        with without_autocast(channels):
            channels = channels.to(torch.promote_types(channels.dtype, torch.float32))
            products = channels.transpose(1, 2) @ channels / channels.shape[1]
            if self.matrix_root:
                products = matrix_root(products, self.iterations)
            flat = products.flatten(1)
            flat = functional.normalize(flat.sign() * (flat.abs() + _ROOT_EPS).sqrt(), dim=1)
        logits: Tensor = self.fc(flat)
        return logits


class MPNCOVHead(nn.Module):
    """Matrix power normalised covariance: projection, batch norm, ReLU; the covariance over patches, its square root.

    The upper triangle of the root goes into a linear layer (iSQRT-COV, Li et al., arXiv 1712.01034).
    Computed in float32, whatever autocast says.

    Args:
        width: D.
        num_classes: number of classes.
        dim: d, channels after the projection.
        iterations: of the matrix square root.

    Shape:
        (B, N, D) to (B, num_classes), of d (d + 1) / 2 numbers.

    Raises:
        UsageError: a value that makes no sense.
    """

    upper: Tensor

    def __init__(self, width: int, num_classes: int, dim: int = 64, *, iterations: int = 5) -> None:
        super().__init__()
        self.project = nn.Linear(width, whole_number("dim", dim), bias=False)
        self.norm = nn.BatchNorm1d(dim)
        self.act = nn.ReLU()
        self.iterations = whole_number("iterations", iterations, 2)
        self.fc = _classifier(dim * (dim + 1) // 2, num_classes)

    def pool(self, patches: Tensor) -> Tensor:
        """Patches (B, N, D) to the upper triangle of the root, row by row, (B, d (d + 1) / 2), float32 at least."""
        channels = self.project(patches)
        channels = self.act(self.norm(channels.flatten(0, 1))).view_as(channels)
        with without_autocast(channels):
            channels = channels.to(torch.promote_types(channels.dtype, torch.float32))
            centered = channels - channels.mean(dim=1, keepdim=True)
            root = matrix_root(centered.transpose(1, 2) @ centered / channels.shape[1], self.iterations)
            rows, columns = torch.triu_indices(root.shape[1], root.shape[2], device=root.device)
            return root[:, rows, columns]

    def forward(self, patches: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.fc(self.pool(patches))
        return logits


def matrix_root(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximate square roots by Newton's and Schulz' iteration, with traces as scale (arXiv 1712.01034).

    Args:
        matrices: (B, d, d), symmetric and positive semi-definite; one of zeros has zeros as its root.
        iterations: at least 2; the root of well-conditioned matrices is exact to rounding after some ten.

    Returns:
        (B, d, d).
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    trace = matrices.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None].clamp_min(_TRACE_EPS)
    scaled = matrices / trace
    inverse = 0.5 * (3 * eye - scaled)
    root = scaled @ inverse
    for _ in range(iterations - 2):
        step = 0.5 * (3 * eye - inverse @ root)
        root, inverse = root @ step, step @ inverse
    return 0.5 * root @ (3 * eye - inverse @ root) * trace.sqrt()


def patch_head(name: str, width: int, **options: Any) -> Callable[[int], nn.Module]:
    """What makes a head by name for a number of classes, as `TokenVisionTransformer` takes it.

    Args:
        name: one of `PATCH_HEADS`.
        width: D.
        **options: of the head's class: `dim` and `iterations`, as far as it has them.

    Raises:
        UsageError: an unknown name or option; the possible ones are named.
    """
    kinds: dict[str, tuple[Callable[..., nn.Module], set[str]]] = {
        "pool": (AveragePoolHead, set()),
        "blp": (BilinearHead, set()),
        "lrblp": (partial(BilinearHead, dim=64), {"dim"}),
        "iblp": (partial(BilinearHead, matrix_root=True), {"iterations"}),
        "mpncov": (MPNCOVHead, {"dim", "iterations"}),
    }
    if name not in kinds:
        raise UsageError(f"there is no head '{name}'{nearest(name, PATCH_HEADS)} There are {', '.join(PATCH_HEADS)}")
    make, known = kinds[name]
    if unknown := sorted(options.keys() - known):
        there_are = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise UsageError(f"head {name} has no option {', '.join(unknown)}: {there_are}")
    return partial(make, width, **options)


def _classifier(in_features: int, num_classes: int) -> nn.Linear:
    layer = nn.Linear(in_features, num_classes)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
