"""Metric objectives: they train features whose distances tell classes apart that were not in the training data.

ArcFace and CosFace add a margin to a softmax over cosines, sample by sample. Proxy-Anchor and SupCon compare the images
of a batch with each other, so the loss of an image depends on the whole batch; see `ComparingObjective`. The factories
by name are in `objectives`, `engine.steps` brings the batch together over several processes.

The logits of ArcFace, CosFace and Proxy-Anchor are cosines: they need the head `cosine` with a fixed scale of 1,
which `needs_cosines` demands.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from animesion_training.losses.classification import LossReduction, Objective
from animesion_training.options import in_range


class ArcFace(Objective):
    """Additive angular margin: the cross-entropy of `s cos(theta_c + m [c = y])`.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019 (arXiv 1801.07698), eq. 3.
    theta_c is the angle between a feature and the weight of class c. Beyond theta = pi - m, where cos(theta + m) would
    rise again, the logit is `cos(theta) - m sin(m)`, as in the authors' code.
    """

    takes_soft: ClassVar[bool] = False
    needs_cosines: ClassVar[bool] = True

    def __init__(self, *, margin: float = 0.5, scale: float = 64.0, reduction: LossReduction = "mean") -> None:
        """Create one from the margin m, 0..pi/2 radians, and the scale s > 0.

        Raises:
            UsageError: an option outside its range.
        """
        super().__init__(reduction)
        self.margin = in_range("margin", margin, low=0.0, high=math.pi / 2)
        self.scale = in_range("scale", scale, low=0.0, low_open=True)

    def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Compute the loss of each sample, (B,), from cosines (B, C)."""
        own = logits.gather(1, targets[:, None])  # (B, 1)
        # rounding can leave -1..1; the floor keeps the slope of the root finite at theta = 0
        sine = (1 - own.square()).clamp_min(torch.finfo(own.dtype).eps).sqrt()
        moved = own * math.cos(self.margin) - sine * math.sin(self.margin)
        late = own <= math.cos(math.pi - self.margin)
        moved = torch.where(late, own - self.margin * math.sin(self.margin), moved)
        return _cross_entropy(self.scale * logits.scatter(1, targets[:, None], moved), targets)


class CosFace(Objective):
    """Additive cosine margin: the cross-entropy of `s (cos(theta_c) - m [c = y])`.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018 (arXiv 1801.09414), eq. 4.
    """

    takes_soft: ClassVar[bool] = False
    needs_cosines: ClassVar[bool] = True

    def __init__(self, *, margin: float = 0.35, scale: float = 64.0, reduction: LossReduction = "mean") -> None:
        """Create one from the margin m, 0..1, and the scale s > 0.

        Raises:
            UsageError: an option outside its range.
        """
        super().__init__(reduction)
        self.margin = in_range("margin", margin, low=0.0, high=1.0)
        self.scale = in_range("scale", scale, low=0.0, low_open=True)

    def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Compute the loss of each sample, (B,), from cosines (B, C)."""
        margins = logits.new_full((len(targets), 1), -self.margin)
        return _cross_entropy(self.scale * logits.scatter_add(1, targets[:, None], margins), targets)


class ComparingObjective(Objective):
    """Base class of objectives that compare the images of a batch, so that the batch must not be cut.

    The loss of the batch is the mean of one value per image, whose gradient reaches other images too. The step of
    training collects the inputs of all processes before it calls the objective, and refuses `run.accumulate > 1`.

    Attributes:
        reads: the input: `logits` (B, C), or `features` (B, D), the input of the classifier.
    """

    takes_soft: ClassVar[bool] = False
    reads: ClassVar[Literal["logits", "features"]] = "logits"


class ProxyAnchor(ComparingObjective):
    """Proxy-Anchor: each class is an anchor that pulls its images and pushes those of other classes, hard ones most.

    Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020 (arXiv 2003.13991), eq. 4. With the cosines
    s(x, p) of images and the weights p of the classes, which are the proxies:

        1/|P+| sum_{p in P+} log(1 + sum_{x of p} e^{-alpha (s - delta)})
        + 1/|P| sum_{p in P} log(1 + sum_{x not of p} e^{alpha (s + delta)})

    P are the classes that have training images, P+ those that have images in the batch. The loss is one number for a
    batch; with `reduction="none"` each image has that number.
    """

    needs_cosines: ClassVar[bool] = True
    trained: Tensor | None

    def __init__(
        self,
        *,
        alpha: float = 32.0,
        delta: float = 0.1,
        counts: npt.ArrayLike | None = None,
        reduction: LossReduction = "mean",
    ) -> None:
        """Create one from alpha > 0, the margin delta, 0..1, and the training images of each class, (C,), if not all.

        Raises:
            UsageError: an option outside its range.
        """
        super().__init__(reduction)
        self.alpha = in_range("alpha", alpha, low=0.0, low_open=True)
        self.delta = in_range("delta", delta, low=0.0, high=1.0)
        trained = None if counts is None else torch.as_tensor(np.asarray(counts) > 0)
        self.register_buffer("trained", trained, persistent=False)

    def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Compute the loss of the batch once per sample, (B,), from cosines (B, C)."""
        own = functional.one_hot(targets, logits.shape[1]).bool()  # (B, C)
        pull = _log_one_plus_sum(-self.alpha * (logits - self.delta), own)  # (C,); 0 for a class without images here
        push = _log_one_plus_sum(self.alpha * (logits + self.delta), ~own)
        every = torch.ones_like(push, dtype=torch.bool) if self.trained is None else self.trained
        loss = pull.sum() / own.any(0).sum().clamp_min(1) + (push * every).sum() / every.sum().clamp_min(1)
        return loss.expand(len(targets))


class SupCon(ComparingObjective):
    """Supervised contrastive loss: images of a class attract each other, relative to all images of the batch.

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020 (arXiv 2004.11362), eq. 2 (L_out). For image i with
    positives P(i), the other images of its class in the batch, and cosines s of the features:

        -1/|P(i)| sum_{p in P(i)} log(e^{s_ip / tau} / sum_{a != i} e^{s_ia / tau})

    An image without positives has a loss of 0: use `data.images_per_class`, which puts several images of a class into
    each batch. The features are the input of the classifier. The paper adds a projection and drops it after training.
    """

    reads: ClassVar[Literal["logits", "features"]] = "features"

    def __init__(self, *, temperature: float = 0.1, reduction: LossReduction = "mean") -> None:
        """Create one from the temperature tau > 0.

        Raises:
            UsageError: an option outside its range.
        """
        super().__init__(reduction)
        self.temperature = in_range("temperature", temperature, low=0.0, low_open=True)

    def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Compute the loss of each sample, (B,), from features (B, D) of any length."""
        features = functional.normalize(logits, dim=1)
        alone = torch.eye(len(targets), dtype=torch.bool, device=features.device)
        # not -inf, which a batch of one image would turn into NaN
        apart = torch.finfo(features.dtype).min / 2
        similarities = (features @ features.T / self.temperature).masked_fill(alone, apart)
        gains = similarities.log_softmax(1).masked_fill(alone, 0.0)
        positives = (targets[:, None] == targets) & ~alone
        return -(gains * positives).sum(1) / positives.sum(1).clamp_min(1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)


def _log_one_plus_sum(exponents: Tensor, chosen: Tensor) -> Tensor:
    """`log(1 + sum of e^x)` over the chosen rows of each column, (B, C) to (C,); 0 for a column without any."""
    kept = exponents.masked_fill(~chosen, -torch.inf)
    return torch.cat((kept.new_zeros(1, kept.shape[1]), kept)).logsumexp(0)
