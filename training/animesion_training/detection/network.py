"""The detector's network: a one-stage, anchor-free network on the first five stages of EfficientNet-lite0.

Three grids (strides 8, 16 and 32) predict one score and the distances to the four edges of a box per cell, as in FCOS
(arXiv 1904.01355); the score learns the box's IoU, as in GFL (arXiv 2006.04388). Lite0 has no squeeze-and-excitation
and ReLU6 for its activation, so every operation is one that small runtimes know.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

STRIDES = (8, 16, 32)
"""Pixels between the cells of each grid; sides of images must be multiples of the last one."""

_SIDES = ((0.0, 60.0), (40.0, 140.0), (96.0, 1e9))
"""Sides of the boxes that each grid learns, in pixels of the network's input; neighbours share some."""

_NEAR, _FAR = 0.8, 1.5
"""Least and most distance of a learning cell from its box's centre, in strides, along either axis."""

_REACH = 0.22
"""The same as a share of the box's side, where that is between the two limits."""

_LEAST_TARGET = 0.4
"""Least score that a learning cell aims at, so that scores rise before boxes fit."""


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A depthwise 3x3 convolution and a pointwise one, each with batch normalisation and the latter with ReLU6."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class FaceNetwork(nn.Module):
    """Scores and boxes of every cell of three grids.

    Args:
        width: channels of the pyramid and of the heads.
        backbone: name of a timm EfficientNet; its stages up to stride 16 are used.
    """

    def __init__(self, width: int = 64, backbone: str = "tf_efficientnet_lite0") -> None:
        super().__init__()
        whole: Any = timm.create_model(backbone, pretrained=False)
        stages = list(whole.blocks)[:5]
        channels = [stage[-1].bn3.num_features for stage in (stages[2], stages[4])]
        self.low = nn.Sequential(whole.conv_stem, whole.bn1, stages[0], stages[1])
        self.eight = nn.Sequential(stages[2])
        self.sixteen = nn.Sequential(stages[3], stages[4])
        self.deeper = nn.Sequential(_block(channels[1], 2 * width, 2), _block(2 * width, 2 * width))
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))
            for inputs in (*channels, 2 * width)
        )
        self.smooth = nn.ModuleList(_block(width, width) for _ in STRIDES)
        self.head = nn.ModuleList(nn.Sequential(_block(width, width), _block(width, width)) for _ in STRIDES)
        self.out = nn.ModuleList(nn.Conv2d(width, 5, 1) for _ in STRIDES)
        for layer in self.out:
            assert isinstance(layer, nn.Conv2d)
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            # a hundredth of the cells see a face, and a box's edge is about two cells away
            layer.bias.data.copy_(torch.tensor([-4.6, 0.7, 0.7, 0.7, 0.7]))
        self._folded: list[nn.Module] = []  # in a list, so that it is no part of the network's weights

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raw outputs.

        Args:
            images: RGB, -1 to 1, shape (B, 3, height, width), sides multiples of 32.

        Returns:
            For each stride a tensor (B, 5, height/stride, width/stride): logit of the score, and the logarithms of the
            distances from the cell's centre to the left, top, right and bottom edge in strides.
        """
        if self.training and self._folded:
            # half the bits are enough for what does not learn, and take a quarter of the time
            with torch.no_grad(), torch.autocast(images.device.type, dtype=torch.bfloat16):
                low = self._folded[0](images)
            low = low.float()
        else:
            low = self.low(images)
        eight = self.eight(low)
        sixteen = self.sixteen(eight)
        levels = [eight, sixteen, self.deeper(sixteen)]
        merged: list[Tensor] = []
        above: Tensor | None = None
        for number in (2, 1, 0):
            here = self.lateral[number](levels[number])
            if above is not None:
                here = here + functional.interpolate(above, scale_factor=2.0, mode="nearest")
            above = here
            merged.insert(0, self.smooth[number](here))
        return [out(head(level)) for out, head, level in zip(self.out, self.head, merged, strict=True)]

    def freeze(self) -> None:
        """Keep the first stages as they are: they see edges and textures. Call it before training, on its device."""
        for weight in self.low.parameters():
            weight.requires_grad_(False)
        self._folded = [_folded(self.low)]

    def train(self, mode: bool = True) -> FaceNetwork:
        """As in torch, but for the statistics of frozen stages."""
        super().train(mode)
        if self._folded:
            self.low.eval()
        return self


def _folded(low: nn.Sequential) -> nn.Module:
    """A copy of the first stages with their normalisation folded into the convolutions."""
    copied: Any = copy.deepcopy(low).eval()

    def fold(owner: Any, layer: str, norm: str) -> None:
        activation = getattr(owner, norm).act
        if isinstance(activation, nn.ReLU6):
            activation.inplace = True
        setattr(owner, layer, fuse_conv_bn_eval(getattr(owner, layer), getattr(owner, norm)))
        setattr(owner, norm, activation)

    fold(copied, "0", "1")
    for stage in copied[2:]:
        for block in stage:
            for layer, norm in pairs(block):
                fold(block, layer, norm)
    result: nn.Module = copied.to(memory_format=torch.channels_last)
    return result


def pairs(block: nn.Module) -> tuple[tuple[str, str], ...]:
    """Convolutions of a block of EfficientNet-lite and the normalisation after each, in order."""
    if hasattr(block, "conv_pwl"):  # an inverted residual
        return (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
    return (("conv_dw", "bn1"), ("conv_pw", "bn2"))  # the depthwise-separable first block


def cells(sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres and strides of all cells, grid after grid and row after row.

    Args:
        sizes: rows and columns of each grid.
        device: where to put them.

    Returns:
        x and y in pixels, shape (N, 2), and strides, shape (N,).
    """
    centres, strides = [], []
    for (rows, columns), stride in zip(sizes, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        centres.append((torch.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride)
        strides.append(torch.full((rows * columns,), float(stride), device=device))
    return torch.cat(centres), torch.cat(strides)


def decode(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and boxes of all cells.

    Returns:
        Logits (B, N); boxes (B, N, 4) as left, top, right, bottom in pixels; the cells' centres (N, 2) and strides
        (N,).
    """
    flat = torch.cat([each.flatten(2) for each in outputs], 2).float()  # (B, 5, N)
    centres, strides = cells([(each.shape[2], each.shape[3]) for each in outputs], flat.device)
    distances = flat[:, 1:].clamp(-6, 4).exp() * strides  # (B, 4, N)
    x, y = centres[:, 0], centres[:, 1]
    left, top, right, bottom = distances.unbind(1)
    return flat[:, 0], torch.stack([x - left, y - top, x + right, y + bottom], 2), centres, strides


def overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of pairs of boxes (N, 4), and the generalised one (arXiv 1902.09630)."""
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = [(each[:, 2:] - each[:, :2]).clamp(min=0).prod(1) for each in (first, second)]
    union = areas[0] + areas[1] - shared
    hull = (torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])).prod(1)
    iou = shared / union.clamp(min=1e-6)
    return iou, iou - (hull - union) / hull.clamp(min=1e-6)


def assign(centres: Tensor, strides: Tensor, boxes: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Which cells learn which box.

    Args:
        centres: of the cells in pixels, shape (N, 2).
        strides: of the cells, shape (N,).
        boxes: faces, shape (F, 4), in pixels.
        ignored: areas that are neither faces nor free of them, shape (G, 4).

    Returns:
        For each cell the index of its box, or -1, shape (N,); and whether the cell counts for the score, shape (N,).
    """
    counts = torch.ones(len(centres), dtype=torch.bool, device=centres.device)
    if len(ignored):
        inside = (centres[:, None] >= ignored[None, :, :2]) & (centres[:, None] <= ignored[None, :, 2:])
        counts &= ~inside.all(2).any(1)
    chosen = torch.full((len(centres),), -1, dtype=torch.long, device=centres.device)
    if not len(boxes):
        return chosen, counts
    middles, extents = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    sides = extents.prod(1).clamp(min=1e-6).sqrt()
    reach = (extents[None] * _REACH).clamp(min=0.0)  # (1, F, 2)
    limit = strides[:, None, None]
    reach = torch.minimum(torch.maximum(reach, _NEAR * limit), _FAR * limit)
    near = ((centres[:, None] - middles[None]).abs() <= reach).all(2)  # (N, F)
    fits = torch.zeros_like(near)
    for stride, (least, most) in zip(STRIDES, _SIDES, strict=True):
        fits |= (strides == stride)[:, None] & ((sides >= least) & (sides < most))[None]
    # a cell near a face of a size that another grid learns is neither right nor wrong
    counts &= ~(near & ~fits).any(1) | (near & fits).any(1)
    sized = torch.where(near & fits, sides[None].expand(near.shape), torch.inf)
    least_side, index = sized.min(1)
    learns = least_side.isfinite()
    chosen[learns] = index[learns]
    counts |= learns
    return chosen, counts


def loss(outputs: Sequence[Tensor], boxes: Sequence[Tensor], ignored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of a batch: quality focal loss of the scores, and GIoU loss of the boxes.

    Args:
        outputs: of the network.
        boxes: faces of each image in pixels, shape (F, 4).
        ignored: areas of each image that do not count.

    Returns:
        The two losses, scalars.
    """
    logits, found, centres, strides = decode(outputs)
    scores, fits = logits.new_zeros(()), logits.new_zeros(())
    learning = 0
    for row in range(len(logits)):
        chosen, counts = assign(centres, strides, boxes[row], ignored[row])
        learns = chosen >= 0
        target = torch.zeros_like(logits[row])
        if learns.any():
            iou, giou = overlap(found[row, learns], boxes[row][chosen[learns]])
            target[learns] = iou.detach().clamp(_LEAST_TARGET, 1.0)
            fits = fits + (1 - giou).sum()
            learning += int(learns.sum())
        away = (target - logits[row].sigmoid()).abs().square()
        each = functional.binary_cross_entropy_with_logits(logits[row], target, reduction="none") * away.detach()
        scores = scores + each[counts].sum()
    count = max(1, learning)
    return scores / count, fits / count
