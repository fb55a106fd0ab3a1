"""The layers of ViTFS that timm does not have: stem, positions, batch norm of tokens, aggregator of blocks.

They can be traced, scripted and exported. The network is in `vitfs`.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers._fx import register_notrace_function
from torch import Tensor, nn

from animesion.errors import UsageError

#: Side of a patch in pixels.
PATCH = 16


@torch.fx.wrap
@register_notrace_function  # type: ignore[untyped-decorator]
def check_size(x: Tensor) -> Tensor:
    """Return images (B, C, H, W) unchanged if both sides are multiples of the patch size, 16 pixels.

    Raises:
        UsageError: a side is not a multiple.
    """
    if x.shape[-2] % 16 != 0 or x.shape[-1] % 16 != 0:
        raise UsageError(
            f"ViTFS splits images into patches of 16 pixels, got {x.shape[-2]} by {x.shape[-1]}: resize them"
        )
    return x


@torch.fx.wrap
@register_notrace_function  # type: ignore[untyped-decorator]
def sincos_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Fixed 2-D sin-cos position embedding of a grid (Chen et al., ICCV 2021, MoCo v3, without its class token).

    `[sin(x w_i), cos(x w_i), sin(y w_i), cos(y w_i)]` with `w_i = 10000^(-i / (D/4 - 1))`, i = 0 ... D/4 - 1; x counts
    columns and y rows, from 0.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        dim: D, a multiple of 4 and at least 8.
        device: device of the result.

    Returns:
        (height, width, D), float32.
    """
    steps = torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4 - 1)
    frequencies = 1.0 / 10000.0**steps
    x = torch.arange(width, device=device)[:, None] * frequencies  # (width, D/4)
    y = torch.arange(height, device=device)[:, None] * frequencies
    along_x = torch.cat([x.sin(), x.cos()], dim=1)[None, :, :].expand(height, -1, -1)
    along_y = torch.cat([y.sin(), y.cos()], dim=1)[:, None, :].expand(-1, width, -1)
    return torch.cat([along_x, along_y], dim=-1)


@torch.fx.wrap
@register_notrace_function  # type: ignore[untyped-decorator]
def mean_of_tokens(tokens: Tensor, skipped: int) -> Tensor:
    """Mean (B, D) of the tokens (B, N, D) after the first `skipped` ones.

    Raises:
        UsageError: no token is left after these.
    """
    if tokens.shape[1] <= skipped:
        raise UsageError(
            f"the original's register slice keeps {tokens.shape[1]} tokens of an image this small, all of them "
            "registers: give larger images, or pool_include_prefix=True"
        )
    return tokens[:, skipped:].mean(dim=1)


class TokenBatchNorm(nn.Module):
    """Batch norm of tokens, with statistics per channel over all tokens of the batch (arXiv 2507.12157).

    Args:
        dim: D.
        eps: added to the variance.
        momentum: momentum of the running statistics.

    Shape:
        (B, N, D) to (B, N, D). In training B * N must be at least 2.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, momentum: float = 0.1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        # a member, not a base class, because nn.SyncBatchNorm.convert_sync_batchnorm replaces nn.BatchNorm1d
        self.bn = nn.BatchNorm1d(dim, eps=eps, momentum=momentum, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        normed: Tensor = self.bn(x.flatten(0, 1))
        return normed.reshape(x.shape)


#: Name of a norm of tokens -> layer.
NORMS: dict[str, Any] = {"batchnorm": TokenBatchNorm, "layernorm": partial(nn.LayerNorm, eps=1e-6)}


class ConvStem(nn.Module):
    """Four 3x3 convolutions of stride 2 and a 1x1 convolution, in place of a 16x16 one (arXiv 2507.12157).

    Widths D/8, D/4, D/2, D, each convolution (with bias) followed by ReLU and then batch norm; the last one is linear.

    Args:
        img_size: side in pixels or (height, width), for the description of the model; images may have
            any multiple of 16.
        in_chans: channels of the images.
        embed_dim: D, a multiple of 8.

    Raises:
        UsageError: a size that is not a multiple of 16.

    Shape:
        (B, C, H, W) to (B, D, H / 16, W / 16).
    """

    strict_img_size = False

    def __init__(self, img_size: int | tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = (PATCH, PATCH)
        self.set_input_size(img_size)
        widths = [in_chans, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    OrderedDict(
                        conv=nn.Conv2d(before, after, 3, stride=2, padding=1),
                        act=nn.ReLU(inplace=True),
                        norm=nn.BatchNorm2d(after),
                    )
                )
                for before, after in pairwise(widths)
            )
        )
        self.proj = nn.Conv2d(embed_dim, embed_dim, 1, bias=False)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the described size: `img_size`, `grid_size` and `num_patches`."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        if height % PATCH or width % PATCH or min(height, width) < PATCH:
            raise UsageError(f"ViTFS needs an img_size in multiples of {PATCH} pixels, not {height} by {width}")
        self.img_size = (height, width)
        self.grid_size = (height // PATCH, width // PATCH)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Side of a patch in pixels, one number or (height, width)."""
        return PATCH if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid (rows, columns) of an image of (height, width) pixels."""
        return img_size[0] // PATCH, img_size[1] // PATCH

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, D, H / 16, W / 16)."""
        patches: Tensor = self.proj(self.stages(check_size(x)))
        return patches


class LayerAggregator(nn.Module):
    """Combines the outputs of n successive blocks, separately for each channel (`dca` in the original).

    Batch norm, depthwise convolution with a kernel over the n blocks, batch norm, GELU.

    Args:
        dim: D.
        blocks: n.

    Shape:
        (B, N, D, n), first block first, to (B, N, D).
    """

    def __init__(self, dim: int, blocks: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim, (1, blocks), groups=dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D, n) to (B, N, D)."""
        x = self.norm1(x.transpose(1, 2))  # (B, D, N, n)
        x = self.act(self.norm2(self.conv(x)))  # (B, D, N, 1)
        return x.squeeze(-1).transpose(1, 2)
