"""LRNet: residual networks for small images, with five stages and no max-pooling, registered with timm.

A 3x3 stem of stride 2 is followed by stages with cumulative strides 2, 4, 8, 16 and 32. ResNets reduce the map to
stride 4 by a 7x7 stem and max-pooling; here it keeps stride 2 for one more stage, at about the cost of a ResNet (arXiv
2507.12157). Blocks and shortcuts are timm's own. The original's checkpoints are read by `originals.lrnet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers._fx import register_notrace_function
from timm.layers.classifier import create_classifier
from timm.layers.drop import DropPath
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, downsample_avg, downsample_conv
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.models.factory import build_model
from animesion_training.tokens.annotations import with_types

#: Name of a block -> timm's class.
BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}

#: Widths: of each stage before the block's expansion, of the stem, and inside the stem of the `d` variants.
CHANNELS = (64, 64, 128, 256, 512)
STEM_WIDTH = 32
DEEP_STEM_WIDTH = 18

_STAGES = ("layer1", "layer2", "layer3", "layer4", "layer5")


@torch.fx.wrap
@register_notrace_function  # type: ignore[untyped-decorator]
def check_size(x: Tensor) -> Tensor:
    """Return images (B, C, H, W) unchanged if both sides have at least 32 pixels, the cumulative stride.

    Raises:
        UsageError: a side is shorter, so that the last stages would work on a map of one pixel.
    """
    if x.shape[-2] < 32 or x.shape[-1] < 32:
        raise UsageError(
            f"LRNet needs images of at least 32 pixels per side, got {x.shape[-2]} by {x.shape[-1]}: resize them"
        )
    return x


class LRNet(nn.Module):
    """A residual network of five stages without max-pooling (LRNet, arXiv 2507.12157).

    Stem: 3x3 convolution of stride 2, batch norm, ReLU. Stages: residual blocks, the first of stages 2 to 5 with
    stride 2. Head: global pooling, linear. Shortcuts are 1x1 convolutions with batch norm where stride or width
    change. Initial values: Kaiming normal (fan out) for convolutions, zero for the last batch norm of each block.

    Args:
        block: `basic` (3x3-3x3) or `bottleneck` (1x1-3x3-1x1, output four times as wide).
        layers: number of blocks in each of the five stages.
        num_classes: number of classes; 0 for pooled features.
        in_chans: channels of the images.
        global_pool: `avg`, `max`, `avgmax`, `catavgmax`, or empty for no pooling.
        channels: width of each stage, before the block's expansion.
        stem_width: output channels of the stem.
        resnet_d: the stem and shortcuts of ResNet-D (He et al., CVPR 2019): three 3x3 convolutions, and average
            pooling before a 1x1 convolution of stride 1.
        deep_stem_width: channels inside the stem of `resnet_d`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; that of block i of n is `drop_path_rate * i / (n - 1)`.
        output_stride: 32; dilated stages are not supported.

    Raises:
        UsageError: an unknown block, a number of stages other than five, or another output stride.

    Shape:
        (B, C, H, W) with H, W >= 32 to logits (B, num_classes).
    """

    def __init__(
        self,
        block: str,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        channels: Sequence[int] = CHANNELS,
        stem_width: int = STEM_WIDTH,
        resnet_d: bool = False,
        deep_stem_width: int = DEEP_STEM_WIDTH,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise UsageError(f"LRNet has no block {block!r}: there are {', '.join(BLOCKS)}")
        if len(layers) != len(_STAGES) or len(channels) != len(_STAGES) or min(*layers, *channels) < 1:
            raise UsageError(
                f"LRNet has five stages of one block or more: give five layers and five channels, not {list(layers)} "
                f"and {list(channels)}"
            )
        if output_stride != 32:
            raise UsageError(f"LRNet has output stride 32 only, not {output_stride}: use an earlier feature map")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv1 = _stem(in_chans, deep_stem_width if resnet_d else 0, stem_width)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.act1 = nn.ReLU(inplace=True)

        kind = BLOCKS[block]
        widths = [stem_width, *(width * kind.expansion for width in channels)]
        blocks = sum(layers)
        rates = iter([drop_path_rate * i / (blocks - 1) for i in range(blocks)])  # consumed stage by stage
        strides = (1, 2, 2, 2, 2)
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = (
            _stage(kind, before, width, stride, list(islice(rates, number)), resnet_d)
            for before, width, stride, number in zip(widths[:-1], channels, strides, layers, strict=True)
        )
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (place + 1), "module": name}
            for place, (name, width) in enumerate(zip(_STAGES, widths[1:], strict=True))
        ]

        self.num_features = widths[-1]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    def init_weights(self) -> None:
        """Set the initial values of convolutions and of the last batch norm of each block."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck):
                module.zero_init_last()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last map (B, D, ceil(H / 32), ceil(W / 32)).

        Raises:
            UsageError: a side is shorter than 32 pixels.
        """
        x = self.act1(self.bn1(self.conv1(check_size(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            stages = [self.layer1, self.layer2, self.layer3, self.layer4, self.layer5]
            x = checkpoint_seq(stages, x, flatten=True)
        else:
            # written out, because torch.jit cannot script a loop over modules by name
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
            x = self.layer4(x)
            x = self.layer5(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map (B, D, h, w) to logits (B, num_classes), or to the input of the classifier (B, D)."""
        x = self.global_pool(x)
        x = functional.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    @with_types
    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), H and W >= 32, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of chosen stages, and the last one.

        Args:
            x: images (B, C, H, W), H and W >= 32.
            indices: the last n stages, or these stages (0 to 4, negative from the end); None for all.
            norm: has no effect, as in timm's ResNet: a stage ends in an activation.
            stop_early: compute no stage after the last chosen one.
            output_fmt: `NCHW`.
            intermediates_only: return no last map.

        Returns:
            `(last map, [(B, D_i, H / 2^(i+1), W / 2^(i+1)), ...])`, or the list alone.

        Raises:
            UsageError: another format, or images that are too small.
        """
        if output_fmt != "NCHW":
            raise UsageError(f"LRNet returns features as NCHW, not as {output_fmt}")
        taken, last = feature_take_indices(len(_STAGES), indices)
        x = self.act1(self.bn1(self.conv1(check_size(x))))
        intermediates = []
        for place, name in enumerate(_STAGES[: last + 1] if stop_early else _STAGES):
            stage = self.get_submodule(name)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if place in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    # -- timm's interface ----------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the chosen intermediates do not need, and the head; return the chosen stages."""
        taken: list[int]
        taken, last = feature_take_indices(len(_STAGES), indices)
        for name in _STAGES[last + 1 :]:
            setattr(self, name, nn.Sequential())
        if last + 1 < len(_STAGES):
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last + 1 < len(_STAGES):
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups by depth, for layer decay."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory; batch norms include each batch twice in their running statistics, as in timm."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        classifier: nn.Module = self.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one for another number of classes (0 for none), and optionally the pooling."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, fc = create_classifier(self.num_features, num_classes, pool_type=pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc = fc.to(self.bn1.weight).train(self.training)
        self.global_pool.train(self.training)


