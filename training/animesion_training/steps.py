"""What one optimizer step computes: from a batch to the terms of the loss, for each kind of training.

A step is one module around the network, so that DistributedDataParallel sees one forward pass however often the network
runs in it. All chance comes from the samples' seeds. The loop is in `loop`, losses in `losses` and `distillation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

Autocast = Callable[[], AbstractContextManager[Any]]


class Step(nn.Module):
    """The plain step: the objective of the network's logits, and what the network's own methods add to it.

    Args:
        model: the network, compiled or not.
        objective: of (logits, targets), a mean over the batch.
        autocast: entered around forward passes; losses are computed outside of it.
        bare: the network without what `torch.compile` puts around it.
    """

    def __init__(self, model: nn.Module, objective: nn.Module, autocast: Autocast, bare: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast
        self._has_losses = getattr(bare, "has_losses", False)

    def forward(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """Terms of the loss.

        Args:
            images: (B, 3, S, S), normalised.
            targets: class ids (B,) or soft labels (B, C).
            seeds: one for each sample, (B,) int64.

        Returns:
            Scalars by name; their sum is the loss, a mean over the batch.
        """
        with self.autocast():
            if self._has_losses:
                logits, more = self.model(images, with_losses=True)
            else:
                logits, more = self.model(images), {}
        return {"label": self.objective(logits.float(), targets), **more}

    def kept(self) -> Mapping[str, Tensor]:
        """State beyond the network's that a checkpoint must hold, by name."""
        return {}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Take back what `kept` gave."""


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum of its terms."""
    return torch.stack([term.float() for term in terms.values()]).sum()
