"""VAN: convolutional networks with attention over large kernels (Guo et al., arXiv 2202.09741), registered with timm.

timm has no VAN. Names of modules are those of the released weights, so these load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import create_classifier
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.models.factory import build_model
from animesion_training.tokens.annotations import with_types

#: Name -> width and number of blocks of each stage (table 2 of the paper).
VANS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "van_b0": ((32, 64, 160, 256), (3, 3, 5, 2)),
    "van_b1": ((64, 128, 320, 512), (2, 2, 4, 2)),
    "van_b2": ((64, 128, 320, 512), (3, 3, 12, 3)),
    "van_b3": ((64, 128, 320, 512), (3, 5, 27, 3)),
}

#: Width of the hidden layer of each stage's MLP, as a multiple.
_RATIOS = (8, 8, 4, 4)

#: Initial value of the factors of each branch.
_SCALE = 1e-2


class LargeKernelAttention(nn.Module):
    """Attention by a decomposed 21 x 21 convolution, multiplied with its input (equations 1 and 2 of the paper).

    A depthwise 5 x 5 convolution, a depthwise 7 x 7 one with dilation 3, and a 1 x 1 convolution.

    Args:
        width: channels.

    Shape:
        (B, D, H, W) to the same.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.conv_spatial = nn.Conv2d(width, width, 7, padding=9, dilation=3, groups=width)
        self.conv1 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh each value by its large neighbourhood."""
        weighed: Tensor = x * self.conv1(self.conv_spatial(self.conv0(x)))
        return weighed


class _Attention(nn.Module):
    """1 x 1, GELU, attention, 1 x 1, and the input added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LargeKernelAttention(width)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = x + self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))
        return attended