def _stem(in_chans: int, inner: int, width: int) -> nn.Module:
    """One 3x3 convolution of stride 2, or with `inner` channels three 3x3 convolutions, the first of stride 2."""
    if not inner:
        return nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(
        nn.Conv2d(in_chans, inner, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, width, 3, padding=1, bias=False),
    )


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_width: int,
    width: int,
    stride: int,
    rates: list[float],
    average: bool,
) -> nn.Sequential:
    """One block per rate of stochastic depth, the first with `stride`, and with a shortcut if it needs one."""
    out = width * block.expansion
    blocks = nn.Sequential()
    for place, rate in enumerate(rates):
        shortcut = None
        if place == 0 and (stride != 1 or in_width != out):
            shortcut = (downsample_avg if average else downsample_conv)(in_width, out, kernel_size=1, stride=stride)
        blocks.append(
            block(
                in_width if place == 0 else out,
                width,
                stride if place == 0 else 1,
                shortcut,
                drop_path=DropPath(rate) if rate > 0 else None,
            )
        )
    return blocks


def _cfg(**settings: Any) -> dict[str, Any]:
    """A config of timm; no weights were published, input and normalisation are those of the paper's students."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 128, 128),
        "pool_size": (4, 4),
        "crop_pct": 0.746,  # resize to int(1.34 * side), then a centre crop
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "paper_ids": "arXiv:2507.12157",
        **settings,
    }


#: Registered name without `d` -> block, and number of blocks per stage.
LRNETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "lrnet14": ("basic", (1, 2, 1, 1, 1)),
    "lrnet18": ("basic", (2, 2, 2, 1, 1)),
    "lrnet26": ("bottleneck", (2, 2, 2, 1, 1)),
    "lrnet50": ("bottleneck", (3, 3, 3, 4, 3)),
}

_cfgs: dict[str, Any] = {name: _cfg() for name in LRNETS}
_cfgs |= {f"{name}d": _cfg(first_conv="conv1.0") for name in LRNETS}
default_cfgs = generate_default_cfgs(_cfgs)


def _create(name: str, pretrained: bool, **options: Any) -> Any:
    block, layers = LRNETS[name.removesuffix("d")]
    settings: dict[str, Any] = {"block": block, "layers": layers, "resnet_d": name.endswith("d")}
    return build_model(LRNet, name, pretrained, **settings | options)


@register_model
def lrnet14(pretrained: bool = False, **options: Any) -> Any:
    """LRNet-14: basic blocks (1, 2, 1, 1, 1)."""
    return _create("lrnet14", pretrained, **options)


@register_model
def lrnet18(pretrained: bool = False, **options: Any) -> Any:
    """LRNet-18: basic blocks (2, 2, 2, 1, 1)."""
    return _create("lrnet18", pretrained, **options)


@register_model
def lrnet26(pretrained: bool = False, **options: Any) -> Any:
    """LRNet-26: bottleneck blocks (2, 2, 2, 1, 1)."""
    return _create("lrnet26", pretrained, **options)


@register_model
def lrnet50(pretrained: bool = False, **options: Any) -> Any:
    """LRNet-50: bottleneck blocks (3, 3, 3, 4, 3)."""
    return _create("lrnet50", pretrained, **options)


@register_model
def lrnet14d(pretrained: bool = False, **options: Any) -> Any:
    """LRNet-14 with the stem and shortcuts of ResNet-D."""
    return _create("lrnet14d", pretrained, **options)


@register_model
def lrnet18d(pretrained: bool = False, **options: Any) -> Any:
    """LRNet-18 with the stem and shortcuts of ResNet-D."""
    return _create("lrnet18d", pretrained, **options)


@register_model
def lrnet26d(pretrained: bool = False, **options: Any) -> Any:
    """LRNet-26 with the stem and shortcuts of ResNet-D."""
    return _create("lrnet26d", pretrained, **options)


@register_model
def lrnet50d(pretrained: bool = False, **options: Any) -> Any:
    """LRNet-50 with the stem and shortcuts of ResNet-D."""
    return _create("lrnet50d", pretrained, **options)
