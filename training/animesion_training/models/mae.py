"""Masked autoencoding: a vision transformer encodes a few patches of an image, and a decoder restores the others.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv 2111.06377). The step of training is in
`engine.masked`. The decoder belongs to the run: what is kept is the transformer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.data import seeds
from animesion_training.options import whole_number

#: Added to the variance of a patch before the division.
_EPS = 1e-6


class Division(NamedTuple):
    """How the patches of each image are divided.

    Attributes:
        visible: numbers of the patches that are encoded, ascending, (B, V) int64.
        masked: numbers of the others, ascending, (B, N - V) int64.
    """

    visible: Tensor
    masked: Tensor


def divide(sample_seeds: Tensor, patches: int, share: float) -> Division:
    """Mask a uniformly random set of patches of each image, section 3 of the paper.

    Args:
        sample_seeds: (B,), int64; a seed always gives the same division.
        patches: N, number of patches.
        share: of the patches that are masked; at least one is masked and one is visible.

    Raises:
        UsageError: fewer than two patches.
    """
    if patches < 2:
        raise UsageError(f"an image of {patches} patch has nothing to mask: give larger images or smaller patches")
    kept = min(max(1, round(patches * (1 - share))), patches - 1)
    # the sort is stable: equal numbers, which are rare, keep their order on every device
    order = seeds.tensor_uniforms(sample_seeds, patches, seeds.MASKS).argsort(dim=1, stable=True)
    return Division(order[:, :kept].sort(1).values, order[:, kept:].sort(1).values)


def encode(host: VisionTransformer, images: Tensor, visible: Tensor) -> Tensor:
    """Encode the visible patches with the class token and registers.

    Args:
        host: a timm VisionTransformer of P prefix tokens and width D.
        images: (B, C, H, W).
        visible: numbers of patches, (B, V).

    Returns:
        (B, P + V, D), after the final norm.
    """
    embedded: Any = host.patch_embed(images)
    x: Tensor = host._pos_embed(embedded)  # (B, P + N, D)
    prefix, patches = x[:, : host.num_prefix_tokens], x[:, host.num_prefix_tokens :]
    x = torch.cat((prefix, patches.gather(1, visible[:, :, None].expand(-1, -1, x.shape[2]))), dim=1)
    x = host.norm_pre(x)
    for block in host.blocks:
        x = block(x)
    result: Tensor = host.norm(x)
    return result


class Decoder(nn.Module):
    """Restores the pixels of all patches from the encoded visible ones.

    A linear layer, fixed sine and cosine positions, plain transformer blocks, a norm and a linear layer; a learned
    vector stands for each masked patch. Section 3 of the paper.

    Args:
        in_features: D, width of the encoder.
        grid: rows and columns of patches.
        patch: height and width of a patch in pixels.
        channels: of the images.
        width: of the decoder, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: of each block.

    Raises:
        UsageError: a number below 1, or a width that is no such multiple.
    """

    position: Tensor

    def __init__(
        self,
        in_features: int,
        grid: tuple[int, int],
        patch: tuple[int, int],
        channels: int,
        *,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("depth", depth), ("heads", heads)):
            whole_number(f"pretrain.decoder_{name}", value)
        if width % 4 or width % heads:
            raise UsageError(f"pretrain.decoder_width is {width}: give a multiple of 4 and of the {heads} heads")
        self.embed = nn.Linear(in_features, width)
        self.mask = nn.Parameter(torch.zeros(1, 1, width))
        position = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=False)
        self.register_buffer("position", position[None], persistent=False)  # (1, N, width)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, patch[0] * patch[1] * channels)
        nn.init.normal_(self.mask, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, encoded: Tensor, division: Division) -> Tensor:
        """Predict the masked patches.

        Args:
            encoded: (B, P + V, D), of `encode`.
            division: of the N patches.

        Returns:
            (B, N - V, pixels of a patch times channels), in the order of `division.masked`.
        """
        x = self.embed(encoded)
        first, width = x.shape[1] - division.visible.shape[1], x.shape[2]
        prefix, shown = x[:, :first], x[:, first:]
        patches = self.mask.to(x).expand(len(x), self.position.shape[1], width)
        patches = patches.scatter(1, division.visible[:, :, None].expand(-1, -1, width), shown) + self.position.to(x)
        x = torch.cat((prefix, patches), dim=1)
        for block in self.blocks:
            x = block(x)
        hidden = x[:, first:].gather(1, division.masked[:, :, None].expand(-1, -1, width))
        result: Tensor = self.pixels(self.norm(hidden))
        return result


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut images (B, C, H, W) into patches, row by row: (B, N, h w C), the channels of a pixel next to each other."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    images = images[:, :, : rows * patch[0], : columns * patch[1]]
    cut = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def reconstruction_loss(predicted: Tensor, images: Tensor, masked: Tensor, patch: tuple[int, int]) -> Tensor:
    """Mean squared error of the masked patches, each normalised by the mean and deviation of its own pixels.

    Args:
        predicted: (B, M, h w C).
        images: (B, C, H, W).
        masked: numbers of the patches, (B, M).
        patch: h and w in pixels.

    Returns:
        A scalar, float32.
    """
    target = patchify(images.float(), patch)
    target = target.gather(1, masked[:, :, None].expand(-1, -1, target.shape[2]))
    variance, mean = torch.var_mean(target, dim=2, keepdim=True)
    return functional.mse_loss(predicted.float(), (target - mean) / (variance + _EPS).sqrt())
