"""GLSim: crop to the patches most similar to the whole image, and classify image and crop together.

Scores and boxes are in `similarity`, crops in `animesion_training.data.views`, selectors with one pass in
`tokens.part_selection`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.data.views import crop
from animesion_training.options import in_range, one_of, whole_number
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.reductions.base import init_linear
from animesion_training.tokens.state import Tokens
from animesion_training.tokens.twopass.aggregators import ConvAggregator, transformer_aggregator
from animesion_training.tokens.twopass.base import BOX_TRACE, TwoPassTransformer
from animesion_training.tokens.twopass.similarity import (
    METRICS,
    BoxRule,
    Metric,
    check_top,
    global_local_similarity,
    patch_box,
    select,
)

Aggregator = Literal["transformer", "dwsc", "conv"]
Classifier = Literal["cls", "avg", "max"]

#: Epsilon of the aggregator's norms where the encoder has no final one.
_BARE_EPS = 1e-5


# fx does not trace into functions that check shapes
torch.fx.wrap("crop")


class Selection(NamedTuple):
    """The selection of GLSim in a batch.

    Attributes:
        similarity: (B, N), similarity of each patch to the class token; a distance for the metrics `l1` and `l2`.
        indices: (B, O), int64, the selected patches, best first: row * columns + column.
        boxes: (B, 4), int64, y0, y1, x0, x1 in pixels, the ends exclusive.
        crops: (B, C, H, W), content of the boxes, resized to the size of the images.
    """

    similarity: Tensor
    indices: Tensor
    boxes: Tensor
    crops: Tensor


class GLSim(TwoPassTransformer):
    """Crop to the patches most similar to the whole image, and classify both (Rios et al., arXiv 2407.12891).

    The encoder's class token is compared with every patch of the last block. The box around the `top` most similar
    ones is cropped, resized to the size of the input and encoded with the same weights. The class tokens of image and
    crop pass through an aggregator, and its first token is classified. The selection has no gradient; both passes
    have one.

    Images and grids need not be square. Where the encoder has down-sampled the grid (ILA), a cell of it covers
    image / grid pixels.

    The published results apply the final norm before similarity and aggregator, and use one class token. The original
    for timm's networks has no final norm, and a separate class token for crops: `final_norm=False,
    crop_class_token=True`.

    Trace: `similarity` (B, N), `topk_idx` (B, O), `crop_box_rows0_rows1_cols0_cols1` (B, 4), `crops`,
    `encoder_norm_out_global` (B, T, D) for the image, `cls_crop` (B, D).

    Args:
        encoder: a host whose plug-ins keep the grid and whose head reads the final class token; the head is dropped.
        num_classes: number of classes; 0 for features alone.
        top: O, number of selected patches. The original has 8; ILA's copy of it has 16 from 448 pixels on.
        metric: one of `similarity.METRICS`.
        classifier: classify the first token (`cls`), or every token, with the mean (`avg`) or maximum (`max`) of their
            logits.
        representation: width of a linear layer between encoder and aggregator; None for no such layer.
        aggregator: `transformer` blocks, a depthwise separable convolution over the tokens (`dwsc`), a full one
            (`conv`), or None.
        aggregator_depth: number of transformer blocks.
        aggregator_heads: number of heads of each block; None for heads of width 64. The original for timm's networks
            has as many as the encoder.
        select_tokens: no second pass: the selected patch tokens themselves go to the aggregator (an ablation).
        token_drop: probability of dropping each token but the first before the aggregator, in training.
        crops_at_inference: False to classify the image's class token alone in evaluation, in one pass and without
            the aggregator.
        test_flip: see `TwoPassTransformer`.
        anchor_random: select patches at random, also in evaluation, with torch's generator of the device (an ablation).
        crop_class_token: see `TwoPassTransformer`.
        final_norm: apply the encoder's final norm; without it the outputs of the last block are used.
        box: see `TwoPassTransformer`.
        reference_compat: see `TwoPassTransformer`.

    Raises:
        UsageError: options that do not go together, or an unsuitable encoder.

    Shape:
        (B, C, H, W) to logits (B, num_classes).
    """

    def __init__(
        self,
        encoder: TokenVisionTransformer,
        num_classes: int,
        *,
        top: int = 8,
        metric: Metric = "cos",
        classifier: Classifier = "cls",
        representation: int | None = None,
        aggregator: Aggregator | None = "transformer",
        aggregator_depth: int = 1,
        aggregator_heads: int | None = None,
        select_tokens: bool = False,
        token_drop: float = 0.0,
        crops_at_inference: bool = True,
        test_flip: bool = False,
        anchor_random: bool = False,
        crop_class_token: bool = False,
        final_norm: bool = True,
        box: BoxRule | None = None,
        reference_compat: bool = False,
    ) -> None:
        one_of("metric", metric, METRICS)
        one_of("classifier", classifier, get_args(Classifier))
        if aggregator is not None:
            one_of("aggregator", aggregator, get_args(Aggregator))
        elif classifier == "cls":
            raise UsageError(
                "GLSim without an aggregator would classify the image's class token alone: set classifier to avg or "
                "max, or choose an aggregator"
            )
        if select_tokens and crop_class_token:
            raise UsageError("GLSim with select_tokens makes no crops, so it has no use for crop_class_token")
        super().__init__(
            encoder,
            method="GLSim",
            crop_class_token=crop_class_token,
            box=box,
            test_flip=test_flip,
            reference_compat=reference_compat,
        )
        if encoder.gathers or encoder.reads != "feature" or encoder.num_features != encoder.embed_dim:
            raise UsageError(
                "GLSim aggregates the class tokens of image and crop, and this encoder's head or a method on it "
                "reads something else: leave that head or method out"
            )
        encoder.reset_classifier(0)
        host = encoder.backbone
        if not final_norm:
            host.norm = host.fc_norm = nn.Identity()
        self.top = check_top(top)
        self.metric: Metric = metric
        self.classifier: Classifier = classifier
        self.select_tokens = select_tokens
        self.crops_at_inference = crops_at_inference
        self.anchor_random = anchor_random
        width = encoder.embed_dim
        if representation is not None:
            width = whole_number("representation", representation)
        self.reduce = nn.Identity() if representation is None else nn.Linear(encoder.embed_dim, width)
        self.token_drop = nn.Dropout1d(in_range("token_drop", token_drop, low=0.0, high=1.0))
        block_eps = float(host.blocks[0].norm1.eps)
        last_eps = block_eps if final_norm else _BARE_EPS
        self.aggregator: nn.Module = nn.Identity()
        if aggregator == "transformer":
            self.aggregator = transformer_aggregator(width, aggregator_depth, aggregator_heads, block_eps, last_eps)
        elif aggregator is not None:
            # the convolution spans all tokens: the image's and either the crop's or the selected ones
            inputs = 1 + min(top, host.patch_embed.num_patches) if select_tokens else 2
            self.aggregator = ConvAggregator(width, inputs, depthwise=aggregator == "dwsc", eps=last_eps)
        init_linear(self.reduce)
        init_linear(self.aggregator)
        self.num_features = self.head_hidden_size = width
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def _apply_norm(self, tokens: Tokens) -> Tensor:
        host = self.encoder.backbone
        normed: Tensor = host.fc_norm(host.norm(tokens.x))  # timm makes one of the two an identity
        return normed

    @torch.no_grad()
    def _select(self, x: Tensor, tokens: Tokens, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return similarity (B, N), indices (B, O) and boxes (B, 4), as `Selection` has them."""
        if tokens.grid is None:
            raise UsageError("GLSim crops around patches by their place in the grid, and the encoder leaves no grid")
        similarity = global_local_similarity(normed[:, 0], _patches(normed, tokens), self.metric)
        # the cosine is a similarity; of the other metrics, which are distances, the smallest are the best
        scores = torch.rand_like(similarity) if self.anchor_random else similarity
        indices = select(scores, self.top, smallest=self.metric != "cos")
        return similarity, indices, patch_box(indices, tokens.grid, self._patch_area(x), self.box)

    def _features(self, x: Tensor, *, trace: bool = False, targets: Tensor | None = None) -> tuple[Tensor, Tokens]:
        tokens = self.encoder.encode(x, trace=trace, targets=targets)
        normed = self._apply_norm(tokens)
        image_token = normed[:, :1]  # (B, 1, D)
        if not (self.training or self.crops_at_inference or self.select_tokens):
            return self.reduce(image_token), tokens
        similarity, indices, boxes = self._select(x, tokens, normed)
        self._record(tokens, similarity=similarity, topk_idx=indices, encoder_norm_out_global=normed)
        if self.select_tokens:
            rows = indices[:, :, None].expand(-1, -1, normed.shape[2])  # (B, O, D)
            parts = _patches(normed, tokens).gather(1, rows)
        else:
            with torch.no_grad():
                crops = crop(x, boxes)
            parts = self._apply_norm(self._second(crops, tokens))[:, :1]  # (B, 1, D)
            self._record(tokens, **{BOX_TRACE: boxes, "crops": crops, "cls_crop": parts[:, 0]})
        inputs = self.reduce(torch.cat([image_token, parts], dim=1))
        # Dropout1d drops whole tokens; the first one, which is classified, is always kept
        inputs = torch.cat([inputs[:, :1], self.token_drop(inputs[:, 1:])], dim=1)
        return self.aggregator(inputs), tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, n, width) to logits (B, num_classes).

        With `pre_logits`, one feature (B, width): the first token, or the mean of all for `avg` and `max`.
        """
        if self.classifier == "cls":
            return x[:, 0] if pre_logits else self._classify(x[:, 0])
        if pre_logits:
            return x.mean(1)
        logits = self._classify(x)
        return logits.mean(1) if self.classifier == "avg" else logits.amax(1)

    def _classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits

    @torch.no_grad()
    def select_crops(self, x: Tensor) -> Selection:
        """Return the selection in images (B, C, H, W); with crops even where the network itself makes none."""
        tokens = self.encoder.encode(x)
        similarity, indices, boxes = self._select(x, tokens, self._apply_norm(tokens))
        return Selection(similarity, indices, boxes, crop(x, boxes))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by one for another number of classes.

        Raises:
            UsageError: another pooling than by the class token is requested.
        """
        if global_pool not in (None, "", "token"):
            raise UsageError(f"GLSim classifies from class tokens, it cannot pool by {global_pool!r}")
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.num_features, num_classes)
            init_linear(head)
        self.head = head.to(next(self.encoder.parameters())).train(self.training)


def _patches(values: Tensor, tokens: Tokens) -> Tensor:
    return values[:, tokens.prefix : values.shape[1] - tokens.extra]
