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
from animesion_training.options import in_range
from animesion_training.tokens.adapters.base import as_map, as_tokens, grid_of, init_xavier, parted
from animesion_training.tokens.options import one_of, whole_number
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens


class Bottleneck(nn.Module):
    """`Linear(D, d)`, GELU, `Linear(d, D)`, for each token by itself, or with a convolution over the grid between them.

    The convolution is followed by a GELU of its own. Tokens that are no patches go through it alone, as a map of one
    pixel among zeros: through the middle of its kernel (ConvPass, arXiv 2207.07039).

    The last layer starts at 0, so that the transformer starts as it is; the convolution starts as the identity.

    Args:
        width: D.
        dim: d.
        convolution: odd side of the convolution's kernel, None for none.
        reference_compat: start with Xavier weights throughout, as the original's trainer leaves them.

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
        """What to add.

        Args:
            x: (B, T, D).
            tokens: to tell the patches among x by.

        Raises:
            UsageError: a convolution, and patches that form no grid.
        """
        hidden = self.act(self.down(x))
        if self.conv is not None:
            front, patches, behind = parted(hidden, tokens)
            patches = as_tokens(self.conv(as_map(patches, grid_of(tokens, "convpass"))))
            hidden = self.act(torch.cat([self._alone(front), patches, self._alone(behind)], dim=1))
        out: Tensor = self.up(hidden)
        return out

    def _alone(self, hidden: Tensor) -> Tensor:
        conv: Any = self.conv
        middle = conv.kernel_size[0] // 2
        return functional.linear(hidden, conv.weight[:, :, middle, middle], conv.bias)


class Adapters(Plugin):
    """Bottleneck adapters in every block.

    `parallel`: one beside the attention and one beside the MLP, `x + f(norm(x)) + A(norm(x))`. `sequential`: one
    behind the MLP, `y + A(y)` with y what the block gives.

    Trained with a frozen backbone: the adapters and the class token.

    Args:
        width: D.
        depth: number of blocks.
        dim: d, width inside.
        path: see above.
        convolution: odd side of a kernel over the grid, None for none: 3 makes ConvPass of it.
        reference_compat: see `Bottleneck`.

    Raises:
        UsageError: a value that makes no sense.
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
            raise UsageError(f"convolution is the odd side of a kernel, which has a middle, not {convolution}")
        self.path = path
        self.opens = frozenset(range(depth)) if path == "parallel" else frozenset()

        def one_a_block() -> nn.ModuleList:
            return nn.ModuleList(Bottleneck(width, dim, convolution, reference_compat) for _ in range(depth))

        self.attention_adapters = one_a_block() if path == "parallel" else nn.ModuleList()
        self.mlp_adapters = one_a_block()

    def beside(self, block: int, branch: Literal["attention", "mlp"], normed: Tensor, tokens: Tokens) -> Tensor | None:
        """See `Plugin.beside`."""
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
    """`Adapters` with a convolution over the grid in them (Jie and Deng, arXiv 2207.07039).

    Args:
        width: D.
        depth: number of blocks.
        dim: d, width inside.
        kernel: odd side of the convolution's kernel.
        reference_compat: see `Bottleneck`.

    Raises:
        UsageError: a value that makes no sense; or, when run, patches that form no grid.
    """

    def __init__(
        self, width: int, *, depth: int, dim: int = 8, kernel: int = 3, reference_compat: bool = False
    ) -> None:
        super().__init__(width, depth=depth, dim=dim, convolution=kernel, reference_compat=reference_compat)


class LowRank(nn.Module):
    """`scale * B A x` with A of r rows, for one linear layer; B starts at 0 (arXiv 2106.09685, eq. 3).

    Args:
        in_features: of the layer.
        out_features: of the layer.
        rank: r.
        scale: alpha / r.
        dropout: share of the input that A does not see in training.

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
        """What to add to the layer's output."""
        update: Tensor = self.up(self.down(self.dropout(x)))
        return self.scale * update

    def add_to(self, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The layer's forward hook."""
        added: Tensor = self(given[0])
        return out + added

    @torch.no_grad()
    def merge_into(self, layer: nn.Linear) -> None:
        """Put the update into the layer's weight, and start again at 0."""
        update = self.scale * (self.up.weight.double() @ self.down.weight.double())
        layer.weight.copy_(layer.weight.double() + update)
        nn.init.zeros_(self.up.weight)


class LoRA(Plugin):
    """Low-rank updates of linear layers in every block's attention, `W + alpha / r * B A`.

    No block is opened: the updates are hooks on the layers. B starts at 0, so the transformer starts as it is.

    Args:
        width: D.
        depth: number of blocks.
        rank: r.
        alpha: what the update is multiplied with, times r.
        dropout: share of the update's input that is dropped in training, in [0, 1).
        targets: which layers: `qkv`, one update for the three of them, and `proj`.

    Raises:
        UsageError: a value that makes no sense.
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
            raise UsageError(f"targets of adapter lora is a list of qkv, proj or both, not {targets!r}")
        for target in targets:
            one_of("targets", target, ("qkv", "proj"))
        outs = {"qkv": 3 * width, "proj": width}
        self.updates = nn.ModuleList(
            nn.ModuleDict({target: LowRank(width, outs[target], rank, scale, dropout) for target in targets})
            for _ in range(depth)
        )

    def attach(self, backbone: Any) -> None:
        """See `Plugin.attach`."""
        for layer, update in self._pairs(backbone):
            layer.register_forward_hook(update.add_to)

    def merge(self, backbone: Any) -> None:
        """Put the updates into the weights of the transformer that this is on; the network computes what it did.

        The updates start again at 0: they can be trained on, or left out from then on.
        """
        for layer, update in self._pairs(backbone):
            update.merge_into(layer)

    def _pairs(self, backbone: Any) -> list[tuple[Any, Any]]:
        return [
            (getattr(block.attn, target), update)
            for block, updates in zip(backbone.blocks, self.updates, strict=True)
            for target, update in updates.items()  # type: ignore[operator]
        ]
