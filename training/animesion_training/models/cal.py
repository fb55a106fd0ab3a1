"""Counterfactual attention learning (CAL): a classifier for any timm network that has a spatial feature map.

Rao et al., "Counterfactual Attention Learning for Fine-Grained Visual Categorization and Re-identification", ICCV 2021
(arXiv 2108.08728), in the form that the teachers of TGDA use (Rios et al., arXiv 2507.12157). The loss is in
`losses.cal`, crops and drops of images in `data.views`, the steps of training in `engine.steps`.
"""

from __future__ import annotations

import re
import sys
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

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

#: Threshold and padding of the crops that full inference adds to the image.
_CROPS = ((0.3, 0.1), (0.2, 0.1), (0.1, 0.05))


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
        views: views in evaluation: `raw`, the image alone, or `full`, the image, its mirror image and three crops of
            each around the mean attention map: 8 forward passes whose logits are averaged.

    Raises:
        UsageError: a network without a feature map, or an unknown option.

    Shape:
        (B, channels, H, W) to logits (B, num_classes).
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, num_maps: int = 32, views: Literal["raw", "full"] = "raw"
    ) -> None:
        super().__init__()
        if views not in ("raw", "full"):
            raise UsageError(f"views of a CAL classifier are raw or full, not {views!r}")
        before = set(backbone.state_dict())
        remove_classifier(backbone)
        probe = FeatureMapProbe(backbone)
        self._nhwc = probe.nhwc
        probe.drop_unused(backbone)
        self._dropped = frozenset(before - set(backbone.state_dict()))
        self.backbone: Any = backbone
        self.views = views
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
        if self.views == "full" and not self.training:
            return self._full(x)
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

    def _full(self, x: Tensor) -> Tensor:
        """Mean logits (B, num_classes) of 8 views: images, mirror images, and three crops of each."""
        both = torch.cat((x, x.flip(3)))  # (2 B, channels, H, W)
        features = self.feature_map(both)
        attention = self.head.attentions(features)
        logits = self.head.classify(self.head.pool(features, attention))
        # the crops of images and of mirror images follow their own attention
        maps, size = image_views.mean_map(attention), (x.shape[2], x.shape[3])
        for threshold, padding in _CROPS:
            boxes = image_views.crop_boxes(maps, size, threshold, padding)
            logits = logits + self.forward_head(self.forward_features(image_views.crop(both, boxes)))
        plain, mirrored = logits.chunk(2)
        return (plain + mirrored) / (2 * (1 + len(_CROPS)))

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
