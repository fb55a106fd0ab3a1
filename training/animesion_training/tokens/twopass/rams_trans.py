"""RAMS-Trans: crop to the region that the class token attends to through all blocks, and average both passes.

Attention rollout is in `tokens.rollout`, boxes in `similarity`, crops in `animesion_training.data.views`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.data.views import crop
from animesion_training.options import in_range, one_of, whole_number
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.rollout import AttentionRecorder, class_rollout
from animesion_training.tokens.state import Tokens
from animesion_training.tokens.twopass.base import BOX_TRACE, TwoPassTransformer
from animesion_training.tokens.twopass.similarity import BoxRule, check_top, mask_box, select


class Region(NamedTuple):
    """The selection of RAMS-Trans in a batch.

    Attributes:
        attention: (B, N), attention rollout of the class token over patches.
        mask: (B, rows, columns), bool, the selected cells; a cell is `pool` by `pool` patches.
        boxes: (B, 4), int64, y0, y1, x0, x1 in pixels, the ends exclusive.
        crops: (B, C, H, W), content of the boxes, resized to the size of the images.
    """

    attention: Tensor
    mask: Tensor
    boxes: Tensor
    crops: Tensor


# fx does not trace into functions that compare shapes
torch.fx.wrap("crop")
torch.fx.wrap("_attention")


def _attention(weights: list[Tensor], count: int) -> Tensor:
    """The rollout of the class token over `count` tokens, (B, T).

    Raises:
        UsageError: the number of tokens changes between blocks.
    """
    attention = class_rollout(weights)
    if attention.shape[1] != count:
        raise UsageError(
            f"RAMS-Trans needs the same tokens in all blocks, and of {attention.shape[1]} tokens {count} are left: "
            "leave out methods that change their number"
        )
    return attention


class RAMSTrans(TwoPassTransformer):
    """Crop to the region that the class token attends to through all blocks, and average the logits of both passes.

    RAMS-Trans (Hu et al., ACM MM 2021, arXiv 2107.08192) with two scales, as ILA (arXiv 2409.11051) compares with it.
    The attention rollout of the class token over patches is averaged over cells of `pool` by `pool` patches. The box
    around the cells with at least `threshold` times the mean or maximum of this map is cropped, resized and encoded
    with the same weights. The head of the encoder classifies both. Of the rollout, only the row of the class token is
    computed.

    The paper bounds the largest connected region; here, as in the comparison, the box contains all cells above the
    threshold. If no cell is, the crop is the whole image.

    Trace: `rollout` (B, N), `mask` (B, rows, columns), `crop_box_rows0_rows1_cols0_cols1` (B, 4), `crops`.

    Args:
        encoder: a host with its head, whose plug-ins keep the number of tokens.
        num_classes: number of classes; 0 for features alone.
        threshold: share of the mean or maximum, >= 0. The comparison's default is 0.5.
        relative_to: `mean` or `max` of the map.
        pool: patches along the side of a cell; 1 for no pooling.
        top: number of cells with the largest rollout to select in place of a threshold, as GLSim does.
        crop_class_token: see `TwoPassTransformer`; the paper has one class token per scale.
        test_flip: see `TwoPassTransformer`.
        box: see `TwoPassTransformer`.
        reference_compat: see `TwoPassTransformer`.

    Raises:
        UsageError: an unknown value of an option, or an unsuitable encoder.

    Shape:
        (B, C, H, W) to logits (B, num_classes).
    """

    def __init__(
        self,
        encoder: TokenVisionTransformer,
        num_classes: int,
        *,
        threshold: float = 1.0,
        relative_to: Literal["mean", "max"] = "mean",
        pool: int = 2,
        top: int | None = None,
        crop_class_token: bool = False,
        test_flip: bool = False,
        box: BoxRule | None = None,
        reference_compat: bool = False,
    ) -> None:
        one_of("relative_to", relative_to, ("mean", "max"))
        super().__init__(
            encoder,
            method="RAMS-Trans",
            crop_class_token=crop_class_token,
            box=box,
            test_flip=test_flip,
            reference_compat=reference_compat,
        )
        self.threshold = in_range("threshold", threshold, low=0.0)
        self.relative_to = relative_to
        self.pool = whole_number("pool", pool)
        self.top = None if top is None else check_top(top)
        self._recorder = AttentionRecorder(len(encoder.backbone.blocks), average=True)
        encoder.plugins["rollout"] = self._recorder
        if encoder.num_classes != num_classes:
            self.reset_classifier(num_classes)

    def _first(self, x: Tensor, *, trace: bool = False, targets: Tensor | None = None) -> tuple[Tokens, Region]:
        with self._recorder.recording():
            tokens = self.encoder.encode(x, trace=trace, targets=targets)
        with torch.no_grad():
            if tokens.grid is None:
                raise UsageError("RAMS-Trans crops by the grid of patches, and the encoder leaves no grid")
            attention = _attention(self._recorder.pop_weights(), tokens.x.shape[1])  # (B, T)
            attention = attention[:, tokens.prefix : attention.shape[1] - tokens.extra]  # patches alone, (B, N)
            cells = attention.reshape(-1, *tokens.grid)  # (B, rows, columns)
            if self.pool > 1:
                # cells at the end average the patches they have
                cells = functional.avg_pool2d(cells[:, None], self.pool, ceil_mode=True)[:, 0]
            mask = self._mask(cells)
            boxes = mask_box(mask, tokens.grid, self._patch_area(x), self.box, pool=self.pool)
            return tokens, Region(attention, mask, boxes, crop(x, boxes))

    def _mask(self, cells: Tensor) -> Tensor:
        """Select cells of a map (B, rows, columns); bool, of the same shape."""
        if self.top is not None:
            flat = cells.flatten(1)
            chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, select(flat, self.top), True)
            return chosen.view_as(cells)
        peak = cells.mean((1, 2), keepdim=True) if self.relative_to == "mean" else cells.amax((1, 2), keepdim=True)
        return cells >= self.threshold * peak

    def _features(self, x: Tensor, *, trace: bool = False, targets: Tensor | None = None) -> tuple[Tensor, Tokens]:
        tokens, region = self._first(x, trace=trace, targets=targets)
        chosen = {"rollout": region.attention, "mask": region.mask, BOX_TRACE: region.boxes, "crops": region.crops}
        self._record(tokens, **chosen)
        of_image = self.encoder.pool(tokens)
        of_crop = self.encoder.pool(self._second(region.crops, tokens))
        features = self.encoder.features(torch.cat([of_image, of_crop]))  # both passes in one batch, (2 B, width)
        return torch.stack(features.chunk(2), dim=1), tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, 2, width) of both passes to mean logits (B, num_classes), or to their mean."""
        if pre_logits:
            return x.mean(1)
        logits = self.encoder.forward_head(x.flatten(0, 1))  # both passes in one batch, (2 B, num_classes)
        return logits.reshape(x.shape[0], x.shape[1], -1).mean(1)

    @torch.no_grad()
    def select_crops(self, x: Tensor) -> Region:
        """Return the selection in images (B, C, H, W)."""
        return self._first(x)[1]

    def get_classifier(self) -> nn.Module:
        """The encoder's head."""
        return self.encoder.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by one for another number of classes; see `TokenVisionTransformer.reset_classifier`."""
        self.encoder.reset_classifier(num_classes, global_pool)
        self.num_classes = num_classes