class _Depthwise(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    """1 x 1, depthwise 3 x 3, GELU, 1 x 1."""

    def __init__(self, width: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.dwconv = _Depthwise(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, width, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.dwconv(self.fc1(x))))
        return self.drop(self.fc2(x))  # type: ignore[no-any-return]


class VanBlock(nn.Module):
    """Attention and MLP, each after a batch norm, scaled by channel and added.

    Args:
        width: channels.
        ratio: width of the hidden layer of the MLP, as a multiple.
        drop: dropout in the MLP.
        drop_path: stochastic depth of each branch.

    Shape:
        (B, D, H, W) to the same.
    """

    def __init__(self, width: int, ratio: int, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.attn = _Attention(width)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = _Mlp(width, width * ratio, drop)
        self.layer_scale_1 = nn.Parameter(_SCALE * torch.ones(width))
        self.layer_scale_2 = nn.Parameter(_SCALE * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Two residual branches."""
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class _PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and batch norm."""

    def __init__(self, before: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))  # type: ignore[no-any-return]


class VAN(nn.Module):
    """Visual attention network: four stages of `VanBlock` (Guo et al., arXiv 2202.09741).

    Stages have strides 4, 8, 16 and 32. Each begins with overlapping patches and ends in a layer norm over channels.

    Args:
        widths: channels of the four stages.
        depths: number of blocks of each.
        num_classes: number of classes; 0 for pooled features.
        in_chans: channels of the images.
        global_pool: `avg`, `max`, `avgmax`, `catavgmax`, or empty for no pooling.
        drop_rate: dropout in the MLPs and before the classifier.
        drop_path_rate: stochastic depth of the last block; that of block i of n is `drop_path_rate * i / (n - 1)`.
        output_stride: 32; dilated stages are not supported.

    Raises:
        UsageError: other than four stages, or another output stride.

    Shape:
        (B, C, H, W) to logits (B, num_classes).
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or len(depths) != 4 or min(*widths, *depths) < 1:
            raise UsageError(
                f"VAN has four stages of one block or more: give four widths and four depths, not {list(widths)} and "
                f"{list(depths)}"
            )
        if output_stride != 32:
            raise UsageError(f"VAN has output stride 32 only, not {output_stride}: use an earlier feature map")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        blocks = sum(depths)
        rates = iter([drop_path_rate * i / max(1, blocks - 1) for i in range(blocks)])
        before = in_chans
        for stage, (width, depth, ratio) in enumerate(zip(widths, depths, _RATIOS, strict=True), start=1):
            kernel, stride = (7, 4) if stage == 1 else (3, 2)
            setattr(self, f"patch_embed{stage}", _PatchEmbed(before, width, kernel, stride))
            setattr(
                self,
                f"block{stage}",
                nn.Sequential(*(VanBlock(width, ratio, drop_rate, next(rates)) for _ in range(depth))),
            )
            setattr(self, f"norm{stage}", LayerNorm2d(width, eps=1e-6))
            before = width
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": 4 << place, "module": f"norm{place + 1}"}
            for place, width in enumerate(widths)
        ]
        self.num_features = before
        self.global_pool, self.head = create_classifier(before, num_classes, pool_type=global_pool)
        self.head_hidden_size = before * self.global_pool.feat_mult()
        self.init_weights()

    def init_weights(self) -> None:
        """Set the initial values: normal by fan out for convolutions, truncated normal for the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        x = self.get_submodule(f"patch_embed{stage}")(x)
        blocks = self.get_submodule(f"block{stage}")
        x = checkpoint_seq(blocks, x) if self.grad_checkpointing and self.training else blocks(x)
        return self.get_submodule(f"norm{stage}")(x)  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last map (B, D, ceil(H / 32), ceil(W / 32))."""
        for stage in (1, 2, 3, 4):
            x = self._stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map (B, D, h, w) to logits (B, num_classes), or to the input of the classifier (B, D)."""
        x = self.global_pool(x)
        x = functional.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    @with_types
    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
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
            x: images (B, C, H, W).
            indices: the last n stages, or these stages (0 to 3, negative from the end); None for all.
            norm: has no effect: a stage ends in a layer norm.
            stop_early: compute no stage after the last chosen one.
            output_fmt: `NCHW`.
            intermediates_only: return no last map.

        Returns:
            `(last map, [(B, D_i, H / 2^(i+2), W / 2^(i+2)), ...])`, or the list alone.

        Raises:
            UsageError: another format.
        """
        if output_fmt != "NCHW":
            raise UsageError(f"VAN returns features as NCHW, not as {output_fmt}")
        taken, last = feature_take_indices(4, indices)
        intermediates = []
        for place in range(last + 1 if stop_early else 4):
            x = self._stage(place + 1, x)
            if place in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    # -- timm's interface ----------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the chosen intermediates do not need, and the head; return the chosen stages."""
        taken: list[int]
        taken, last = feature_take_indices(4, indices)
        for stage in range(last + 2, 5):
            for name in ("patch_embed", "block", "norm"):
                setattr(self, f"{name}{stage}", nn.Sequential())
        if last < 3:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < 3:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer decay."""
        if coarse:
            return {"stem": r"^patch_embed1\.", "blocks": r"^(?:patch_embed|block|norm)(\d+)"}
        return {
            "stem": r"^patch_embed1\.",
            "blocks": [(r"^block(\d+)\.(\d+)", None), (r"^(?:patch_embed|norm)(\d+)", (0,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory; batch norms include each batch twice in their running statistics, as in timm."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        classifier: nn.Module = self.head
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one for another number of classes (0 for none), and optionally the pooling."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, head = create_classifier(self.num_features, num_classes, pool_type=pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = head.to(next(self.parameters())).train(self.training)
        self.global_pool.train(self.training)


def _cfg(**settings: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2202.09741",
        **settings,
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in VANS})


def _create(name: str, pretrained: bool, **options: Any) -> Any:
    widths, depths = VANS[name]
    settings: dict[str, Any] = {"widths": widths, "depths": depths}
    return build_model(VAN, name, pretrained, **settings | options)


@register_model
def van_b0(pretrained: bool = False, **options: Any) -> Any:
    """VAN-B0: widths 32 to 256, 13 blocks."""
    return _create("van_b0", pretrained, **options)


@register_model
def van_b1(pretrained: bool = False, **options: Any) -> Any:
    """VAN-B1: widths 64 to 512, 10 blocks."""
    return _create("van_b1", pretrained, **options)


@register_model
def van_b2(pretrained: bool = False, **options: Any) -> Any:
    """VAN-B2: widths 64 to 512, 21 blocks."""
    return _create("van_b2", pretrained, **options)


@register_model
def van_b3(pretrained: bool = False, **options: Any) -> Any:
    """VAN-B3: widths 64 to 512, 38 blocks."""
    return _create("van_b3", pretrained, **options)
