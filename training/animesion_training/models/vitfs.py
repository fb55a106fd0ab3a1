"""ViTFS: plain vision transformers that train from scratch on small fine-grained datasets, registered with timm.

A convolutional stem, fixed sin-cos positions, register tokens, LayerScale, batch norm on tokens and global average
pooling (arXiv 2507.12157). Attention, MLP and blocks are timm's own. The original's checkpoints are read by
`originals.vitfs`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from animesion.errors import UsageError
from animesion_training.models.factory import build_model
from animesion_training.models.vitfs_layers import (
    NORMS,
    PATCH,
    ConvStem,
    LayerAggregator,
    mean_of_tokens,
    sincos_positions,
)
from animesion_training.tokens.annotations import with_types

# fx does not trace into a function in the modules that wrap its name
torch.fx.wrap("mean_of_tokens")
torch.fx.wrap("sincos_positions")

_POOLS = ("avg", "")
_REGISTER_STARTS = ("normal", "zeros")


class ViTFS(nn.Module):
    """A vision transformer for training from scratch (ViTFS, arXiv 2507.12157).

    `ConvStem`, fixed sin-cos positions, register tokens without a position before the patches, pre-norm blocks with
    LayerScale, final norm and mean over the patches. Positions are computed for the grid of each batch, so images may
    have any size in multiples of 16 pixels, and positions are not part of the state dict.

    Args:
        img_size: side in pixels or (height, width), for the description of the model.
        in_chans: channels of the images.
        num_classes: number of classes; 0 for pooled features.
        global_pool: `avg`, or empty for the tokens themselves.
        embed_dim: D, a multiple of 8 and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over D.
        norm_layer: `batchnorm` (over all tokens of the batch) or `layernorm`, of blocks and at the end.
        init_values: initial value of LayerScale, 0 for no LayerScale (timm's factory drops arguments that are None).
        reg_tokens: number of register tokens.
        reg_init: initial values of registers: `normal` (std 1e-6) or `zeros`.
        dca_blocks: n > 0 adds a `LayerAggregator` of the outputs after each n blocks (5 and 4 in the original's dca2
            and dca3); 0 for no aggregators.
        reference_compat: keep the first H/16 * W/16 of registers and patches, as the original does, instead of the
            patches: one patch at the end is lost per register.
        pool_include_prefix: with `reference_compat`, average the registers as well, as the original's students do;
            otherwise they are left out, as in the original's own classifier.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the projections of attention and MLP.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; that of block i of n is `drop_path_rate * i / (n - 1)`.

    Raises:
        UsageError: an unknown value of an option, or sizes that do not go together.

    Shape:
        (B, C, H, W) to logits (B, num_classes).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        norm_layer: str = "batchnorm",
        init_values: float = 1e-5,
        reg_tokens: int = 4,
        reg_init: str = "normal",
        dca_blocks: int = 0,
        reference_compat: bool = False,
        pool_include_prefix: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for option, value, known in (
            ("norm_layer", norm_layer, NORMS),
            ("reg_init", reg_init, _REGISTER_STARTS),
            ("global_pool", global_pool, _POOLS),
        ):
            if value not in known:
                raise UsageError(f"ViTFS has no {option} {value!r}: there are {', '.join(map(repr, known))}")
        if num_heads < 1 or embed_dim < 8 or embed_dim % 8 or embed_dim % num_heads:
            raise UsageError(f"ViTFS needs an embed_dim divisible by 8 and by num_heads={num_heads}, not {embed_dim}")
        if depth < 1 or reg_tokens < 0 or not 0 <= dca_blocks <= depth:
            raise UsageError(
                f"ViTFS needs depth >= 1, reg_tokens >= 0 and dca_blocks of 0 to depth, not {depth}, {reg_tokens} and "
                f"{dca_blocks}"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_reg_tokens = reg_tokens
        self.reference_compat = reference_compat
        self.pool_include_prefix = pool_include_prefix
        self.num_prefix_tokens = reg_tokens if reference_compat else 0  # of the output of forward_features
        self.dca_blocks = dca_blocks
        self.reg_init = reg_init
        self.grad_checkpointing = False

        self.patch_embed = ConvStem(img_size, in_chans, embed_dim)
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=True,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    init_values=init_values,
                    drop_path=drop_path_rate * i / max(1, depth - 1),
                    norm_layer=NORMS[norm_layer],
                )
                for i in range(depth)
            )
        )
        self.aggregators = nn.ModuleList(
            LayerAggregator(embed_dim, dca_blocks) for _ in range(depth // dca_blocks if dca_blocks else 0)
        )
        self.norm = NORMS[norm_layer](embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(embed_dim, num_classes)
        self.feature_info = [{"num_chs": embed_dim, "reduction": PATCH, "module": f"blocks.{i}"} for i in range(depth)]
        self.init_weights()

    def init_weights(self) -> None:
        """Set initial values: linear layers truncated normal (std 0.02) with zero bias, convolutions torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.reg_token is not None and self.reg_init == "normal":
            nn.init.normal_(self.reg_token, std=1e-6)

    def _tokens(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to registers, then patches with their positions (B, R + N, D)."""
        x = self.patch_embed(x)
        positions = sincos_positions(x.shape[2], x.shape[3], x.shape[1], x.device)
        # in the type of the weights, so that the residual stream under autocast stays float32, as in timm's ViT
        positions = positions.flatten(0, 1).to(self.patch_embed.proj.weight.dtype)
        x = x.flatten(2).transpose(1, 2) + positions  # (B, D, H/16, W/16) to (B, N, D)
        if self.reg_token is not None:
            x = torch.cat([self.reg_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x

    def _aggregate(self, i: int, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """The input of the block after block i, from the output x of block i; `outputs` collects all outputs."""
        if self.dca_blocks:
            outputs.append(x)
            for j, aggregator in enumerate(self.aggregators):
                if i + 1 == (j + 1) * self.dca_blocks:
                    last = torch.stack(outputs[-self.dca_blocks :], dim=-1)  # (B, R + N, D, n)
                    x = x + aggregator(last)
        return x

    def _select_tokens(self, x: Tensor) -> Tensor:
        """The input of the final norm, (B, N, D): the patches, or with `reference_compat` the first N tokens."""
        if self.reference_compat:
            return x[:, : x.shape[1] - self.num_reg_tokens]
        return x[:, self.num_reg_tokens :]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to normalised patches (B, N, D), N = H/16 * W/16, row by row.

        With `reference_compat` the first of the N tokens are registers, `num_prefix_tokens` of them.

        Raises:
            UsageError: a side is not a multiple of 16 pixels.
        """
        x = self._tokens(x)
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            x = self._aggregate(i, x, outputs)
        features: Tensor = self.norm(self._select_tokens(x))
        return features

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to their mean (B, D), or unchanged if `global_pool` is empty."""
        if self.global_pool == "avg":
            x = mean_of_tokens(x, 0 if self.pool_include_prefix else self.num_prefix_tokens)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, D) to logits (B, num_classes), or to the input of the classifier (B, D).

        Raises:
            UsageError: `reference_compat` has left only registers, and they are not averaged.
        """
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    @with_types
    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), H and W multiples of 16, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Return the patches after chosen blocks, and the output of `forward_features`.

        Args:
            x: images (B, C, H, W), sides multiples of 16.
            indices: the last n blocks, or these blocks (negative from the end); None for all.
            return_prefix_tokens: return pairs of patches and registers (B, R, D).
            norm: apply the final norm to each.
            stop_early: compute no block after the last chosen one.
            output_fmt: `NCHW` for (B, D, H/16, W/16), `NLC` for (B, N, D).
            intermediates_only: return no features.

        Returns:
            `(features, intermediates)`, or the intermediates alone; all patches, also with `reference_compat`.

        Raises:
            UsageError: another format, or a side that is not a multiple of 16 pixels.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UsageError(f"ViTFS returns features as NCHW or NLC, not as {output_fmt}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = self._tokens(x)
        intermediates: list[Any] = []
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            x = self._aggregate(i, x, outputs)
            if i in taken:
                of_block = self.norm(x) if norm else x
                prefix, patches = of_block.split([self.num_reg_tokens, of_block.shape[1] - self.num_reg_tokens], dim=1)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                intermediates.append((patches, prefix) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (self.norm(self._select_tokens(x)), intermediates)

    # -- timm's interface ----------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks that the chosen intermediates do not need, and the head; return the chosen blocks."""
        taken: list[int]
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if self.dca_blocks:
            self.aggregators = self.aggregators[: (last + 1) // self.dca_blocks]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {"reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer decay; an aggregator is in the group of the block before it."""
        blocks: list[Any] = [(r"^blocks\.(\d+)", None)]
        for j in range(len(self.aggregators)):
            blocks.append((rf"^aggregators\.{j}\.", ((j + 1) * self.dca_blocks - 1,)))
        return {"stem": r"^(?:reg_token|patch_embed)", "blocks": [*blocks, (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory; batch norms include each batch twice in their running statistics, as in timm."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one for another number of classes (0 for none), and optionally the pooling."""
        if global_pool is not None and global_pool not in _POOLS:
            raise UsageError(f"ViTFS has no global_pool {global_pool!r}: there are {', '.join(map(repr, _POOLS))}")
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head = _classifier(self.embed_dim, num_classes).to(self.patch_embed.proj.weight).train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the described input size; nothing is resampled, and patches keep 16 pixels."""
        if patch_size not in (None, PATCH, (PATCH, PATCH)):
            raise UsageError(f"the stem of ViTFS has patches of {PATCH} pixels, and cannot change to {patch_size}")
        if img_size is not None:
            self.patch_embed.set_input_size(img_size)


def _classifier(width: int, num_classes: int) -> nn.Module:
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


#: Size -> width and number of heads; all have 12 blocks.
SIZES: dict[str, tuple[int, int]] = {
    "nano": (64, 1),
    "micro": (128, 2),
    "tiny": (192, 3),
    "small": (384, 6),
    "base": (768, 12),
}

#: No weights were published under these names; input and normalisation are those of the paper's students.
_CFG: dict[str, Any] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,  # so the factory passes img_size; ConvStem.strict_img_size allows other sizes
    "crop_pct": 0.746,  # resize to int(1.34 * side), then a centre crop
    "crop_mode": "squash",
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.stages.0.conv",
    "classifier": "head",
    "paper_ids": "arXiv:2507.12157",
}
_cfgs: dict[str, Any] = {f"vitfs_{size}_patch16": dict(_CFG) for size in SIZES}
default_cfgs = generate_default_cfgs(_cfgs)


def _create(size: str, pretrained: bool, **options: Any) -> Any:
    width, heads = SIZES[size]
    settings: dict[str, Any] = {"embed_dim": width, "num_heads": heads} | options
    out_indices = settings.pop("out_indices", 3)
    return build_model(
        ViTFS,
        f"vitfs_{size}_patch16",
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **settings,
    )


@register_model
def vitfs_nano_patch16(pretrained: bool = False, **options: Any) -> Any:
    """ViTFS-N: width 64, one head."""
    return _create("nano", pretrained, **options)


@register_model
def vitfs_micro_patch16(pretrained: bool = False, **options: Any) -> Any:
    """ViTFS-M: width 128, two heads."""
    return _create("micro", pretrained, **options)


@register_model
def vitfs_tiny_patch16(pretrained: bool = False, **options: Any) -> Any:
    """ViTFS-T: width 192, three heads."""
    return _create("tiny", pretrained, **options)


@register_model
def vitfs_small_patch16(pretrained: bool = False, **options: Any) -> Any:
    """ViTFS-S: width 384, six heads."""
    return _create("small", pretrained, **options)


@register_model
def vitfs_base_patch16(pretrained: bool = False, **options: Any) -> Any:
    """ViTFS-B: width 768, twelve heads."""
    return _create("base", pretrained, **options)
