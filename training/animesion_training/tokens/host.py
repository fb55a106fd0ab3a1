"""The host of every method that works on the tokens of a vision transformer: it runs the block loop of a timm model.

A method is a plug-in that changes the tokens before, inside or after blocks; plug-ins can be combined. A block that no
plug-in opens is called as it is, with timm's code and fused attention. An opened block runs timm's own layers in the
same order, and its attention stays fused unless a plug-in requests all weights. The interface of plug-ins is in
`plugin`, heads are in `models.heads`, methods with two passes in `twopass`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers.attention import Attention
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from animesion.errors import UsageError
from animesion_training.tokens.annotations import with_types
from animesion_training.tokens.attention import Attended
from animesion_training.tokens.feature_head import FeatureHead
from animesion_training.tokens.patch_maps import PatchMaps
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens
from animesion_training.tokens.tag_text import TagText

_BACKBONE = "backbone."


class TokenVisionTransformer(nn.Module):
    """A timm VisionTransformer whose block loop is open to plug-ins.

    Args:
        backbone: a timm VisionTransformer with a class token and plain pre-norm blocks (ViT, DeiT, DeiT III, CLIP,
            DINO, MAE; with registers or not). Its classifier is replaced.
        plugins: methods by name, in the order in which each hook calls them.
        num_classes: number of classes; 0 for features alone.
        head: makes the classifier for a number of classes (0 for features), a `FeatureHead` if it has layers before the
            last one. It reads the pooled feature (B, D), or, with `gathers`, the
            class tokens (B, D, L); None for one linear layer.
        gathers: blocks after which the class token is gathered for the head. The final norm is dropped then, as
            nothing passes through it.
        reads: `feature` for a head as above; `patches` for one that reads all tokens after the prefix, (B, N, D), with
            the final norm applied. For the latter the transformer need not have a class token.

    Raises:
        UsageError: the backbone does not support plug-ins, or plug-ins and head do not go together.

    Shape:
        (B, C, H, W) to logits (B, num_classes).
    """

    def __init__(
        self,
        backbone: nn.Module,
        plugins: Mapping[str, Plugin],
        num_classes: int,
        head: Callable[[int], nn.Module] | None = None,
        gathers: Iterable[int] = (),
        reads: Literal["feature", "patches"] = "feature",
    ) -> None:
        super().__init__()
        host = check_backbone(backbone, "token methods", class_token=reads == "feature")
        self.gathers = frozenset(gathers)
        self.reads = reads
        host.reset_classifier(0, "token" if self.gathers else None)
        if self.gathers:
            host.norm = nn.Identity()
            host.fc_norm = nn.Identity()
        self.backbone = host
        self.plugins = nn.ModuleDict(plugins)
        self.num_classes = num_classes
        self.embed_dim = host.embed_dim
        widths = [plugin.feature_width for plugin in self._plugins() if plugin.feature_width is not None]
        if len(widths) + bool(self.gathers) + (reads == "patches") > 1:
            raise UsageError(
                "a head reads one of gathered class tokens, patches, or a plug-in's feature: leave out the others"
            )
        self.num_features = widths[0] if widths else host.embed_dim
        self.in_chans: int = host.in_chans
        self.feature_info = [dict(info, module=f"{_BACKBONE}{info['module']}") for info in host.feature_info]
        self.grad_checkpointing = False
        self._make_head = head or self._linear_head
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        if isinstance(self.head, FeatureHead):
            self.num_features = self.head.num_features
        self.head_hidden_size = self.num_features
        opened = {i for plugin in self._plugins() for i in plugin.opens}
        if opened and not 0 <= min(opened) <= max(opened) < len(host.blocks):
            raise UsageError(
                f"methods work in blocks {sorted(opened)}, and this transformer has 0 to {len(host.blocks) - 1}: "
                "give other blocks"
            )
        for plugin in self._plugins():
            plugin.attach(host)

    def _plugins(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins.values() if isinstance(plugin, Plugin)]

    def _linear_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        layer = nn.Linear(self.num_features, num_classes)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer

    # -- block loop --------------------------------------------------------------------------------------------------

    def encode(
        self,
        x: Tensor,
        *,
        trace: bool = False,
        embedded: Callable[[Tensor], Tensor] | None = None,
        targets: Tensor | None = None,
        text: Tensor | None = None,
        maps: Collection[int] = (),
        last: int | None = None,
    ) -> Tokens:
        """Run embedding and all blocks.

        Args:
            x: images, (B, C, H, W).
            trace: record the choices of plug-ins.
            embedded: function that replaces the embedded tokens (B, T, D) before the first block, for a pass with
                another class token.
            targets: see `Tokens`.
            text: see `Tokens`.
            maps: blocks after which `Tokens.maps` keeps the vectors of all patches.
            last: the last block to run; None for all.

        Returns:
            The tokens after the last block, without the final norm.
        """
        host = self.backbone
        embedding = host._pos_embed(host.patch_embed(x))
        if embedded is not None:
            embedding = embedded(embedding)
        tokens = Tokens(
            host.norm_pre(host.patch_drop(embedding)),
            host.num_prefix_tokens,
            self.grid(x),
            targets=targets,
            text=text,
            trace={} if trace else None,
        )
        if maps and tokens.grid is not None:
            tokens.maps = PatchMaps(tokens.patches, tokens.grid, maps)
        plugins = self._plugins()
        for plugin in plugins:
            if (learned := plugin.extra_tokens()) is not None:
                # like the tokens of timm's embedding, they pass through its dropout and norm
                tokens.append(host.norm_pre(host.pos_drop(learned)).expand(x.shape[0], -1, -1))
            plugin.begin(tokens)
        for i, block in enumerate(host.blocks):
            for plugin in plugins:
                plugin.before(i, tokens)
            count_in = tokens.x.shape[1]
            # a block that no plug-in works inside of runs as timm's own, fused and checkpointed
            inside = [plugin for plugin in plugins if i in plugin.opens]
            if inside:
                self._run_open(i, block, tokens, inside)
            else:
                self._run(block, tokens)
            if trace:
                tokens.record(i, "tokens", torch.tensor([count_in, tokens.x.shape[1]]))
                if host.cls_token is not None:
                    tokens.record(i, "cls", tokens.class_token)
            for plugin in plugins:
                plugin.after(i, tokens)
            if i in self.gathers:
                tokens.gathered.append(tokens.class_token)
            if tokens.maps is not None:
                tokens.maps.after(i, tokens.x[:, tokens.prefix :])
            if i == last:
                break
        for plugin in plugins:
            plugin.finish(tokens)
        return tokens

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of images: constant where the transformer accepts one size alone."""
        embed = self.backbone.patch_embed
        grid: tuple[int, int] = embed.grid_size if embed.strict_img_size else embed.dynamic_feat_size(x.shape[-2:])
        return grid

    def _run(self, block: Any, tokens: Tokens) -> None:
        """Run timm's block as it is."""
        bias = tokens.bias()
        options: dict[str, Any] = {} if bias is None else {"attn_mask": bias}
        if self.grad_checkpointing and self.training:
            tokens.x = checkpoint(block, tokens.x, use_reentrant=False, **options)
        else:
            tokens.x = block(tokens.x, **options)

    def _run_open(self, i: int, block: Any, tokens: Tokens, plugins: Sequence[Plugin]) -> None:
        """Run an opened block, and recompute its activations in the backward pass if that is switched on.

        A recomputation works on a copy of the state in front of the block, so that the hooks act once.
        """
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            self._open(i, block, tokens, plugins)
            return
        before, result = tokens.copy(), [tokens]

        def run(x: Tensor) -> Tensor:
            state = before.copy()
            state.x = x
            self._open(i, block, state, plugins)
            if result:  # not in a recomputation, which would keep its tensors alive
                result[0] = state
            return state.x

        checkpoint(run, tokens.x, use_reentrant=False)
        tokens.become(result.pop())

    @staticmethod
    def _open(i: int, block: Any, tokens: Tokens, plugins: Sequence[Plugin]) -> None:
        """Run block i layer by layer, as timm's `Block.forward` does, with the hooks of plug-ins in between."""
        normed = block.norm1(tokens.x)
        attended = Attended(block.attn, normed, tokens.bias())
        for plugin in plugins:
            plugin.attention(i, tokens, attended)
        # `tokens.x` is read after the hook, which may have dropped rows of it along with queries
        x = tokens.x + block.drop_path1(block.ls1(attended.output()))
        for plugin in plugins:
            if (added := plugin.parallel(i, "attention", attended.normed, tokens)) is not None:
                x = x + added
        tokens.x = x
        for plugin in plugins:
            plugin.between(i, tokens, attended)
        normed = block.norm2(tokens.x)
        x = tokens.x + block.drop_path2(block.ls2(block.mlp(normed)))
        for plugin in plugins:
            if (added := plugin.parallel(i, "mlp", normed, tokens)) is not None:
                x = x + added
        tokens.x = x

    # -- timm's interface --------------------------------------------------------------------------------------------

    def pool(self, tokens: Tokens) -> Tensor:
        """The input of the head: the pooled feature (B, D), the gathered class tokens (B, D, L), or patches (B, N, D).

        Raises:
            UsageError: the head reads patches, and some of them are padding.
        """
        if self.gathers:
            return torch.stack(tokens.gathered, dim=-1)
        host = self.backbone
        x = host.norm(tokens.x)
        if self.reads == "patches":
            if tokens.real is not None:
                raise UsageError(
                    "this head reads the same number of patches from each image: leave out the method that pads"
                )
            patches: Tensor = host.fc_norm(x[:, tokens.prefix :])
            return patches
        if host.global_pool == "token":
            pooled = x[:, 0]
        elif tokens.real is None:
            pooled = x[:, tokens.prefix :].mean(dim=1)
        else:  # the mean of the real tokens alone
            real = tokens.real[:, tokens.prefix :, None].to(x.dtype)  # (B, N, 1)
            pooled = (x[:, tokens.prefix :] * real).sum(dim=1) / real.sum(dim=1)
        normed: Tensor = host.head_drop(host.fc_norm(pooled))
        for plugin in self._plugins():
            normed = plugin.head_feature(normed, tokens)
        return normed

    def features(self, pooled: Tensor) -> Tensor:
        """The output of `pool` to the input of the last layer, (B, `num_features`)."""
        return self.head.features(pooled) if isinstance(self.head, FeatureHead) else pooled

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the input of the last layer, (B, `num_features`)."""
        return self.features(self.pool(self.encode(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, `num_features`) to logits (B, num_classes); with `pre_logits` they are returned unchanged."""
        if pre_logits:
            return x
        result: Tensor = self.head.classify(x) if isinstance(self.head, FeatureHead) else self.head(x)
        return result

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the patches after chosen blocks, and the output of `forward_features`.

        A patch that was merged has the vector of its token, and one that was dropped keeps the last vector that it had.

        Args:
            x: images (B, C, H, W).
            indices: the last n blocks, or these blocks (negative from the end); None for all.
            return_prefix_tokens: not supported, as methods change the prefix.
            norm: apply the final norm to each.
            stop_early: with `intermediates_only`, compute no block after the last chosen one.
            output_fmt: `NCHW` for (B, D, h, w), `NLC` for (B, h w, D).
            intermediates_only: return no features.

        Returns:
            `(features, intermediates)`, or the intermediates alone.

        Raises:
            UsageError: another format, or the prefix is requested.
        """
        if output_fmt not in ("NCHW", "NLC") or return_prefix_tokens:
            raise UsageError("token methods return the features of patches alone, as NCHW or NLC")
        taken, last = feature_take_indices(len(self.backbone.blocks), indices)
        tokens = self.encode(x, maps=taken, last=last if stop_early and intermediates_only else None)
        if tokens.maps is None:
            raise UsageError("the patches of these images form no grid, so there are no feature maps")
        intermediates = [self.backbone.norm(each) if norm else each for _, each in sorted(tokens.maps.kept.items())]
        if output_fmt == "NCHW":
            grid = tokens.maps.grid
            intermediates = [each.transpose(1, 2).unflatten(2, grid).contiguous() for each in intermediates]
        return intermediates if intermediates_only else (self.features(self.pool(tokens)), intermediates)

    @property
    def has_losses(self) -> bool:
        """Whether a plug-in adds terms to the training loss."""
        return any(plugin.has_losses for plugin in self._plugins())

    @property
    def needs_targets(self) -> bool:
        """Whether such a term needs targets."""
        return any(plugin.needs_targets for plugin in self._plugins())

    @property
    def tags(self) -> TagText | None:
        """The plug-in that reads the tags of images; None for a network that reads images alone."""
        return next((plugin for plugin in self._plugins() if isinstance(plugin, TagText)), None)

    @with_types
    def forward(
        self,
        x: Tensor,
        text: Tensor | None = None,
        with_losses: bool = False,
        targets: Tensor | None = None,
        with_tags: bool = False,
    ) -> Any:
        """Images (B, C, H, W) to logits (B, num_classes).

        Args:
            x: the images.
            text: token ids of their tags, (B, n) int64, for a network that reads tags; None if they are unknown.
            with_losses: return also the terms that plug-ins add to the training loss, weighted scalars by name.
            targets: class ids (B,) or soft labels (B, num_classes), for terms that need them.
            with_tags: return also the logits of the tag at each place of the text, (B, n, V).

        Raises:
            UsageError: `with_losses` without the targets that a term needs; text or `with_tags` for a network that does
                not read or predict tags.
        """
        # compared by identity, because torch.fx passes stand-ins of all arguments, which have no truth value
        if with_losses is True and targets is None and self.needs_targets:
            raise UsageError("a loss of this network's methods needs the classes of images: pass targets")
        tags = self.tags
        if tags is None and (isinstance(text, Tensor) or with_tags is True):
            raise UsageError("this network reads images alone: build it with `text = 'vilt'` to read tags")
        tokens = self.encode(x, targets=targets, text=text)
        logits = self.head(self.pool(tokens))
        if tags is not None and with_tags is True:
            return logits, tags.tag_logits(tokens)
        return (logits, tokens.losses) if with_losses is True else logits

    def trace(self, x: Tensor) -> tuple[Tensor, Tokens]:
        """Return the logits, and the tokens with a trace of the choices of plug-ins."""
        tokens = self.encode(x, trace=True)
        return self.head(self.pool(tokens)), tokens

    def adapt_state_dict(self, state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
        """Convert weights of ours or of the bare backbone, in any layout that timm reads, for this model.

        Position embeddings are resampled to this model's grid. The classifier of a bare backbone is left out.
        `model` is unused: it is part of the signature of timm's filters.
        """
        if any(key.startswith(_BACKBONE) for key in state_dict):
            host = {
                key.removeprefix(_BACKBONE): value for key, value in state_dict.items() if key.startswith(_BACKBONE)
            }
            rest = {key: value for key, value in state_dict.items() if not key.startswith(_BACKBONE)}
        else:
            host, rest = state_dict, {}
        host = checkpoint_filter_fn(host, self.backbone)
        # `gathers` drops the final norm, and the classifier of the file is never ours
        dropped = ("head.", "head_dist.", "pre_logits.", *(("norm.", "fc_norm.") if self.gathers else ()))
        return {f"{_BACKBONE}{key}": value for key, value in host.items() if not key.startswith(dropped)} | rest

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        names = {f"{_BACKBONE}{name}" for name in self.backbone.no_weight_decay()}
        for name, plugin in self.plugins.items():
            if isinstance(plugin, Plugin):
                names |= {f"plugins.{name}.{each}" for each in plugin.no_weight_decay()}
        return names

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer decay; plug-ins and head are in the last group."""
        return {
            "stem": r"^backbone\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)",
            "blocks": [(r"^backbone\.blocks\.(\d+)", None), (r"^(?:backbone\.norm|plugins|head)", (99999,))],
        }

    def backbone_parameters(self) -> set[str]:
        """Names of the parameters that `freeze backbone` freezes: the backbone's without those that plug-ins train."""
        trained = {name for plugin in self._plugins() for name in plugin.also_trains}
        return {f"{_BACKBONE}{name}" for name, _ in self.backbone.named_parameters() if name not in trained}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in all blocks."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by one for another number of classes.

        Raises:
            UsageError: another pooling than the backbone's is requested.
        """
        if global_pool not in (None, "", self.backbone.global_pool):
            raise UsageError(
                f"this transformer pools by {self.backbone.global_pool!r}, and cannot pool by {global_pool!r}"
            )
        self.num_classes = num_classes
        like = next(self.backbone.parameters())  # the head may be replaced after the model was moved or converted
        for plugin in self._plugins():
            plugin.reset_classes(num_classes, like)
        if isinstance(self.head, FeatureHead):
            self.head.reset(num_classes, like)
            return
        self.head = self._make_head(num_classes).to(like).train(self.training)


def check_backbone(backbone: nn.Module, methods: str, *, class_token: bool = True) -> Any:
    """Return the backbone if it supports token methods.

    Args:
        backbone: a network.
        methods: name of the methods, plural, for messages.
        class_token: whether it must have a class token.

    Raises:
        UsageError: it is not a vision transformer of timm with a class token and plain pre-norm blocks.
    """
    kind = type(backbone).__name__
    if not isinstance(backbone, VisionTransformer):
        raise UsageError(f"{methods} need a plain vision transformer of timm, and {kind} is not one")
    if class_token and backbone.cls_token is None:
        raise UsageError(f"{methods} need a class token, and this vision transformer pools its patches without one")
    if getattr(backbone, "rope", None) is not None or getattr(backbone, "dynamic_img_size", False):
        raise UsageError(f"{methods} need fixed absolute positions, and this {kind} computes them for each image")
    if backbone.attn_pool is not None:
        raise UsageError(f"{methods} need a class token to classify from, and this {kind} ends in attention pooling")
    for block in backbone.blocks:
        # exact types: a subclass may compute something that `_open` does not repeat
        plain = type(block) is Block and type(block.attn) is Attention and block.attn.gate is None
        if not plain:
            raise UsageError(
                f"{methods} need blocks of attention and MLP one after the other, and this {kind} is made of "
                f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
            )
    return backbone
