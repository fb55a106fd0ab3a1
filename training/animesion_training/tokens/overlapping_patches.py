"""Patches that overlap (TransFG): a patch embedding whose stride is smaller than its patch."""

from __future__ import annotations

from typing import Any

from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from animesion.errors import UsageError
from animesion_training.options import whole_number


class OverlappingPatchEmbed(PatchEmbed):
    """timm's patch embedding with a stride smaller than the patch; pixels after the last patch are left out.

    Args:
        plain: the patch embedding whose weights it uses.
        stride: distance between neighbouring patches in pixels.
        img_size: (height, width) of images in pixels.

    Shape:
        (B, C, H, W) to (B, N, D), with `(side - patch) // stride + 1` patches per side.
    """

    def __init__(self, plain: Any, stride: int, img_size: tuple[int, int]) -> None:
        self.stride = (stride, stride)  # before the base class, which computes the grid
        conv = plain.proj
        super().__init__(
            img_size,
            plain.patch_size,
            conv.in_channels,
            conv.out_channels,
            bias=conv.bias is not None,
            strict_img_size=plain.strict_img_size,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.proj, self.norm = conv, plain.norm
        self.proj.stride = self.stride

    def _init_img_size(self, img_size: Any) -> Any:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = self.dynamic_feat_size((height, width))
        return (height, width), grid, grid[0] * grid[1]

    def dynamic_feat_size(self, img_size: Any) -> tuple[int, int]:
        """The grid (rows, columns) of patches for images of (height, width) pixels."""
        rows, columns = (
            (side - patch) // stride + 1
            for side, patch, stride in zip(img_size, self.patch_size, self.stride, strict=True)
        )
        return rows, columns

    def feat_ratio(self, as_scalar: bool = True) -> Any:
        """Distance between neighbouring patches in pixels, one number or (height, width)."""
        return max(self.stride) if as_scalar else self.stride


def overlap_patches(backbone: Any, stride: int, img_size: tuple[int, int] | None = None) -> None:
    """Make a transformer use overlapping patches (TransFG, arXiv 2103.07976); positions are resampled to the new grid.

    Args:
        backbone: a timm VisionTransformer; modified in place. Its patch embedding keeps its weights.
        stride: distance between neighbouring patches in pixels, at most the side of a patch; 12 of 16 in the paper.
        img_size: new (height, width) of images in pixels, None for the same.

    Raises:
        UsageError: an invalid stride, or a patch embedding that is not timm's plain one.
    """
    plain = backbone.patch_embed
    whole_number("patch stride", stride)
    if type(plain) is not PatchEmbed or not plain.flatten or plain.dynamic_img_pad:
        raise UsageError(f"overlapping patches need timm's plain patch embedding, not {type(plain).__name__}")
    if stride > min(plain.patch_size):
        raise UsageError(f"patch stride {stride} leaves out pixels between patches of {min(plain.patch_size)}")
    backbone.patch_embed = OverlappingPatchEmbed(plain, stride, img_size or plain.img_size)
    for info in backbone.feature_info:
        info["reduction"] = stride
    if backbone.pos_embed is not None and backbone.patch_embed.grid_size != plain.grid_size:
        positions = resample_abs_pos_embed(
            backbone.pos_embed.detach(),
            new_size=list(backbone.patch_embed.grid_size),
            old_size=list(plain.grid_size),
            num_prefix_tokens=0 if backbone.no_embed_class else backbone.num_prefix_tokens,
        )
        backbone.pos_embed = nn.Parameter(positions, requires_grad=backbone.pos_embed.requires_grad)
