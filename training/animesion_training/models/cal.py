"""Counterfactual attention learning (CAL) on any timm network with a spatial map: head, wrapper, centers and loss.

Rao et al., "Counterfactual Attention Learning for Fine-Grained Visual Categorization and Re-identification", ICCV 2021
(arXiv 2108.08728), as the teachers of TGDA (Rios et al., arXiv 2507.12157) have it. Crops and drops of images are
made in `views`, the steps of training in `steps`.
"""

from __future__ import annotations

import copy
import re
import sys
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.data import views as image_views
from animesion_training.losses.classification import SoftmaxObjective
from animesion_training.options import in_range
from animesion_training.tokens.host import without_autocast

_HOST = "backbone."
_ANCHOR = re.compile(r"(?<!\[)\^")
#: Keeps the slope of the square root finite at 0.
_ROOT_EPS = 1e-6
#: What pooled features of length 1 are multiplied with before the classifier.
_SCALE = 100.0
#: Sizes that the trial falls back on, for networks with windows that were built for another size than published.
_TRIAL_SIZES = ((256, 256), (128, 128), (192, 192), (384, 384), (448, 448), (512, 512))
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
        _without_classifier(backbone)
        trial = _Trial(backbone)
        self._nhwc = trial.nhwc
        trial.drop_unused(backbone)
        self._dropped = frozenset(before - set(backbone.state_dict()))
        self.backbone: Any = backbone
        self.views = views
        self.num_features = self.head_hidden_size = trial.channels
        self.in_chans = trial.in_chans
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
        return _as_map(self.backbone, features, (x.shape[2], x.shape[3]), nhwc=self._nhwc)

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


# -- what a backbone gives -------------------------------------------------------------------------------------------


class _Trial:
    """One pass of a copy without memory (device meta): which map features have, and which parameters they use."""

    def __init__(self, backbone: nn.Module) -> None:
        config = getattr(backbone, "pretrained_cfg", None) or {}
        channels, *size = config.get("input_size") or (3, 224, 224)
        given = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
        self.in_chans: int = getattr(backbone, "in_chans", channels)
        self.nhwc = getattr(backbone, "output_fmt", None) == "NHWC"
        shadow, features = self._run(backbone, [tuple(given or size), *_TRIAL_SIZES])
        self.channels = int(features.shape[1])
        used = _leaves(features)
        pairs = zip(backbone.parameters(), shadow.parameters(), strict=True)
        self._used = {id(parameter) for parameter, shade in pairs if id(shade) in used}

    def _run(self, backbone: nn.Module, sizes: list[tuple[int, int]]) -> tuple[nn.Module, Tensor]:
        """The copy and its feature map of images of the first size that it takes: some have windows that must fit."""
        reasons = []
        with torch.inference_mode(False), torch.enable_grad():
            shadow: Any = _on_meta(backbone)
            for size in sizes:
                images = torch.empty(2, self.in_chans, *size, device="meta")
                try:
                    return shadow, _as_map(shadow, shadow.forward_features(images), size, nhwc=self.nhwc)
                except (AttributeError, RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
                    reasons.append((str(error).splitlines() or [type(error).__name__])[0])
        raise UsageError(f"{type(backbone).__name__} gives no feature map to attend to: {reasons[0]}")

    def drop_unused(self, module: nn.Module) -> None:
        """Put an identity in the place of modules whose parameters features do not pass through."""
        for name, child in list(module.named_children()):
            own = {id(parameter) for parameter in child.parameters()}
            if own and not own & self._used:
                setattr(module, name, nn.Identity())
            else:
                self.drop_unused(child)


def _without_classifier(backbone: Any) -> None:
    name = type(backbone).__name__
    if not hasattr(backbone, "reset_classifier") or not hasattr(backbone, "forward_features"):
        raise UsageError(f"a CAL classifier needs a network of timm's kind, {name} has no forward_features")
    try:
        backbone.reset_classifier(0, "")
    except (TypeError, AssertionError, ValueError) as error:
        raise UsageError(f"{name} cannot do without its pooling, so it gives no feature map: {error}") from error
    norm, after_pool = getattr(backbone, "norm", None), getattr(backbone, "fc_norm", None)
    if isinstance(norm, nn.Identity) and after_pool is not None and not isinstance(after_pool, nn.Identity):
        backbone.norm, backbone.fc_norm = after_pool, norm


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes and no memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo).eval()


def _leaves(result: Tensor) -> set[int]:
    """Ids of the parameters that a result comes from."""
    leaves, seen, open_nodes = set(), set(), [result.grad_fn]
    while open_nodes:
        node: Any = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        open_nodes.extend(parent for parent, _ in node.next_functions)
    return leaves


