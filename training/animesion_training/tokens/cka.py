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
    section 3). It is invariant to rotations and scalings of either. For few samples it is biased upwards;
    `MinibatchCKA` is not.

    Args:
        x: (N, D1).
        y: (N, D2).

    Returns:
        A number in [0, 1]; 1 for features that are equal up to rotation, scale and shift.

    Raises:
        UsageError: other shapes, or features that are constant over all samples.
    """
    x, y = _center(x, y)
    if len(x) < max(x.shape[1], y.shape[1]):  # the same through kernels (N, N), which are smaller here
        x, y = x @ x.T, y @ y.T
        cross, norm_x, norm_y = (x * y).sum(), x.norm(), y.norm()
    else:
        cross, norm_x, norm_y = (y.T @ x).square().sum(), (x.T @ x).norm(), (y.T @ y).norm()
    return _ratio(cross, norm_x * norm_y)


class MinibatchCKA:
    """CKA of more samples than fit into memory, accumulated over batches, without the bias of few samples.

    The ratio of sums over batches of the unbiased estimator of HSIC (Nguyen, Raghu and Kornblith, ICLR 2021, arXiv
    2010.15327, eq. 2 and 3; Song et al., JMLR 2012).
    """

    def __init__(self) -> None:
        self._hsic_xy = self._hsic_xx = self._hsic_yy = 0.0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            x: (N, D1), N >= 4; the size of batches may vary.
            y: (N, D2).

        Raises:
            UsageError: other shapes, or fewer than four samples.
        """
        x, y = _center(x, y)
        if len(x) < 4:
            raise UsageError(f"the unbiased estimator of CKA needs at least four samples per batch, not {len(x)}")
        x, y = x @ x.T, y @ y.T
        self._hsic_xy += _hsic(x, y)
        self._hsic_xx += _hsic(x, x)
        self._hsic_yy += _hsic(y, y)

    def value(self) -> float:
        """CKA over all batches: at most 1, and close to 0, of either sign, for independent features.

        Raises:
            UsageError: no batches, or features that are constant over all samples.
        """
        product = torch.tensor(self._hsic_xx * self._hsic_yy, dtype=torch.float64)
        return _ratio(torch.tensor(self._hsic_xy, dtype=torch.float64), product.clamp_min(0).sqrt())


def _hsic(k: Tensor, m: Tensor) -> float:
    """The unbiased estimator of HSIC from two kernel matrices (n, n) (Song et al., JMLR 2012)."""
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    rows = 2 / (n - 2) * (k.sum(1) @ m.sum(1))
    return float(((k * m).sum() + sums - rows) / (n * (n - 3)))


def _center(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Features with mean 0, in float64; exactly 0 if they are constant over all samples up to rounding."""
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not len(x):
        raise UsageError(f"CKA compares features (N, D1) and (N, D2), got {tuple(x.shape)} and {tuple(y.shape)}")

    def center(features: Tensor) -> Tensor:
        features = features.detach().double()
        centered = features - features.mean(0)
        return centered if centered.norm() > _ROUNDING * features.norm() else torch.zeros_like(centered)

    return center(x), center(y)


def _ratio(cross: Tensor, norms: Tensor) -> float:
    if not norms > 0:
        raise UsageError("CKA is not defined for features that are constant over all samples: compare other features")
    return float(cross / norms)
