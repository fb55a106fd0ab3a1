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
from animesion_training.models.feature_maps import FeatureMapProbe, as_feature_map, remove_classifier
from animesion_training.tokens.autocast import without_autocast

_HOST = "backbone."

_ANCHOR = re.compile(r"(?<!\[)\^")

#: Keeps the slope of the square root finite at 0.
_ROOT_EPS = 1e-6

#: What pooled features of length 1 are multiplied with before the classifier.
_SCALE = 100.0

#: Threshold and padding of the crops that full inference looks at beside the whole image.
_CROPS = ((0.3, 0.1), (0.2, 0.1), (0.1, 0.05))


class CALOutput(NamedTuple):
    """What the head makes of a batch.

    Attributes:
        logits: (B, num_classes).
        effect: (B, num_classes), logits minus those of a fake attention: what the attention adds.
        features: (B, M C), what is classified, of length 1; float32.
        attention: (B, M, h, w), not negative.
    """

    logits: Tensor
    effect: Tensor
    features: Tensor
    attention: Tensor


class CALHead(nn.Module):
    """Part attention, bilinear attention pooling and a linear classifier without bias.

    Attention is `ReLU(BN(conv1x1(F)))`. Features are `sum(A_m * F_c) / (h w)` for each map m and channel c, then signed
    square roots, then scaled to length 1 over all M C of them. Logits are `W (100 f)`.

    Args:
        in_features: C, channels of the feature map.
        num_classes: number of classes; 0 for features alone.
        num_maps: M, attention maps.

    Raises:
        UsageError: no positive number of maps.

    Shape:
        (B, C, h, w) to `CALOutput`.
    """

    def __init__(self, in_features: int, num_classes: int, num_maps: int = 32) -> None:
        super().__init__()
        if type(num_maps) is not int or num_maps < 1:
            raise UsageError(f"num_maps is a number of attention maps, at least 1, not {num_maps!r}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_maps = num_maps
        self.attentions = nn.Sequential()
        self.attentions.add_module("conv", nn.Conv2d(in_features, num_maps, 1, bias=False))
        self.attentions.add_module("bn", nn.BatchNorm2d(num_maps, eps=1e-3))
        self.attentions.add_module("act", nn.ReLU())
        width = num_maps * in_features
        self.fc: nn.Module = nn.Linear(width, num_classes, bias=False) if num_classes else nn.Identity()

    def pool(self, features: Tensor, attention: Tensor) -> Tensor:
        """Feature map (B, C, h, w) and attention (B, M, h, w) to features (B, M C) of length 1, float32."""
        # sums over the map overflow fp16, and small ones vanish in it
        with without_autocast(features):
            pooled = torch.einsum("bmhw,bchw->bmc", attention.float(), features.float())
            pooled = (pooled / (features.shape[2] * features.shape[3])).flatten(1)
            return functional.normalize(pooled.sign() * (pooled.abs() + _ROOT_EPS).sqrt(), dim=1)

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, M C) of `pool` to logits (B, num_classes)."""
        logits: Tensor = self.fc(_SCALE * features)
        return logits

    def forward(self, features: Tensor, fake: Tensor | None = None) -> CALOutput:
        """Classify a feature map.

        Args:
            features: (B, C, h, w).
            fake: (B, M, h, w), the attention that the effect is measured against. None draws it from U(0, 2) in
                training mode, from torch's generator of the device, and is 1 everywhere in evaluation mode.
        """
        attention = self.attentions(features)
        if fake is None:
            # contiguous, so that the same draws land in the same places whatever the memory format
            fake = torch.ones(attention.shape, device=attention.device)
            fake = fake.uniform_(0, 2) if self.training else fake
        pooled = self.pool(features, attention)
        logits = self.classify(pooled)
        effect = logits - self.classify(self.pool(features, fake))
        return CALOutput(logits, effect, pooled, attention)


class CALClassifier(nn.Module):
    """A timm network whose classifier is a `CALHead` over its last feature map.

    Takes every network whose `forward_features` gives a map: convolutional ones, transformers with a grid of patches
    (class and register tokens are left out), channels first or last. Its own pooling and classifier are dropped, with
    all else that features do not pass through, so that no parameter stays without a gradient. The final norm that
    some transformers apply after pooling is applied to each patch.

    Args:
        backbone: the network; it is changed.
        num_classes: number of classes; 0 for features alone.
        num_maps: attention maps.
        views: what evaluation looks at: `raw`, the image as it is, or `full`, the image, its mirror image and
            three crops of each that the mean attention map makes: 8 forward passes, logits averaged.

    Raises:
        UsageError: a network without a spatial map, or an unknown option.

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
        self.num_features = self.head_hidden_size = probe.channels
        self.in_chans = probe.in_chans
        self.pretrained_cfg = self.default_cfg = getattr(backbone, "pretrained_cfg", None) or {}
        self.feature_info = [
            dict(info, module=f"{_HOST}{info['module']}") for info in getattr(backbone, "feature_info", ())
        ]
        self.num_classes = num_classes
        self._num_maps = num_maps
        self.head: CALHead
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) to the last feature map (B, C, h, w)."""
        features = self.backbone.forward_features(x)
        return as_feature_map(self.backbone, features, (x.shape[2], x.shape[3]), nhwc=self._nhwc)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map (B, C, h, w) to logits (B, num_classes), or to what is classified (B, M C)."""
        pooled = self.head.pool(x, self.head.attentions(x))
        return pooled if pre_logits else self.head.classify(pooled)

    def forward(self, x: Tensor, parts: bool = False) -> Tensor | CALOutput:
        """Images (B, channels, H, W) to logits (B, num_classes), or with `parts` to what `forward_parts` gives."""
        if parts:
            return self.forward_parts(x)
        if self.views == "full" and not self.training:
            return self._full(x)
        return self.forward_head(self.forward_features(x))

    def forward_parts(self, x: Tensor, fake: Tensor | None = None) -> CALOutput:
        """Images (B, channels, H, W) to all that the head makes of them; `fake` as `CALHead` takes it."""
        output: CALOutput = self.head(self.forward_features(x), fake)
        return output

    def _full(self, x: Tensor) -> Tensor:
        """The mean of the logits of 8 views, four at a time."""
        both = torch.cat((x, x.flip(3)))
        features = self.forward_features(both)
        attention = self.head.attentions(features)
        logits = self.head.classify(self.head.pool(features, attention))
        maps, size = image_views.mean_map(attention), (x.shape[2], x.shape[3])
        for threshold, padding in _CROPS:
            boxes = image_views.crop_boxes(maps, size, threshold, padding)
            logits = logits + self.forward_head(self.forward_features(image_views.crop(both, boxes)))
        plain, mirrored = logits.chunk(2)
        return (plain + mirrored) / (2 * (1 + len(_CROPS)))

    def adapt_state_dict(self, state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
        """Weights of ours or of the bare host, in any layout that timm reads, for this model.

        The host's classifier and what else was dropped with it are left out, so the bare host's weights come without
        a head. `model` is not used: filters of timm's are given it.
        """
        host, head = state_dict, {}
        if any(key.startswith(_HOST) for key in state_dict):
            host = {key.removeprefix(_HOST): value for key, value in state_dict.items() if key.startswith(_HOST)}
            head = {key: value for key, value in state_dict.items() if not key.startswith(_HOST)}
        adapt = getattr(self.backbone, "adapt_state_dict", None)
        adapt = adapt or getattr(sys.modules[type(self.backbone).__module__], "checkpoint_filter_fn", None)
        if adapt is not None:
            host = adapt(host, self.backbone)
        own = self.backbone.state_dict()
        if "norm.weight" not in host and "norm.weight" in own and "fc_norm.weight" in self._dropped:
            host = {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in host.items()}
        kept = {key: value for key, value in host.items() if key in own or key not in self._dropped}
        return {f"{_HOST}{key}": value for key, value in kept.items()} | head

    # -- what timm's optimisers and trainers ask of a model -----------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"{_HOST}{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer decay: the backbone's own."""

        def inside(pattern: str) -> str:
            # the backbone's patterns are matched at the start of a name, anchored or not
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
        """A new head for another number of classes; attention takes the place of pooling."""
        if global_pool not in (None, ""):
            raise UsageError(f"a CAL classifier pools by attention, it cannot pool by {global_pool!r}")
        self.num_classes = num_classes
        head = CALHead(self.num_features, num_classes, self._num_maps)
        self.head = head.to(next(self.backbone.parameters()).device)

    def set_input_size(self, img_size: tuple[int, int] | None = None, **options: Any) -> None:
        """Another input size; convolutional backbones take any, and transformers resample their positions."""
        if hasattr(self.backbone, "set_input_size"):
            self.backbone.set_input_size(img_size=img_size, **options)
