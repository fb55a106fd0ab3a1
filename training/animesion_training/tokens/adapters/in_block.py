"""Adapters inside the blocks of a frozen transformer: bottleneck adapters, ConvPass and LoRA.

Modules between blocks are in `ila`, learned tokens in `prompts`. Which parameters are frozen is decided by
`TokenVisionTransformer.backbone_parameters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.options import in_range, one_of, whole_number
from animesion_training.tokens.adapters.base import as_map, as_tokens, grid_of, init_xavier, split_tokens
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens


class Bottleneck(nn.Module):
    """`Linear(D, d)`, GELU, `Linear(d, D)` for each token, optionally with a convolution over the grid in the middle.

    The convolution is followed by another GELU. Each token that is not a patch is convolved as a map of one pixel with
    zero padding, so only the center of the kernel applies to it (ConvPass, arXiv 2207.07039).

    The last layer starts at 0, so that the network starts as the frozen transformer; the convolution starts as the
    identity.

    Args:
        width: D.
        dim: d.
        convolution: odd side of the convolution's kernel; None for no convolution.
        reference_compat: start with Xavier weights in all layers, as the original's trainer does.

    Shape:
        (B, T, D) to (B, T, D).
    """

    conv: nn.Conv2d | None

    def __init__(
        self, width: int, dim: int = 8, convolution: int | None = None, reference_compat: bool = False
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, whole_number("dim", dim))
        self.act = nn.GELU()
        self.conv = nn.Conv2d(dim, dim, convolution, padding=convolution // 2) if convolution else None
        self.up = nn.Linear(dim, width)
        init_xavier(self)
        if not reference_compat:
            nn.init.zeros_(self.up.weight)
            if self.conv is not None:
                nn.init.dirac_(self.conv.weight)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return the output to add.

        Args:
            x: (B, T, D).
            tokens: the layout of x: which rows are patches, and their grid.

        Raises:
            UsageError: a convolution, and patches that form no grid.
        """
        hidden = self.act(self.down(x))
        if self.conv is not None:
            prefix, patches, extra = split_tokens(hidden, tokens)
            patches = as_tokens(self.conv(as_map(patches, grid_of(tokens, "convpass"))))
            # one pixel with zero padding is only ever under the center of the kernel
            hidden = self.act(torch.cat([self._center(prefix), patches, self._center(extra)], dim=1))
        out: Tensor = self.up(hidden)
        return out

    def _center(self, hidden: Tensor) -> Tensor:
        """Apply the center of the kernel to tokens (B, n, d)."""
        conv: Any = self.conv
        middle = conv.kernel_size[0] // 2
        return functional.linear(hidden, conv.weight[:, :, middle, middle], conv.bias)


