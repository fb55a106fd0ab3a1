"""GLSim and RAMS-Trans, which look twice: a first pass selects a part of the image, a second one encodes its crop.

They wrap a `TokenVisionTransformer` and run it twice with the same weights, so its plug-ins work in both passes as long
as patches keep their grid. Scores and boxes are in `similarity` and `rollout`, crops in `animesion_training.data.views`,
selectors that need one pass in `part_selection`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.data.views import crop
from animesion_training.options import in_range
from animesion_training.tokens.host import Plugin, Tokens, TokenVisionTransformer
from animesion_training.tokens.reductions.base import init_linear
from animesion_training.tokens.rollout import AttentionRecorder, class_rollout
from animesion_training.tokens.twopass.similarity import (
    BOXES,
    METRICS,
    BoxRule,
    Metric,
    check_top,
    global_local_similarity,
    mask_box,
    patch_box,
    select,
)

Aggregator = Literal["transformer", "dwsc", "conv"]
Classifier = Literal["cls", "avg", "max"]

_ENCODER = "encoder."
_CROP_TOKEN = "crop_class_token"
#: Name of the box in the trace: rows y0 to y1, columns x0 to x1, the ends exclusive.
_BOX = "crop_box_rows0_rows1_cols0_cols1"
#: Epsilon of the aggregator's norms where the encoder has no final one.
_BARE_EPS = 1e-5


class Selection(NamedTuple):
    """What GLSim selects in a batch.

    Attributes:
        similarity: (B, N), of each patch to the class token; a distance for the metrics `l1` and `l2`.
        indices: (B, O), int64, the selected patches, best first: row * columns + column.
        boxes: (B, 4), int64, y0, y1, x0, x1 in pixels, the ends exclusive.
        crops: (B, C, H, W), the boxes' content at the size of the images.
    """

    similarity: Tensor
    indices: Tensor
    boxes: Tensor
    crops: Tensor


class Region(NamedTuple):
    """What RAMS-Trans selects in a batch.

    Attributes:
        attention: (B, N), attention rollout of the class token over patches.
        mask: (B, rows, columns), bool, the cells that are attended to; a cell is `pool` by `pool` patches.
        boxes: (B, 4), int64, y0, y1, x0, x1 in pixels, the ends exclusive.
        crops: (B, C, H, W), the boxes' content at the size of the images.
    """

    attention: Tensor
    mask: Tensor
    boxes: Tensor
    crops: Tensor


class TwoPassTransformer(nn.Module):
    """What the methods of this module share; a subclass says what is selected and what the two passes make up.

    Args:
        encoder: used for both passes, and changed.
        what: the method's name, for messages.
        crop_class_token: let the pass over the crops begin with a class token of its own, a copy of the encoder's at
            the start.
        box: one of `similarity.BOXES`; None for the corrected one, or with `reference_compat` the original's.
        test_flip: in evaluation average the logits with those of the mirrored images; twice the work.
        reference_compat: reproduce what we hold to be a fault of the original: a box without the last selected row and
            column of patches.

    Raises:
        UsageError: an encoder that drops, merges or samples patches, or an unknown option.
    """

    def __init__(
        self,
        encoder: TokenVisionTransformer,
        *,
        what: str,
        crop_class_token: bool,
        box: BoxRule | None,
        test_flip: bool,
        reference_compat: bool,
    ) -> None:
        super().__init__()
        for name, plugin in encoder.plugins.items():
            if isinstance(plugin, Plugin) and not plugin.keeps_grid:
                raise UsageError(
                    f"{what} crops around patches by their place in the grid, and {name} {type(plugin).__name__} "
                    f"leaves no grid: use {what} or {name}, not both"
                )
        if encoder.backbone.cls_token is None:
            raise UsageError(f"{what} needs a class token, and this vision transformer pools its patches without one")
        if not isinstance(encoder.backbone.patch_drop, nn.Identity):
            raise UsageError(f"{what} crops around patches by their place in the grid: set patch_drop_rate to 0")
        if box is not None and box not in BOXES:
            raise UsageError(f"no box is called {box!r}: there are {', '.join(BOXES)}")
        self.encoder = encoder
        self.box: BoxRule = box or ("reference" if reference_compat else "corrected")
        self.test_flip = test_flip
        token = encoder.backbone.cls_token.detach().clone() if crop_class_token else None
        self.crop_class_token = None if token is None else nn.Parameter(token)
        self.num_classes = encoder.num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = encoder.embed_dim
        self.in_chans = encoder.in_chans
        self.feature_info = [dict(info, module=f"{_ENCODER}{info['module']}") for info in encoder.feature_info]
        self.pretrained_cfg = self.default_cfg = getattr(encoder.backbone, "pretrained_cfg", None) or {}

    # -- two passes --------------------------------------------------------------------------------------------------

    def _features(self, x: Tensor, *, trace: bool = False, targets: Tensor | None = None) -> tuple[Tensor, Tokens]:
        """Features (B, n, ...) of n tokens or passes, and the first pass; with the losses and traces of both."""
        raise NotImplementedError

    def _covered(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the pixels that have patches; a border narrower than a patch has none."""
        patch = self.encoder.backbone.patch_embed.patch_size
        return x.shape[2] // patch[0] * patch[0], x.shape[3] // patch[1] * patch[1]

    def _second(self, crops: Tensor, first: Tokens) -> Tokens:
        """Encode crops; losses and trace go to the first pass."""
        own = self.crop_class_token is not None
        second = self.encoder.encode(
            crops,
            trace=first.trace is not None,
            embedded=self._begin_with_crop_token if own else None,
            targets=first.targets,
        )
        for name, loss in second.losses.items():
            first.losses[name] = first.losses[name] + loss if name in first.losses else loss
        if first.trace is not None:
            first.trace |= {f"crop.{key}": value for key, value in (second.trace or {}).items()}
        return second

    def _begin_with_crop_token(self, embedding: Tensor) -> Tensor:
        host: Any = self.encoder.backbone
        token: Any = self.crop_class_token
        if host.pos_embed is not None and not host.no_embed_class:
            token = token + host.pos_embed[:, :1]
        token = host.pos_drop(token.expand(len(embedding), -1, -1)).to(embedding.dtype)
        return torch.cat([token, embedding[:, 1:]], dim=1)

    def _note(self, first: Tokens, **found: Tensor) -> None:
        if first.trace is not None:
            first.trace |= {name: value.detach() for name, value in found.items()}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to what is classified, (B, n, width): one vector a token or pass."""
        return self._features(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, n, width) to logits (B, num_classes), or to one feature (B, width)."""
        raise NotImplementedError

    @property
    def has_losses(self) -> bool:
        """Whether a plug-in adds terms to the training loss."""
        return self.encoder.has_losses

    @property
    def needs_targets(self) -> bool:
        """Whether such a term needs targets."""
        return self.encoder.needs_targets

    def forward(self, x: Tensor, with_losses: bool = False, targets: Tensor | None = None) -> Any:
        """Images (B, C, H, W) to logits (B, num_classes).

        Args:
            x: the images.
            with_losses: also give the terms that plug-ins add to the training loss: scalars by name, already weighted
                and added up over both passes.
            targets: class ids (B,) or soft labels (B, num_classes), for terms that need them.
        """
        features, tokens = self._features(x, targets=targets)
        logits = self.forward_head(features)
        if self.test_flip and not self.training:
            logits = (logits + self.forward_head(self.forward_features(x.flip(3)))) / 2
        return (logits, tokens.losses) if with_losses else logits

    def traced(self, x: Tensor) -> tuple[Tensor, Tokens]:
        """Logits of the images without their mirror images, and the first pass.

        Its trace has what was selected, what plug-ins chose, and under `crop.` what they chose in the second pass.
        """
        features, tokens = self._features(x, trace=True)
        return self.forward_head(features), tokens

    # -- timm's interface --------------------------------------------------------------------------------------------

    def adapt_state_dict(self, state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
        """Weights of ours, of the encoder or of its bare backbone, in any layout that timm reads, for this model.

        A class token of its own for crops begins as the given class token, where none is given. `model` is not used:
        filters of timm's are given it.
        """
        own, rest = state_dict, {}
        if any(key.startswith(_ENCODER) for key in state_dict):
            own = {key.removeprefix(_ENCODER): value for key, value in state_dict.items() if key.startswith(_ENCODER)}
            rest = {key: value for key, value in state_dict.items() if not key.startswith(_ENCODER)}
        own = self.encoder.adapt_state_dict(own)
        here = self.encoder.state_dict().keys()
        norms = ("backbone.norm.", "backbone.fc_norm.")  # which not every method keeps
        adapted = {f"{_ENCODER}{key}": value for key, value in own.items() if key in here or not key.startswith(norms)}
        if self.crop_class_token is not None and "backbone.cls_token" in own:
            adapted[_CROP_TOKEN] = own["backbone.cls_token"].clone()
        return adapted | rest

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        own = set() if self.crop_class_token is None else {_CROP_TOKEN}
        return own | {f"{_ENCODER}{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer decay: the encoder's; what follows it counts as the last layer."""
        inner = self.encoder.group_matcher(coarse)
        blocks = [(_inside(pattern), place) for pattern, place in inner["blocks"]]
        return {
            "stem": rf"{_inside(inner['stem'])}|^{_CROP_TOKEN}",
            "blocks": [*blocks, (rf"^(?!{_CROP_TOKEN}|encoder\.)", (99999,))],
        }

    def backbone_parameters(self) -> set[str]:
        """Names of the parameters that `freeze backbone` stops: the encoder's own."""
        return {f"{_ENCODER}{name}" for name in self.encoder.backbone_parameters()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the encoder."""
        self.encoder.set_grad_checkpointing(enable)


def _inside(pattern: str) -> str:
    """A pattern for names of the encoder, for the same names with the encoder's before them."""
    return rf"^encoder\.(?:{pattern.removeprefix('^')})"


class GLSim(TwoPassTransformer):
    """Crop to the patches that are most like the whole image, and classify both (Rios et al., arXiv 2407.12891).

    The encoder's class token is compared with every patch of the last block. The box around the `top` most similar
    ones is cut out, resized to the size of the input and encoded with the same weights. The two class tokens, the
    image's and the crop's, go through an aggregator, and its first token is classified. Selecting has no gradient;
    both passes have.

    Images and grids need not be square. Where the encoder has down-sampled the grid (ILA), a cell of it stands for
    image / grid pixels.

    The published results have the final norm before similarity and aggregator, and one class token. The original for
    timm's networks has no final norm and a class token of its own for crops: `final_norm=False,
    crop_class_token=True`.

    Trace: `similarity` (B, N), `topk_idx` (B, O), `crop_box_rows0_rows1_cols0_cols1` (B, 4), `crops`,
    `encoder_norm_out_global` (B, T, D) of the image, `cls_crop` (B, D).

    Args:
        encoder: a host whose plug-ins keep the grid and whose head reads the final class token; its head is dropped.
        num_classes: number of classes; 0 for features alone.
        top: O, selected patches. The original has 8; ILA's copy of it 16 from 448 pixels on.
        metric: one of `similarity.METRICS`.
        classifier: what is classified: the first token (`cls`), or every token, with the mean (`avg`) or maximum
            (`max`) over their logits.
        representation: width of a linear layer between encoder and aggregator; None for none.
        aggregator: `transformer` blocks, a depthwise separable convolution over the tokens
            (`dwsc`), a full one (`conv`), or None.
        aggregator_depth: number of transformer blocks.
        aggregator_heads: heads of each of them; None for heads of width 64. The original for timm's networks has as
            many as the encoder.
        select_tokens: no second pass: the selected patch tokens themselves go to the aggregator (an ablation).
        token_drop: probability with which the aggregator misses each token but the first, in training.
        crops_at_inference: False to classify the image's class token alone in evaluation, in one pass and without
            the aggregator.
        test_flip: see `TwoPassTransformer`.
        anchor_random: select patches at random, from torch's generator of the device, in evaluation too (an ablation).
        crop_class_token: see `TwoPassTransformer`.
        final_norm: keep the encoder's final norm; without it tokens are taken as the last block leaves them.
        box: see `TwoPassTransformer`.
        reference_compat: see `TwoPassTransformer`.

    Raises:
        UsageError: options that do not go together, or an encoder that does not fit.

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
        _check_choice("metric", metric, METRICS)
        _check_choice("classifier", classifier, get_args(Classifier))
        if aggregator is not None:
            _check_choice("aggregator", aggregator, get_args(Aggregator))
        elif classifier == "cls":
            raise UsageError(
                "GLSim without an aggregator would classify the image's class token alone: set classifier to avg or "
                "max, or choose an aggregator"
            )
        if select_tokens and crop_class_token:
            raise UsageError("GLSim with select_tokens makes no crops, so it has no use for crop_class_token")
        super().__init__(
            encoder,
            what="GLSim",
            crop_class_token=crop_class_token,
            box=box,
            test_flip=test_flip,
            reference_compat=reference_compat,
        )
        if encoder.gathers or encoder.reads != "feature" or encoder.num_features != encoder.embed_dim:
            raise UsageError(
                "GLSim aggregates the class tokens of image and crop, and this encoder's head or a method on it "
                "reads something else: use one of the two"
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
            width = _positive("representation", representation)
        self.reduce = nn.Identity() if representation is None else nn.Linear(encoder.embed_dim, width)
        self.token_drop = nn.Dropout1d(in_range("token_drop", token_drop, low=0.0, high=1.0))
        block_eps = float(host.blocks[0].norm1.eps)
        last_eps = block_eps if final_norm else _BARE_EPS
        self.aggregator: nn.Module = nn.Identity()
        if aggregator == "transformer":
            self.aggregator = _blocks(width, aggregator_depth, aggregator_heads, block_eps, last_eps)
        elif aggregator is not None:
            inputs = 1 + min(top, host.patch_embed.num_patches) if select_tokens else 2
            self.aggregator = ConvAggregator(width, inputs, depthwise=aggregator == "dwsc", eps=last_eps)
        init_linear(self.reduce)
        init_linear(self.aggregator)
        self.num_features = self.head_hidden_size = width
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def _normed(self, tokens: Tokens) -> Tensor:
        host = self.encoder.backbone
        normed: Tensor = host.fc_norm(host.norm(tokens.x))  # one of the two is an identity
        return normed

    @torch.no_grad()
    def _select(self, x: Tensor, tokens: Tokens, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity, indices and boxes."""
        if tokens.grid is None:
            raise UsageError("GLSim crops around patches by their place in the grid, and the encoder leaves no grid")
        similarity = global_local_similarity(normed[:, 0], _patches(normed, tokens), self.metric)
        scores = torch.rand_like(similarity) if self.anchor_random else similarity
        indices = select(scores, self.top, smallest=self.metric != "cos")
        return similarity, indices, patch_box(indices, tokens.grid, self._covered(x), self.box)

    def _features(self, x: Tensor, *, trace: bool = False, targets: Tensor | None = None) -> tuple[Tensor, Tokens]:
        tokens = self.encoder.encode(x, trace=trace, targets=targets)
        normed = self._normed(tokens)
        whole = normed[:, :1]
        if not (self.training or self.crops_at_inference or self.select_tokens):
            return self.reduce(whole), tokens
        similarity, indices, boxes = self._select(x, tokens, normed)
        self._note(tokens, similarity=similarity, topk_idx=indices, encoder_norm_out_global=normed)
        if self.select_tokens:
            rows = indices[:, :, None].expand(-1, -1, normed.shape[2])
            parts = _patches(normed, tokens).gather(1, rows)
        else:
            with torch.no_grad():
                crops = crop(x, boxes)
            parts = self._normed(self._second(crops, tokens))[:, :1]
            self._note(tokens, **{_BOX: boxes, "crops": crops, "cls_crop": parts[:, 0]})
        inputs = self.reduce(torch.cat([whole, parts], dim=1))
        inputs = torch.cat([inputs[:, :1], self.token_drop(inputs[:, 1:])], dim=1)
        return self.aggregator(inputs), tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, n, width) to logits (B, num_classes).

        With `pre_logits` to one feature (B, width): the first token, or the mean of all for `avg` and `max`.
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
    def selected(self, x: Tensor) -> Selection:
        """What is selected in images (B, C, H, W); the crops too where the network itself makes none."""
        tokens = self.encoder.encode(x)
        similarity, indices, boxes = self._select(x, tokens, self._normed(tokens))
        return Selection(similarity, indices, boxes, crop(x, boxes))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for another number of classes.

        Raises:
            UsageError: a pooling other than by the class token.
        """
        if global_pool not in (None, "", "token"):
            raise UsageError(f"GLSim classifies from class tokens, it cannot pool by {global_pool!r}")
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.num_features, num_classes)
            init_linear(head)
        self.head = head.to(next(self.encoder.parameters()).device)


class RAMSTrans(TwoPassTransformer):
    """Crop to what the class token attends to through all blocks, and average both passes' logits.

    RAMS-Trans (Hu et al., ACM MM 2021, arXiv 2107.08192) with two scales, as it is compared with in ILA (arXiv
    2409.11051): attention rollout of the class token over patches, averaged over cells of `pool` by `pool` patches;
    the box around the cells with at least `threshold` times the map's mean or maximum is cut out, resized and encoded
    with the same weights. The encoder's own head classifies both. Only the class token's row of the rollout is
    computed.

    The paper bounds the largest connected region; here, as in the comparison, all cells above the threshold. Where
    there are none, the crop is the whole image.

    Trace: `rollout` (B, N), `mask` (B, rows, columns), `crop_box_rows0_rows1_cols0_cols1` (B, 4), `crops`.

    Args:
        encoder: a host with its head, whose plug-ins keep all tokens from block to block.
        num_classes: number of classes; 0 for features alone.
        threshold: share of the mean or maximum, >= 0. The comparison's default is 0.5.
        relative_to: `mean` or `max` of the map.
        pool: patches along the side of a cell; 1 for none.
        top: in place of a threshold, the cells with the largest rollout, as many as this; as GLSim selects.
        crop_class_token: see `TwoPassTransformer`; the paper has one class token for each scale.
        test_flip: see `TwoPassTransformer`.
        box: see `TwoPassTransformer`.
        reference_compat: see `TwoPassTransformer`.

    Raises:
        UsageError: an unknown option, or an encoder that does not fit.

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
        _check_choice("relative_to", relative_to, ("mean", "max"))
        super().__init__(
            encoder,
            what="RAMS-Trans",
            crop_class_token=crop_class_token,
            box=box,
            test_flip=test_flip,
            reference_compat=reference_compat,
        )
        self.threshold = in_range("threshold", threshold, low=0.0)
        self.relative_to = relative_to
        self.pool = _positive("pool", pool)
        self.top = None if top is None else check_top(top)
        self._recorder = AttentionRecorder(len(encoder.backbone.blocks), average=True)
        encoder.plugins["rollout"] = self._recorder
        if encoder.num_classes != num_classes:
            self.reset_classifier(num_classes)

    def _first(self, x: Tensor, *, trace: bool = False, targets: Tensor | None = None) -> tuple[Tokens, Region]:
        with self._recorder.on():
            tokens = self.encoder.encode(x, trace=trace, targets=targets)
        with torch.no_grad():
            if tokens.grid is None:
                raise UsageError("RAMS-Trans crops by the grid of patches, and the encoder leaves no grid")
            attention = class_rollout(self._recorder.taken())
            if attention.shape[1] != tokens.x.shape[1]:
                raise UsageError(
                    f"RAMS-Trans crops by attention, which was over {attention.shape[1]} tokens of which "
                    f"{tokens.x.shape[1]} are left: leave out methods that change their number"
                )
            attention = attention[:, tokens.prefix : attention.shape[1] - tokens.extra]
            cells = attention.reshape(-1, *tokens.grid)
            if self.pool > 1:
                cells = functional.avg_pool2d(cells[:, None], self.pool, ceil_mode=True)[:, 0]
            mask = self._mask(cells)
            boxes = mask_box(mask, tokens.grid, self._covered(x), self.box, pool=self.pool)
            return tokens, Region(attention, mask, boxes, crop(x, boxes))

    def _mask(self, cells: Tensor) -> Tensor:
        if self.top is not None:
            flat = cells.flatten(1)
            chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, select(flat, self.top), True)
            return chosen.view_as(cells)
        peak = cells.mean((1, 2), keepdim=True) if self.relative_to == "mean" else cells.amax((1, 2), keepdim=True)
        return cells >= self.threshold * peak

    def _features(self, x: Tensor, *, trace: bool = False, targets: Tensor | None = None) -> tuple[Tensor, Tokens]:
        tokens, region = self._first(x, trace=trace, targets=targets)
        self._note(tokens, rollout=region.attention, mask=region.mask, **{_BOX: region.boxes, "crops": region.crops})
        whole = self.encoder.pool(tokens)
        return torch.stack([whole, self.encoder.pool(self._second(region.crops, tokens))], dim=1), tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, 2, ...) of both passes to mean logits (B, num_classes), or to the mean feature."""
        if pre_logits:
            return x.mean(1)
        logits = self.encoder.forward_head(x.flatten(0, 1))
        return logits.reshape(len(x), x.shape[1], -1).mean(1)

    @torch.no_grad()
    def selected(self, x: Tensor) -> Region:
        """What is selected in images (B, C, H, W)."""
        return self._first(x)[1]

    def get_classifier(self) -> nn.Module:
        """The encoder's head."""
        return self.encoder.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for another number of classes; see `TokenVisionTransformer.reset_classifier`."""
        self.encoder.reset_classifier(num_classes, global_pool)
        self.num_classes = num_classes


# -- aggregators -----------------------------------------------------------------------------------------------------


class ConvAggregator(nn.Module):
    """All tokens to one, by a convolution over them (an ablation of GLSim).

    Norm, Conv1d of kernel n, norm; depthwise it is followed by GELU, a 1x1 Conv1d and another norm.

    Args:
        width: of the tokens.
        inputs: n, number of tokens.
        depthwise: convolve each channel by itself, and mix channels after.
        eps: of the norms.

    Shape:
        (B, n, width) to (B, 1, width).

    Raises:
        UsageError: another number of tokens.
    """

    def __init__(self, width: int, inputs: int, *, depthwise: bool, eps: float) -> None:
        super().__init__()
        self.inputs = inputs
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.conv1 = nn.Conv1d(width, width, inputs, groups=width if depthwise else 1)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mix = nn.Sequential()
        if depthwise:
            self.mix.add_module("act", nn.GELU())
            self.mix.add_module("conv", nn.Linear(width, width))  # a 1x1 convolution
            self.mix.add_module("norm", nn.LayerNorm(width, eps=eps))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.shape[1] != self.inputs:
            raise UsageError(f"this aggregator convolves {self.inputs} tokens, and it is given {x.shape[1]}")
        joined = self.conv1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = self.mix(self.norm2(joined))
        return mixed


def _blocks(width: int, depth: int, heads: int | None, eps: float, last_eps: float) -> nn.Sequential:
    """Transformer blocks and a norm."""
    _positive("aggregator_depth", depth)
    if heads is None:  # of width 64, or somewhat wider where that does not divide the width
        heads = next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0)
    if width % _positive("aggregator_heads", heads):
        raise UsageError(f"aggregator_heads must divide the width {width} of the tokens, {heads} does not")
    norm: Any = partial(nn.LayerNorm, eps=eps)
    blocks = [Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(width, eps=last_eps))


def _patches(values: Tensor, tokens: Tokens) -> Tensor:
    return values[:, tokens.prefix : values.shape[1] - tokens.extra]


def _check_choice(option: str, value: object, known: Mapping[str, str] | tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option} is one of {', '.join(known)}, not {value!r}")


def _positive(option: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{option} is a positive whole number, not {value!r}")
    return value
