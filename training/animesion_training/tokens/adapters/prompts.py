"""Learned tokens in addition to the patches of a frozen transformer: prompts (VPT) and queries (VQT)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion_training.options import in_range, whole_number
from animesion_training.tokens.attention import Attended
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens

_START, _OUTPUTS = "prompts.start", "queries.outputs"


class PromptTuning(Plugin):
    """Visual prompt tuning: learned tokens after class token and registers (arXiv 2203.12119).

    Shallow prompts pass through all blocks; deep prompts are replaced by new ones before each block. They belong to the
    prefix: no method reduces them, and they have no position.

    Trained with a frozen backbone: the prompts and the class token.

    Args:
        width: D.
        depth: number of blocks.
        deep: separate prompts for every block.
        count: number of prompts.
        dropout: dropout rate of the prompts.
        patch_size: (height, width) of a patch in pixels; the initial values depend on it.

    Raises:
        UsageError: an invalid value.
    """

    also_trains = frozenset({"cls_token"})

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        deep: bool = True,
        count: int = 100,
        dropout: float = 0.1,
        patch_size: tuple[int, int] = (16, 16),
    ) -> None:
        super().__init__()
        self.deep = deep
        self.prompts = _start(depth if deep else 1, count, width, patch_size)
        self.drop = nn.Dropout(in_range("dropout", dropout, low=0.0, high=1.0, high_open=True))

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        tokens.scratch[_START] = tokens.prefix
        # inserted once; deep prompts then replace each other in place
        _insert(tokens, self._of(0, tokens))

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        if self.deep and block:
            start = tokens.scratch[_START]
            rest = tokens.x[:, start + self.prompts.shape[1] :]
            tokens.x = torch.cat([tokens.x[:, :start], self._of(block, tokens), rest], dim=1)

    def no_weight_decay(self) -> set[str]:
        """See `Plugin.no_weight_decay`."""
        return {"prompts"}

    def _of(self, block: int, tokens: Tokens) -> Tensor:
        prompts: Tensor = self.drop(self.prompts[block].expand(tokens.x.shape[0], -1, -1))  # (B, count, D)
        return prompts.to(tokens.x.dtype)


class QueryTuning(Plugin):
    """Visual query tuning: learned queries summarise the tokens of each block (arXiv 2212.03220).

    The queries of a block attend to its tokens and pass through its MLP. No token attends to them, so the output of the
    transformer does not change. The input of the head is the outputs of the queries of each block (flattened, P D
    numbers), first block first, and the final class token, each scaled to length 1: L P D + D numbers.

    Trained with a frozen backbone: the queries and the class token.

    Args:
        width: D.
        depth: L, number of blocks.
        count: P, number of queries per block.
        dropout: dropout rate of the queries.
        patch_size: (height, width) of a patch in pixels; the initial values depend on it.

    Raises:
        UsageError: an invalid value.
    """

    also_trains = frozenset({"cls_token"})

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        count: int = 10,
        dropout: float = 0.1,
        patch_size: tuple[int, int] = (16, 16),
    ) -> None:
        super().__init__()
        self.opens = frozenset(range(depth))
        self.queries = _start(depth, count, width, patch_size)
        self.drop = nn.Dropout(in_range("dropout", dropout, low=0.0, high=1.0, high_open=True))
        self.feature_width = width * (1 + depth * count)

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        tokens.scratch[_OUTPUTS] = []

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        queries: Tensor = self.drop(self.queries[block].expand(tokens.x.shape[0], -1, -1))
        _insert(tokens, queries.to(tokens.x.dtype))

    def attention(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.attention`."""
        # the keys of queries are masked rather than removed, so that the keys of other plug-ins keep their places
        mask = _mask(attended.k, tokens.prefix - self.queries.shape[1], tokens.prefix)
        attended.bias = mask[None, None, None] if attended.bias is None else attended.bias + mask

    def after(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.after`."""
        start = tokens.prefix - self.queries.shape[1]
        tokens.scratch[_OUTPUTS].append(tokens.x[:, start : tokens.prefix])
        _remove(tokens, start)

    def head_feature(self, feature: Tensor, tokens: Tokens) -> Tensor:
        """See `Plugin.head_feature`."""
        # one normalised vector (B, P D) per block
        outputs = [functional.normalize(each.flatten(1), dim=-1) for each in tokens.scratch[_OUTPUTS]]
        return torch.cat([*outputs, functional.normalize(feature, dim=-1)], dim=-1)

    def no_weight_decay(self) -> set[str]:
        """See `Plugin.no_weight_decay`."""
        return {"queries"}


@torch.fx.wrap
def _mask(keys: Tensor, start: int, end: int) -> Tensor:
    """The bias (Tk,) that hides the keys (B, heads, Tk, d) from `start` to `end`."""
    mask = keys.new_zeros(keys.shape[2])
    mask[start:end] = torch.finfo(mask.dtype).min
    return mask


def _start(blocks: int, count: int, width: int, patch_size: tuple[int, int]) -> nn.Parameter:
    """Parameters (blocks, count, D), uniform within the Xavier bound of the patch embedding, as in VPT."""
    bound = math.sqrt(6.0 / (3 * patch_size[0] * patch_size[1] + width))
    return nn.Parameter(torch.empty(blocks, whole_number("count", count), width).uniform_(-bound, bound))


def _insert(tokens: Tokens, more: Tensor) -> None:
    """Insert tokens (B, n, D) at the end of the prefix: real, of size one, kept."""

    def with_ones(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        ones = values.new_ones(more.shape[:2])
        return torch.cat([values[:, :end], ones, values[:, end:]], dim=1)

    end = tokens.prefix
    tokens.x = torch.cat([tokens.x[:, :end], more, tokens.x[:, end:]], dim=1)
    tokens.size, tokens.real = with_ones(tokens.size), with_ones(tokens.real)
    tokens.policy = with_ones(tokens.policy)
    tokens.prefix += more.shape[1]


def _remove(tokens: Tokens, start: int) -> None:
    """Remove the tokens of the prefix from `start` on."""

    def without(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.cat([values[:, :start], values[:, end:]], dim=1)

    end = tokens.prefix
    tokens.x = torch.cat([tokens.x[:, :start], tokens.x[:, end:]], dim=1)
    tokens.size, tokens.real, tokens.policy = without(tokens.size), without(tokens.real), without(tokens.policy)
    tokens.prefix = start