class Adapters(Plugin):
    """Bottleneck adapters in every block.

    `parallel`: one parallel to the attention and one parallel to the MLP, `x + f(norm(x)) + A(norm(x))`. `sequential`:
    one after the MLP, `y + A(y)` with y the output of the block.

    Trained with a frozen backbone: the adapters and the class token.

    Args:
        width: D.
        depth: number of blocks.
        dim: d, width of the bottleneck.
        path: see above.
        convolution: odd side of a kernel over the grid, None for no convolution; 3 is ConvPass.
        reference_compat: see `Bottleneck`.

    Raises:
        UsageError: an invalid value.
    """

    also_trains = frozenset({"cls_token"})

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        dim: int = 8,
        path: Literal["parallel", "sequential"] = "parallel",
        convolution: int | None = None,
        reference_compat: bool = False,
    ) -> None:
        super().__init__()
        one_of("path", path, ("parallel", "sequential"))
        if convolution is not None and whole_number("convolution", convolution) % 2 == 0:
            raise UsageError(f"convolution is the odd side of a kernel, which must have a center, not {convolution}")
        self.path = path
        self.opens = frozenset(range(depth)) if path == "parallel" else frozenset()

        def one_per_block() -> nn.ModuleList:
            return nn.ModuleList(Bottleneck(width, dim, convolution, reference_compat) for _ in range(depth))

        self.attention_adapters = one_per_block() if path == "parallel" else nn.ModuleList()
        self.mlp_adapters = one_per_block()

    def parallel(
        self, block: int, branch: Literal["attention", "mlp"], normed: Tensor, tokens: Tokens
    ) -> Tensor | None:
        """See `Plugin.parallel`."""
        if self.path == "sequential":
            return None
        adapters = self.attention_adapters if branch == "attention" else self.mlp_adapters
        added: Tensor = adapters[block](normed, tokens)
        return added

    def after(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.after`."""
        if self.path == "sequential":
            tokens.x = tokens.x + self.mlp_adapters[block](tokens.x, tokens)


class ConvPass(Adapters):
    """`Adapters` with a convolution over the grid inside (Jie and Deng, arXiv 2207.07039).

    Args:
        width: D.
        depth: number of blocks.
        dim: d, width of the bottleneck.
        kernel: odd side of the convolution's kernel.
        reference_compat: see `Bottleneck`.

    Raises:
        UsageError: an invalid value; or, in the forward pass, patches that form no grid.
    """

    def __init__(
        self, width: int, *, depth: int, dim: int = 8, kernel: int = 3, reference_compat: bool = False
    ) -> None:
        super().__init__(width, depth=depth, dim=dim, convolution=kernel, reference_compat=reference_compat)


class LowRank(nn.Module):
    """The update `scale * B A x` of one linear layer, A with r rows; B starts at 0 (arXiv 2106.09685, eq. 3).

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        rank: r.
        scale: alpha / r.
        dropout: dropout rate of the input of A.

    Shape:
        (..., in_features) to (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of the layer's output."""
        update: Tensor = self.up(self.down(self.dropout(x)))
        return self.scale * update

    @torch.no_grad()
    def merge_into(self, layer: nn.Linear) -> None:
        """Add the update to the layer's weight, and reset it to 0."""
        # in float64, so that merging rounds once
        update = self.scale * (self.up.weight.double() @ self.down.weight.double())
        layer.weight.copy_(layer.weight.double() + update)
        nn.init.zeros_(self.up.weight)


class UpdatedLinear(nn.Linear):
    """A linear layer whose output has an update added; the plug-in owns the update and its parameters.

    It is a class and not a forward hook: `torch.compile` does not check hooks (`skip_nnmodule_hook_guards`), so code
    compiled for the same layer without an update would run in its place and drop the update.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        [update] = self.__dict__["low_rank"]
        output: Tensor = super().forward(input) + update(input)
        return output

    @classmethod
    def convert(cls, layer: Any, update: LowRank) -> None:
        """Add an update to a layer in place; the names and values of its parameters stay."""
        layer.__class__ = cls
        # in a tuple, so that the update is not registered as a part of the layer too
        layer.__dict__["low_rank"] = (update,)


class LoRA(Plugin):
    """Low-rank updates of linear layers in every block's attention, `W + alpha / r * B A`.

    The updates are added inside the layers, so no block is opened. B starts at 0, so the network starts as the frozen
    transformer.

    Args:
        width: D.
        depth: number of blocks.
        rank: r.
        alpha: r times the factor of the update.
        dropout: dropout rate of the update's input, in [0, 1).
        targets: layers with an update: `qkv`, one update for all three, and `proj`.

    Raises:
        UsageError: an invalid value.
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        targets: Sequence[str] = ("qkv", "proj"),
    ) -> None:
        super().__init__()
        scale = in_range("alpha", alpha, low=0.0, low_open=True) / whole_number("rank", rank)
        in_range("dropout", dropout, low=0.0, high=1.0, high_open=True)
        if isinstance(targets, str) or not targets or len(set(targets)) != len(targets):
            raise UsageError(f"targets of adapter lora must be a list of qkv, proj or both, not {targets!r}")
        for target in targets:
            one_of("targets", target, ("qkv", "proj"))
        # timm computes queries, keys and values in one layer
        outs = {"qkv": 3 * width, "proj": width}
        self.updates = nn.ModuleList(
            nn.ModuleDict({target: LowRank(width, outs[target], rank, scale, dropout) for target in targets})
            for _ in range(depth)
        )

    def attach(self, backbone: Any) -> None:
        """See `Plugin.attach`."""
        for layer, update in self._pairs(backbone):
            UpdatedLinear.convert(layer, update)

    def merge(self, backbone: Any) -> None:
        """Merge the updates into the weights of the transformer; the output of the network does not change.

        The updates are reset to 0: they can be trained further, or left out.
        """
        for layer, update in self._pairs(backbone):
            update.merge_into(layer)

    def _pairs(self, backbone: Any) -> list[tuple[Any, Any]]:
        """Layers of a timm transformer with their updates."""
        return [
            (getattr(block.attn, target), update)
            for block, updates in zip(backbone.blocks, self.updates, strict=True)
            for target, update in updates.items()  # type: ignore[operator]
        ]
