"""Counterfactual attention learning (CAL): a classifier for any timm network that has a spatial feature map.

Rao et al., "Counterfactual Attention Learning for Fine-Grained Visual Categorization and Re-identification", ICCV 2021
(arXiv 2108.08728), in the form that the teachers of TGDA use (Rios et al., arXiv 2507.12157). The loss is in
`losses.cal`, crops and drops of images in `data.views`, the steps of training in `engine.steps`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.data import views as image_views
from animesion_training.data.seeds import FAKE, tensor_uniforms
from animesion_training.models.feature_maps import FeatureMapProbe, as_feature_map, remove_classifier
from animesion_training.options import whole_number
from animesion_training.tokens.annotations import with_types
from animesion_training.tokens.autocast import without_autocast

_BACKBONE = "backbone."

#: The start of a name in a pattern; not the `^` of a negated set.
_ANCHOR = re.compile(r"(?<!\[)\^")

#: Keeps the gradient of the square root finite at 0.
_ROOT_EPS = 1e-6

#: Factor of the pooled features, which have length 1, before the classifier.
_SCALE = 100.0

#: Threshold and padding of the crops that full inference adds to the image; the last one is that of `single`.
_CROPS = ((0.3, 0.1), (0.2, 0.1), (0.1, 0.05))

Views = Literal["raw", "single", "full"]

#: Share of a vote that all classes without one have together.
_NO_VOTE = 1e-3


class CALOutput(NamedTuple):
    """The output of the head for a batch.

    Attributes:
        logits: (B, num_classes).
        effect: (B, num_classes), logits minus those with a fake attention: the effect of the attention.
        features: (B, M C), the input of the classifier, of length 1; float32.
        attention: (B, M, h, w), >= 0.
    """

    logits: Tensor
    effect: Tensor
    features: Tensor
    attention: Tensor


@torch.fx.wrap
def _bilinear(features: Tensor, attention: Tensor) -> Tensor:
    """Do what `CALHead.pool` does; fx does not trace into it, as the context depends on the device."""
    # sums over the map overflow in float16, and small ones underflow
    with without_autocast(features):
        pooled = torch.einsum("bmhw,bchw->bmc", attention.float(), features.float())
        pooled = (pooled / (features.shape[2] * features.shape[3])).flatten(1)
        return functional.normalize(pooled.sign() * (pooled.abs() + _ROOT_EPS).sqrt(), dim=1)


class CALHead(nn.Module):
    """Part attention, bilinear attention pooling and a linear classifier without bias.

    Attention is `ReLU(BN(conv1x1(F)))`. Features are `sum(A_m * F_c) / (h w)` for each map m and channel c, replaced by
    their signed square roots, and normalised to length 1 over all M C of them. Logits are `W (100 f)`.

    Args:
        in_features: C, channels of the feature map.
        num_classes: number of classes; 0 for features alone.
        num_maps: M, number of attention maps.

    Raises:
        UsageError: the number of maps is not positive.

    Shape:
        (B, C, h, w) to `CALOutput`.
    """

    def __init__(self, in_features: int, num_classes: int, num_maps: int = 32) -> None:
        super().__init__()
        whole_number("num_maps", num_maps)
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_maps = num_maps
        self.attentions = nn.Sequential()
        self.attentions.add_module("conv", nn.Conv2d(in_features, num_maps, 1, bias=False))
        self.attentions.add_module("bn", nn.BatchNorm2d(num_maps, eps=1e-3))
        self.attentions.add_module("act", nn.ReLU())
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the classifier by one for another number of classes, 0 for none. The attention is kept."""
        self.num_classes = num_classes
        like: Any = self.attentions.get_submodule("conv").weight
        width = self.num_maps * self.in_features
        layer = nn.Linear(width, num_classes, bias=False) if num_classes else nn.Identity()
        self.fc = layer.to(like).train(self.training)

    def pool(self, features: Tensor, attention: Tensor) -> Tensor:
        """Pool a feature map (B, C, h, w) by attention (B, M, h, w) to features (B, M C) of length 1, float32."""
        return _bilinear(features, attention)

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, M C) of `pool` to logits (B, num_classes), or unchanged without classes."""
        if not self.num_classes:
            return features
        # the features are float32, and the weights may not be
        logits: Tensor = self.fc((_SCALE * features).to(self.attentions[1].weight))  # type: ignore[arg-type]
        return logits

    def forward(self, features: Tensor, fake: Tensor | None = None, seeds: Tensor | None = None) -> CALOutput:
        """Classify a feature map.

        Args:
            features: (B, C, h, w).
            fake: (B, M, h, w), the attention that the effect is measured against. If None, it is drawn from U(0, 2) in
                training mode, and 1 everywhere in evaluation mode.
            seeds: one per image, (B,) int64, which `fake` is drawn from; None for torch's generator of the device.
        """
        attention = self.attentions(features)  # (B, M, h, w)
        if fake is None and seeds is not None and self.training:
            draws = tensor_uniforms(seeds, attention[0].numel(), FAKE)
            fake = 2 * draws.view(attention.shape)
        if fake is None:
            # contiguous, so that the order of random numbers does not depend on the memory format
            fake = torch.ones(attention.shape, device=attention.device)
            fake = fake.uniform_(0.0, 2.0) if self.training else fake
        pooled = self.pool(features, attention)
        logits = self.classify(pooled)
        effect = logits - self.classify(self.pool(features, fake))
        return CALOutput(logits, effect, pooled, attention)


@dataclass(frozen=True)
class CALEvaluation:
    """How a CAL network classifies images in evaluation. Nothing of this changes its training.

    The views are those of the authors' FGIR-Backbones (arXiv 2605.18700).

    Attributes:
        views: views of an image, whose logits are averaged: `raw`, the image alone; `single`, also a crop around the
            mean attention map; `full`, the image, its mirror image and three crops of each: 8 forward passes.
        top_k: with crops, k: their thresholds are values of the map instead of shares of its peak: the largest but
            k - 1, ..., by `top_k_ranks`; 0 for shares.
        votes: with `full`, v: each view has v votes for its first class, v - 1 for its second, ..., and the logits are
            the logarithms of the shares of the votes. Equal numbers are ordered by the first view, and its first class,
            that voted so; classes without a vote follow by their mean logits. 0 for the mean of the logits.
        upsampling: of the map for crops, see `data.views.Upsampling`.
        pool: whether that map is averaged over 2x2 cells first.
        unmirrored: whether crops of the mirror image are cut from the image itself, by the map of the mirror image, as
            the code of FGIR-KD-Teacher does by mistake; for its published accuracies.

    Raises:
        UsageError: an unknown value, or values that do not go together.
    """

    views: Views = "raw"
    top_k: int = 0
    votes: int = 0
    upsampling: image_views.Upsampling = "bilinear"
    pool: bool = False
    unmirrored: bool = False

    def __post_init__(self) -> None:
        for name, values in (("views", ("raw", "single", "full")), ("upsampling", ("bilinear", "bicubic"))):
            if getattr(self, name) not in values:
                raise UsageError(
                    f"{name} of a CAL classifier are one of {', '.join(values)}, not {getattr(self, name)!r}"
                )
        for name in ("top_k", "votes"):
            if getattr(self, name) != 0:
                whole_number(name, getattr(self, name))
        for name in ("pool", "unmirrored"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} of a CAL classifier is true or false, not {getattr(self, name)!r}")
        if self.top_k and self.views == "raw":
            raise UsageError("top_k is for the crops of views 'single' or 'full', and views are 'raw'")
        if self.votes and self.views != "full":
            raise UsageError(f"votes are those of views 'full', and views are {self.views!r}")

    def changed(self, values: Mapping[str, Any]) -> CALEvaluation:
        """Return this with other values.

        Raises:
            UsageError: an unknown name, or values that do not go together.
        """
        known = [each.name for each in fields(self)]
        for name in values:
            if name not in known:
                near = nearest(str(name), known) or f": there are {', '.join(known)}"
                raise UsageError(f"a CAL classifier has no option '{name}'{near}")
        return replace(self, **values)


class CALClassifier(nn.Module):
    """A timm network whose classifier is a `CALHead` on its last feature map.

    Every network whose `forward_features` returns a map is supported: convolutional networks, and transformers with a
    grid of patches (class and register tokens are left out), channels first or last. Pooling and classifier are
    dropped, with all other modules that the feature map does not depend on, so that every parameter has a gradient. A
    final norm that some transformers apply after pooling is applied to each patch.

    Args:
        backbone: the network; modified in place.
        num_classes: number of classes; 0 for features alone.
        num_maps: number of attention maps.
        views: how images are classified in evaluation, like the following; see `CALEvaluation`.
        top_k: likewise.
        votes: likewise.
        upsampling: likewise.
        pool: likewise.
        unmirrored: likewise.

    Raises:
        UsageError: a network without a feature map, or an unknown option.

    Shape:
        (B, channels, H, W) to logits (B, num_classes).
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_maps: int = 32,
        views: Views = "raw",
        top_k: int = 0,
        votes: int = 0,
        upsampling: image_views.Upsampling = "bilinear",
        pool: bool = False,
        unmirrored: bool = False,
    ) -> None:
        super().__init__()
        self.evaluation = CALEvaluation(views, top_k, votes, upsampling, pool, unmirrored)
        before = set(backbone.state_dict())
        remove_classifier(backbone)
        probe = FeatureMapProbe(backbone)
        self._nhwc = probe.nhwc
        probe.drop_unused(backbone)
        self._dropped = frozenset(before - set(backbone.state_dict()))
        self.backbone: Any = backbone
        self.num_features = self.head_hidden_size = num_maps * probe.channels
        self.in_chans = probe.in_chans
        self.pretrained_cfg = self.default_cfg = getattr(backbone, "pretrained_cfg", None) or {}
        self.feature_info = [
            dict(info, module=f"{_BACKBONE}{info['module']}") for info in getattr(backbone, "feature_info", ())
        ]
        self.num_classes = num_classes
        self.head = CALHead(probe.channels, num_classes, num_maps)

    def feature_map(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) to the last feature map (B, C, h, w)."""
        features = self.backbone.forward_features(x)
        return as_feature_map(self.backbone, features, (x.shape[2], x.shape[3]), nhwc=self._nhwc)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) to the input of the classifier (B, M C), of length 1; float32."""
        features = self.feature_map(x)
        return self.head.pool(features, self.head.attentions(features))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, M C) to logits (B, num_classes); with `pre_logits` they are returned unchanged."""
        return x if pre_logits else self.head.classify(x)

    @with_types
    def forward(self, x: Tensor, parts: bool = False, seeds: Tensor | None = None) -> Tensor | CALOutput:
        """Images (B, channels, H, W) to logits (B, num_classes), or with `parts` to the output of `forward_parts`."""
        if parts is True:  # by identity, because torch.fx passes a stand-in, which has no truth value
            return self.forward_parts(x, seeds=seeds)
        if self.evaluation.views != "raw" and not self.training:
            return self._with_crops(x)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Tensor, output_fmt: str = "NCHW", intermediates_only: bool = False, **options: Any
    ) -> Any:
        """The backbone's `forward_intermediates`, see timm, and the output of `forward_features`.

        Raises:
            UsageError: the backbone returns no intermediate features.
        """
        if not hasattr(self.backbone, "forward_intermediates"):
            raise UsageError(f"{type(self.backbone).__name__} has no intermediate features")
        maps = self.backbone.forward_intermediates(x, output_fmt=output_fmt, intermediates_only=True, **options)
        return maps if intermediates_only else (self.forward_features(x), maps)

    def forward_parts(self, x: Tensor, fake: Tensor | None = None, seeds: Tensor | None = None) -> CALOutput:
        """Images (B, channels, H, W) to all outputs of the head; for `fake` and `seeds` see `CALHead.forward`."""
        output: CALOutput = self.head(self.feature_map(x), fake, seeds)
        return output

    def _with_crops(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of several views, see `CALEvaluation`."""
        settings, size = self.evaluation, (x.shape[2], x.shape[3])
        full = settings.views == "full"
        both = torch.cat((x, x.flip(3))) if full else x  # (2 B, channels, H, W)
        features = self.feature_map(both)
        attention = self.head.attentions(features)
        logits = [self.head.classify(self.head.pool(features, attention))]
        # the crops of images and of mirror images follow their own attention
        maps = image_views.mean_map(attention)
        maps = image_views.pool_map(maps) if settings.pool else maps
        source = torch.cat((x, x)) if full and settings.unmirrored else both
        for number, (share, padding) in list(enumerate(_CROPS))[0 if full else -1 :]:
            threshold = _top_k_limits(maps, settings.top_k, number, mirrored=full) if settings.top_k else share
            boxes = image_views.crop_boxes(
                maps, size, threshold, padding, settings.upsampling, absolute=settings.top_k > 0
            )
            logits.append(self.forward_head(self.forward_features(image_views.crop(source, boxes))))
        each = torch.stack(logits)  # (views, B or 2 B, K)
        if not full:
            return each.mean(0)
        plain, mirrored = each.chunk(2, dim=1)
        if settings.votes:
            return vote_shares(torch.cat((plain, mirrored)), settings.votes)
        return (plain.sum(0) + mirrored.sum(0)) / (2 * len(each))

    def adapt_state_dict(self, state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
        """Convert weights of ours or of the bare backbone, in any layout that timm reads, for this model.

        Weights of modules that were dropped from the backbone are left out, so those of a bare backbone have no head.
        `model` is unused: it is part of the signature of timm's filters.
        """
        host, head = state_dict, {}
        if any(key.startswith(_BACKBONE) for key in state_dict):
            host = {
                key.removeprefix(_BACKBONE): value for key, value in state_dict.items() if key.startswith(_BACKBONE)
            }
            head = {key: value for key, value in state_dict.items() if not key.startswith(_BACKBONE)}
        adapt = getattr(self.backbone, "adapt_state_dict", None)
        adapt = adapt or getattr(sys.modules[type(self.backbone).__module__], "checkpoint_filter_fn", None)
        if adapt is not None:
            host = adapt(host, self.backbone)
        own = self.backbone.state_dict()
        if "norm.weight" not in host and "norm.weight" in own and "fc_norm.weight" in self._dropped:
            # the norm after pooling is now the norm of each patch
            host = {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in host.items()}
        kept = {key: value for key, value in host.items() if key in own or key not in self._dropped}
        return {f"{_BACKBONE}{key}": value for key, value in kept.items()} | head

    # -- timm's interface ----------------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"{_BACKBONE}{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer decay: the backbone's own."""

        def inside(pattern: str) -> str:
            # timm matches patterns at the start of a name, with an anchor or without one
            return rf"^backbone\.(?:{_ANCHOR.sub('', pattern)})"

        return {
            name: inside(patterns)
            if isinstance(patterns, str)
            else [(inside(each[0]), *each[1:]) for each in patterns or ()]
            for name, patterns in self.backbone.group_matcher(coarse=coarse).items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the backbone."""
        self.backbone.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """The CAL head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by one for another number of classes; attention replaces pooling.

        Raises:
            UsageError: a pooling is requested.
        """
        if global_pool not in (None, ""):
            raise UsageError(f"a CAL classifier pools by attention, and cannot pool by {global_pool!r}")
        self.num_classes = num_classes
        self.head.reset(num_classes)

    def set_input_size(self, img_size: tuple[int, int] | None = None, **options: Any) -> None:
        """Change the input size; convolutional backbones accept any, and transformers resample their positions."""
        if hasattr(self.backbone, "set_input_size"):
            self.backbone.set_input_size(img_size=img_size, **options)


def top_k_ranks(k: int) -> list[int]:
    """Ranks of the values that crops take as thresholds: six from k to 2 k, equally spaced, rounded half to even.

    The three crops of the image have the first, third and fifth, those of the mirror image the others. (FGIR-Backbones,
    arXiv 2605.18700.)
    """
    return [round(k + k * step / 5) for step in range(6)]


def _top_k_limits(maps: Tensor, k: int, number: int, *, mirrored: bool) -> Tensor:
    """Thresholds (B,) of the crops with this number: values of each map (B, 1, h, w).

    With `mirrored`, the second half of the batch are mirror images.

    Raises:
        UsageError: a map has fewer values.
    """
    ranks = top_k_ranks(k)[2 * number : 2 * number + 2]
    values = maps.flatten(1)
    if max(ranks) > values.shape[1]:
        raise UsageError(f"top_k {k} needs {max(ranks)} values of a map, which has {values.shape[1]}: give a smaller k")
    ordered = values.float().topk(max(ranks), dim=1).values
    if not mirrored:
        return ordered[:, ranks[0] - 1]
    plain, other = ordered.chunk(2)
    return torch.cat((plain[:, ranks[0] - 1], other[:, ranks[1] - 1]))


def vote_shares(logits: Tensor, votes: int) -> Tensor:
    """Let views vote: v votes for the first class of each, v - 1 for the second, ..., 1 for the last.

    Args:
        logits: of the views in their order, (views, B, K).
        votes: v, at most K.

    Returns:
        (B, K), float32: the logarithms of the shares of the votes, whose order is that of the numbers of votes, then of
        the first appearance by view and rank. Classes without a vote follow, by their mean logits.

    Raises:
        UsageError: there are fewer classes than votes.
    """
    views, _, classes = logits.shape
    if votes > classes:
        raise UsageError(f"{votes} votes of each view need as many classes, and there are {classes}: give fewer votes")
    chosen = logits.float().topk(votes, dim=2).indices.transpose(0, 1).flatten(1)  # (B, views v), in the order of votes
    given = torch.arange(votes, 0, -1, device=logits.device, dtype=torch.float32).repeat(views)
    places = torch.arange(len(given), device=logits.device, dtype=torch.float32)
    counts = torch.zeros(chosen.shape[0], classes, device=logits.device)
    first = torch.full_like(counts, float(len(given)))
    counts.scatter_add_(1, chosen, given.expand_as(chosen))
    first.scatter_reduce_(1, chosen, places.expand_as(chosen), "amin")
    # less than a vote in total, so that it orders equal numbers only
    scores = torch.where(counts > 0, counts - 0.01 * first / len(given), _NO_VOTE * logits.float().mean(0).softmax(1))
    return (scores / scores.sum(1, keepdim=True)).log()
