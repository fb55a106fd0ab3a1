"""Centered kernel alignment (CKA): how similar the features of two networks, or of two layers, are."""

from __future__ import annotations

import torch
from torch import Tensor

from animesion.errors import UsageError

#: Features that vary by a smaller share than this are constant up to rounding.
_ROUNDING = 1e-12


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Centered kernel alignment of two sets of features of the same samples, with linear kernels.

    `|Y'X|^2 / (|X'X| |Y'Y|)` with Frobenius norms and centered columns (Kornblith et al., ICML 2019, arXiv 1905.00414,
    section 3). It does not change under rotations and scalings of either. For few samples it is biased upwards:
    `MinibatchCKA` is not.

    Args:
        x: (N, D1).
        y: (N, D2).

    Returns:
        In [0, 1]; 1 for features that are the same up to rotation, scale and shift.

    Raises:
        UsageError: other shapes, or features that are the same for all samples.
    """
    x, y = _centered(x, y)
    if len(x) < max(x.shape[1], y.shape[1]):  # the same through N x N matrices
        x, y = x @ x.T, y @ y.T
        shared, own_x, own_y = (x * y).sum(), x.norm(), y.norm()
    else:
        shared, own_x, own_y = (y.T @ x).square().sum(), (x.T @ x).norm(), (y.T @ y).norm()
    return _ratio(shared, own_x * own_y)


class MinibatchCKA:
    """CKA of more samples than fit into memory, from batches, without the bias of few samples.

    The ratio of sums over batches of the unbiased estimator of HSIC (Nguyen, Raghu and Kornblith, ICLR 2021, arXiv
    2010.15327, eq. 2 and 3; Song et al., JMLR 2012).
    """

    def __init__(self) -> None:
        self._shared = self._own_x = self._own_y = 0.0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            x: (N, D1), N >= 4; batches may differ in size.
            y: (N, D2).

        Raises:
            UsageError: other shapes, or fewer than four samples.
        """
        x, y = _centered(x, y)
        if len(x) < 4:
            raise UsageError(f"the unbiased estimator of CKA needs four samples a batch at least, not {len(x)}")
        x, y = x @ x.T, y @ y.T
        self._shared += _hsic(x, y)
        self._own_x += _hsic(x, x)
        self._own_y += _hsic(y, y)

    def value(self) -> float:
        """CKA over all batches; at most 1, and around 0, on either side, for features that have nothing in common.

        Raises:
            UsageError: no batches, or features that are the same for all samples.
        """
        own = torch.tensor(self._own_x * self._own_y, dtype=torch.float64)
        return _ratio(torch.tensor(self._shared, dtype=torch.float64), own.clamp_min(0).sqrt())


def _hsic(k: Tensor, m: Tensor) -> float:
    """The unbiased estimator of HSIC from two kernel matrices (n, n)."""
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    whole = k.sum() * m.sum() / ((n - 1) * (n - 2))
    rows = 2 / (n - 2) * (k.sum(1) @ m.sum(1))
    return float(((k * m).sum() + whole - rows) / (n * (n - 3)))


def _centered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Features with mean 0, in float64; exactly 0 where they are the same for all samples up to rounding."""
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not len(x):
        raise UsageError(f"CKA compares features (N, D1) and (N, D2), not {tuple(x.shape)} and {tuple(y.shape)}")

    def centered(features: Tensor) -> Tensor:
        features = features.detach().double()
        moved = features - features.mean(0)
        return moved if moved.norm() > _ROUNDING * features.norm() else torch.zeros_like(moved)

    return centered(x), centered(y)


def _ratio(shared: Tensor, own: Tensor) -> float:
    if not own > 0:
        raise UsageError("CKA is not defined for features that are the same for all samples")
    return float(shared / own)
