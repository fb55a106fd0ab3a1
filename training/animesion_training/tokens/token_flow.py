"""Attention rollout of a whole network, also where methods move tokens between the attentions.

`rollout` has the formula for a constant number of tokens. Here tokens are followed through adapters that shrink the
grid and reductions that drop or merge them, and networks of timm are read without a host around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.tokens.adapters.prompts import PromptTuning, QueryTuning
from animesion_training.tokens.attention import Attended
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.patch_maps import PatchMaps
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.reductions.merging import SoftReduction
from animesion_training.tokens.reductions.pruning import EViT
from animesion_training.tokens.rollout import attention_weights, rollout
from animesion_training.tokens.state import Tokens


def rollout_map(model: nn.Module, x: Tensor) -> Tensor:
    """Attention rollout of the output over patches, (B, rows, columns), float32.

    The row of the class token, or, of a network that pools patches, the mean of their rows. For its host with methods,
    the product has further factors between the attentions: a token that is dropped leaves, tokens that merge become
    their mean by the number of their patches (DPC-KNN's learned weights are left out), EViT's fused token is the mean
    of the dropped ones by the class token's attention, and the grid after an inter-layer adapter is the mean over its
    window. MLPs and the convolutions of adapters are left out, as MLPs are in rollout.

    Args:
        model: in evaluation mode, without a wrapper.
        x: normalised images, (B, C, H, W).

    Raises:
        UsageError: a network without attention over all patches in all of its blocks, or a method for which the rollout
            is not defined.
    """
    host = getattr(model, "encoder", model)
    with torch.inference_mode():
        if isinstance(host, TokenVisionTransformer):
            # padding of other images would be part of the product
            return torch.cat([_of_host(host, x[i : i + 1]) for i in range(len(x))])
        return _of_timm(model, x)


# -- hosts with methods ----------------------------------------------------------------------------------------------


class _Flow(PatchMaps):
    """Tells a recorder how tokens after the prefix are moved: the shares (B, n', n) of old tokens in new ones."""

    def __init__(self, recorder: _Recorder, patches: Tensor, grid: tuple[int, int]) -> None:
        super().__init__(patches, grid, ())
        self._recorder = recorder
        self._listening = True

    def move(self, places: Tensor) -> None:
        """See `PatchMaps.move`."""
        if self._listening:
            self._recorder.moved(places)
        super().move(places)

    def restore(self) -> None:
        """See `PatchMaps.restore`."""
        raise UsageError("attention rollout is not defined for last_layer_fusion, which restores dropped tokens")

    def shrink(self, old: tuple[int, int], new: tuple[int, int], extra: int) -> None:
        """See `PatchMaps.shrink`: each new cell is the mean over a window of the old grid."""
        shares = torch.zeros(*new, *old, device=self.places.device)
        height, width = old[0] - new[0] + 1, old[1] - new[1] + 1
        for row in range(new[0]):
            for column in range(new[1]):
                shares[row, column, row : row + height, column : column + width] = 1 / (height * width)
        patches = shares.view(new[0] * new[1], old[0] * old[1])
        self._recorder.mixed(_diagonal(patches, torch.eye(extra, device=patches.device))[None])
        self._listening = False
        super().shrink(old, new, extra)
        self._listening = True


class _Recorder(Plugin):
    """Multiplies the attention of all blocks while the network runs.

    It is the first plug-in, so that it sees each attention before others drop or merge the tokens behind it.

    Args:
        host: the network.
    """

    def __init__(self, host: TokenVisionTransformer) -> None:
        super().__init__()
        plugins = [each for each in host.plugins.values() if isinstance(each, Plugin)]
        self.opens = frozenset(range(len(host.backbone.blocks)))
        self.own_prefix = host.backbone.num_prefix_tokens
        self.fuses = any(isinstance(each, EViT) for each in plugins)
        self.renews = any(isinstance(each, PromptTuning) and each.deep for each in plugins)
        self.renews |= any(isinstance(each, QueryTuning) for each in plugins)
        self.product: Tensor | None = None  # (1, T, T0)
        self.sizes: Tensor | None = None  # patches of each token after the prefix, (1, n)
        self.prefix = self.count = 0
        self._attention: Tensor | None = None  # of the last block, (1, T', T)
        self._inside = False
        self._selected: Tensor | None = None

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        if tokens.grid is None:
            raise UsageError("attention rollout needs patches that form a grid")
        self.count = tokens.grid[0] * tokens.grid[1]
        tokens.maps = _Flow(self, tokens.patches, tokens.grid)

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        self.prefix = tokens.prefix
        if self.product is not None and self.renews:
            # prompts are replaced by those of the block, which have seen nothing
            new = torch.eye(self.product.shape[2], device=self.product.device)[None, self.own_prefix : self.prefix]
            self.product[:, self.own_prefix : self.prefix] = new

    def attention(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.attention`."""
        self._inside = True

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.between`."""
        attention = attention_weights(attended).mean(1)
        self._inside, self._attention = False, attention
        queries, keys = attention.shape[1:]
        if self.product is None:
            self.product = torch.eye(keys, device=attention.device)[None]
            self.sizes = torch.ones(1, keys - self.prefix, device=attention.device)
        residual = torch.eye(keys, device=attention.device)[None]
        if self._selected is not None:
            residual, self._selected = self._with_prefix(self._selected), None
        if residual.shape[1:] != (queries, keys) or self.product.shape[1] != keys:
            raise UsageError(
                f"attention rollout is not defined for this network: block {block} attends to {keys} tokens after "
                f"{self.product.shape[1]}, and nothing says which patches they are of"
            )
        step = attention + residual
        self.product = step / step.sum(-1, keepdim=True) @ self.product

    def moved(self, places: Tensor) -> None:
        """Tokens after the prefix have new places (1, n), -1 for dropped."""
        if self.sizes is None or self.sizes.shape != places.shape:
            if self.product is not None:
                raise UsageError("attention rollout is not defined for methods that add tokens")
            self.sizes = torch.ones(places.shape, device=places.device)
        count = int(places.max()) + 1
        member = torch.zeros(count + 1, places.shape[1], device=places.device)
        member[places[0], torch.arange(places.shape[1])] = 1.0  # -1 is the last row
        weighted = member[:-1] * self.sizes
        rows = weighted.sum(1, keepdim=True)
        shares = weighted / rows.clamp_min(1e-12)
        sizes = rows[:, 0]
        if self.fuses and self._attention is not None and member[-1].any():
            dropped = member[-1] * self._attention[0, 0, self.prefix :]
            shares = torch.cat([shares, dropped[None] / dropped.sum()])
            sizes = torch.cat([sizes, (member[-1] * self.sizes[0]).sum()[None]])
        self.sizes = sizes[None]
        self.mixed(shares[None])

    def mixed(self, shares: Tensor) -> None:
        """Tokens after the prefix are means of others, by shares (1, n', n)."""
        if self._inside:
            self._selected = shares
        else:
            if self.product is None:  # in front of the first attention
                start = torch.eye(self.prefix + shares.shape[2], device=shares.device)[None]
                self.product = start
            self.product = self._with_prefix(shares) @ self.product
        self.sizes = torch.ones(1, shares.shape[1], device=shares.device) if self.sizes is None else self.sizes
        if self.sizes.shape[1] != shares.shape[1]:
            self.sizes = torch.ones(1, shares.shape[1], device=shares.device)

    def _with_prefix(self, shares: Tensor) -> Tensor:
        return _diagonal(torch.eye(self.prefix, device=shares.device), shares[0])[None]


def _diagonal(first: Tensor, second: Tensor) -> Tensor:
    """The block-diagonal matrix of two matrices."""
    result: Tensor = torch.block_diag(first, second)  # type: ignore[no-untyped-call]
    return result


def _of_host(host: TokenVisionTransformer, x: Tensor) -> Tensor:
    for name, plugin in host.plugins.items():
        if isinstance(plugin, SoftReduction):
            raise UsageError(
                f"attention rollout is not defined for {name} {type(plugin).__name__}: its tokens are learned mixtures"
            )
    recorder = _Recorder(host)
    plugins = host.plugins
    host.plugins = nn.ModuleDict({"rollout_recorder": recorder, **plugins})
    try:
        tokens = host.encode(x)
    finally:
        host.plugins = plugins
    product = recorder.product
    assert product is not None
    if product.shape[1] != tokens.x.shape[1]:
        raise UsageError(
            f"attention rollout is not defined for this network: {tokens.x.shape[1]} tokens are left of "
            f"{product.shape[1]}, and nothing says which"
        )
    pools = host.backbone.global_pool != "token" and not host.gathers
    row = product[:, tokens.prefix :].mean(1) if pools or host.reads == "patches" else product[:, 0]
    return row[:, recorder.prefix :][:, : recorder.count].reshape(len(row), *host.grid(x))


# -- networks of timm ------------------------------------------------------------------------------------------------


def _of_timm(model: nn.Module, x: Tensor) -> Tensor:
    network: Any = model
    while not hasattr(network, "blocks") and isinstance(inner := getattr(network, "backbone", None), nn.Module):
        network = inner
    name = type(network).__name__
    with recorded_attention(network) as weights:
        model(x)
    embed: Any = getattr(network, "patch_embed", None)
    if not hasattr(embed, "dynamic_feat_size"):
        raise UsageError(f"attention rollout needs a grid of patches, and {name} has none")
    grid = embed.dynamic_feat_size(tuple(x.shape[-2:]))
    prefix = weights[0].shape[-1] - grid[0] * grid[1]
    if prefix < 0 or any(len(each) != len(x) or each.shape[-2:] != weights[0].shape[-2:] for each in weights):
        raise UsageError(f"attention rollout needs attention over all patches in all blocks, and {name} has windows")
    pool = getattr(network, "global_pool", "token")
    if pool == "map" or getattr(network, "attn_pool", None) is not None:
        raise UsageError(f"attention rollout ends at a class token or a mean, and {name} ends in attention pooling")
    classified = pool == "token" and prefix
    product = rollout([each.float() for each in weights])
    row = product[:, 0] if classified else product[:, prefix:].mean(1)
    return row[:, prefix:].reshape(len(row), *grid)


@contextmanager
def recorded_attention(network: Any) -> Iterator[list[Tensor]]:
    """Record the attention weights of all blocks of a timm network, (B, heads, T, T) each, while it runs.

    They are the input of the dropout of attention, which networks of timm call with the fused attention switched off.

    Raises:
        UsageError: not every block has such an attention.
    """
    blocks: Any = getattr(network, "blocks", None)
    attentions: list[Any] = (
        [getattr(block, "attn", None) for block in blocks] if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
    )
    for each in attentions or [None]:
        if not isinstance(getattr(each, "attn_drop", None), nn.Module) or not hasattr(each, "fused_attn"):
            raise UsageError(f"{type(network).__name__} is no transformer with an attention in each of its blocks")
    found: list[Tensor] = []
    fused = [each.fused_attn for each in attentions]
    with ExitStack() as stack:
        for each in attentions:
            hook = each.attn_drop.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
            stack.callback(hook.remove)
        try:
            for each in attentions:
                each.fused_attn = False
            yield found
        finally:
            for each, before in zip(attentions, fused, strict=True):
                each.fused_attn = before
    if len(found) != len(attentions) or any(each.dim() != 4 for each in found):
        raise UsageError(f"the attention of {type(network).__name__} cannot be read: it is called in another way")
