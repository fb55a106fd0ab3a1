"""Statistics of how confident a teacher is, over its logits on a split.

`animesion_training.analysis.teachers` ranks teachers by them. The losses that train a student are in
`animesion_training.losses.distillation`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from animesion_training.losses.distillation import top_values

#: Smallest value that a ratio may divide by.
_LEAST = 1e-6


def ratio_12(logits: Tensor) -> Tensor:
    """Compute the ratio `P1 / P2` of a teacher's first logit to its second; lower ratios make better teachers.

    Rios et al., arXiv 2605.15689. It changes when logits are shifted by a constant; `margin_12` does not.

    Args:
        logits: (B, K), K >= 2, raw.

    Returns:
        (B,), float32; NaN where P2 is below 1e-6 and the ratio has no meaning.

    Raises:
        UsageError: a single class.
    """
    return _ratio(top_values(logits.float(), 2), 0, 1)


def margin_12(logits: Tensor) -> Tensor:
    """Compute the margin `P1 - P2` of logits (B, K), K >= 2, as (B,) float32, 0 or more.

    Raises:
        UsageError: a single class.
    """
    first, second = top_values(logits.float(), 2)[:, :2].unbind(1)
    return first - second


class TeacherStatistics:
    """Means of confidence statistics over the samples of a split, accumulated batch by batch in float64.

    The names are those of arXiv 2605.15689, with `_normal` for raw logits, `_softmax` for probabilities and `_log` for
    their logarithms: `ratio_1_2`, `ratio_1_3`, `ratio_2_3` of the sorted values P1 >= P2 >= ...; `sec_std`, the
    standard deviation of P2, P3 and P4; `ratio_1_std`, P1 divided by it. In addition `margin_1_2`, P1 - P2 of the
    logits, and `entropy` of the probabilities in nats.

    A ratio whose denominator is not positive (for `_log`: not negative) is left out of its mean; `defined` is the share
    of samples that have a `ratio_1_2_normal`. A mean over no samples is None. Statistics that need more classes than
    the logits have are absent.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self.samples = 0

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Add a batch of logits (B, K), K >= 2, without synchronising with the device.

        Raises:
            UsageError: a single class.
        """
        self.samples += len(logits)
        logs = logits.float().log_softmax(1)
        values = {"normal": logits.float(), "softmax": logs.exp(), "log": logs}
        for scale, value in values.items():
            ranked = top_values(value, 4)  # (B, min(4, K))
            # logarithms are negative: take the ratio of their magnitudes
            sign = -1 if scale == "log" else 1
            least = 0.0 if scale == "softmax" else _LEAST
            for first, second in ((0, 1), (0, 2), (1, 2)):
                if second < ranked.shape[1]:
                    self._add(f"ratio_{first + 1}_{second + 1}_{scale}", _ratio(sign * ranked, first, second, least))
            if ranked.shape[1] > 2:
                spread = ranked[:, 1:].std(1)
                self._add(f"sec_std_{scale}", spread)
                self._add(f"ratio_1_std_{scale}", torch.where(spread > 0, ranked[:, 0] / spread, torch.nan))
        self._add("margin_1_2", margin_12(logits))
        self._add("entropy", -torch.xlogy(logs.exp(), logs.exp()).sum(1))

    def results(self) -> dict[str, float | None]:
        """Return the means by name, and `defined`, a share 0..1."""
        counts = {name: int(count) for name, count in self._counts.items()}
        means = {name: float(total) / counts[name] if counts[name] else None for name, total in self._sums.items()}
        return means | {"defined": counts.get("ratio_1_2_normal", 0) / self.samples if self.samples else None}

    def _add(self, name: str, values: Tensor) -> None:
        known = ~values.isnan()
        total, count = torch.where(known, values, 0.0).double().sum(), known.sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count


def _ratio(ranked: Tensor, first: int, second: int, least: float = _LEAST) -> Tensor:
    return torch.where(ranked[:, second] > least, ranked[:, first] / ranked[:, second], torch.nan)