def _as_map(backbone: Any, features: Any, size: tuple[int, ...], *, nhwc: bool) -> Tensor:
    """What `forward_features` gave for images of a size (H, W), as (B, C, h, w)."""
    if isinstance(features, Tensor) and features.ndim == 4:
        return features.permute(0, 3, 1, 2) if nhwc else features
    if not isinstance(features, Tensor) or features.ndim != 3:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"{type(backbone).__name__} gives no feature map to attend to, but {shape}")
    patches = features[:, getattr(backbone, "num_prefix_tokens", 0) or 0 :]
    batch, count, channels = patches.shape
    return patches.transpose(1, 2).reshape(batch, channels, *_grid(backbone, count, size))


def _grid(backbone: Any, count: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of so many patches."""
    embed: Any = getattr(backbone, "patch_embed", None)
    if hasattr(embed, "dynamic_feat_size"):
        height, width = embed.dynamic_feat_size(size)
        if height * width == count:
            return height, width
    # reduced on the way, or of another kind: the grid has the image's aspect
    height = max(1, round((count * size[0] / size[1]) ** 0.5))
    if count % height:
        raise UsageError(
            f"{type(backbone).__name__} gives {count} tokens for images of {size[0]}x{size[1]}, which make no grid"
        )
    return height, count // height


# -- the loss --------------------------------------------------------------------------------------------------------


class FeatureCenters(nn.Module):
    """A running center of each class's features, which training pulls them to.

    A call gives `c_y`, the center of each sample's class scaled to length 1 as it was before the call, and in training
    mode moves the center itself by `rate * (f - c_y)`. Where a class has several samples in the batch, the last one
    counts alone, as in the original; on any device, and over the batches of all processes in the order of their ranks.
    Centers start at 0. (arXiv 2507.12157; center loss: Wen et al., ECCV 2016.)

    Args:
        num_classes: number of classes.
        width: of the features, M C.
        rate: share of the way.

    Shape:
        features (B, width) and class ids (B,) int64 to (B, width), float32, without a gradient.
    """

    centers: Tensor

    def __init__(self, num_classes: int, width: int, rate: float = 0.05) -> None:
        super().__init__()
        self.rate = in_range("rate", rate, low=0.0, high=1.0)
        self.register_buffer("centers", torch.zeros(num_classes, width))

    @torch.no_grad()
    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        read = functional.normalize(self.centers[targets], dim=1)
        if self.training:
            step, moved = self.rate * (features.to(read) - read), targets
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                step, moved = _of_all_processes(step), _of_all_processes(targets)
            later = (moved[:, None] == moved).triu(1).any(1)
            # a class has one step that is not 0, so that the order of additions, which GPUs choose, has no say
            self.centers.index_add_(0, moved, step.masked_fill(later[:, None], 0.0))
        return read


def _of_all_processes(rows: Tensor) -> Tensor:
    """Rows (B, ...) of every process, by rank; B may differ."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(counts).max())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([each[: int(count)] for each, count in zip(gathered, counts, strict=True)])


def center_loss(features: Tensor, centers: Tensor) -> Tensor:
    """Squared distance of features (B, D) from their centers (B, D), mean over the batch, sum over D; a scalar."""
    return (features.float() - centers).square().sum() / max(1, len(features))


def cal_loss(
    raw: CALOutput, aug: CALOutput, targets: Tensor, centers: nn.Module, *, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """What a CAL classifier is trained on: images and the views that its own attention made of them.

    `CE(raw) / 3 + 2/3 CE(aug) + CE(effects of both) + center_loss(features of raw)`, arXiv 2507.12157. The second and
    third are means over 2 B and 3 B.

    Args:
        raw: of the images, B of them.
        aug: of the views, 2 B: crops, then drops.
        targets: (B,), int64, class ids.
        centers: a `FeatureCenters`; in training mode it moves.
        label_smoothing: of all three cross-entropies, 0..1.

    Returns:
        The terms `label`, `views`, `effect` and `center`, scalars with their weights; their sum is the loss.

    Raises:
        UsageError: soft labels: the centers need one class an image.
        ValueError: views that are no multiple of the images.
    """
    if targets.is_floating_point():
        raise UsageError("a CAL classifier is trained on one class an image; switch MixUp and CutMix off")
    times, rest = divmod(len(aug.logits), max(1, len(targets)))
    if rest:
        raise ValueError(f"{len(aug.logits)} views are no multiple of {len(targets)} images")
    cross_entropy = SoftmaxObjective(label_smoothing=label_smoothing)
    repeated = targets.repeat(times)
    effects = torch.cat((raw.effect, aug.effect))
    return {
        "label": cross_entropy(raw.logits, targets) / 3,
        "views": cross_entropy(aug.logits, repeated) * 2 / 3,
        "effect": cross_entropy(effects, torch.cat((targets, repeated))),
        "center": center_loss(raw.features, centers(raw.features, targets)),
    }
