"""Part selection in one pass: the last block sees the class token and the patches with the most attention.

TransFG, FFVT and TransFG's contrastive loss. Selectors with a second pass over a crop are in `twopass`, reductions
that keep most tokens in `reductions`, overlapping patches in `overlapping_patches`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.options import in_range, whole_number
from animesion_training.tokens.attention import Attended
from animesion_training.tokens.autocast import without_autocast
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.reductions.base import take
from animesion_training.tokens.state import Tokens

#: Name -> description.
PART_SELECTORS = {
    "transfg": "for each head, the patch with the highest attention accumulated over all blocks (He et al., AAAI 2022)",
    "ffvt": "in every block, patches with high mutual attention with the class token (Wang et al., BMVC 2021)",
}

_PARTS = "partselect.parts"
_TOKENS_CHANGED = "part selection needs the same tokens in all blocks: leave out methods that change their number"


class _PartSelector(Plugin):
    """Base of the selectors: the input of the last block is the prefix and selected tokens.

    With a frozen backbone, the last block, the final norm and the class token are trained.
    """

    keeps_grid = False

    def __init__(self, depth: int) -> None:
        super().__init__()
        if whole_number("depth", depth) < 2:
            raise UsageError("part selection needs at least two blocks: one to select in, and one to process the parts")
        self.last = depth - 1
        self.opens = frozenset(range(self.last))

    def attach(self, backbone: Any) -> None:
        """See `Plugin.attach`."""
        trained = ("cls_token", f"blocks.{self.last}.", "norm.", "fc_norm.")
        self.also_trains = frozenset(name for name, _ in backbone.named_parameters() if name.startswith(trained))

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        tokens.scratch[_PARTS] = []

    def _keep(self, parts: Tensor, tokens: Tokens) -> None:
        """Make prefix and parts (B, K, D) the input of the last block."""
        if tokens.maps is not None:  # patches keep their vectors of the block before
            rows = torch.zeros(len(parts), 0, dtype=torch.int64, device=parts.device)
            tokens.maps.keep_rows(rows, tokens.x.shape[1] - tokens.prefix)
        tokens.x = torch.cat([tokens.x[:, : tokens.prefix], parts], dim=1)
        tokens.grid, tokens.extra = None, 0

    @staticmethod
    def _check(tokens: Tokens) -> None:
        if tokens.size is not None or tokens.real is not None or tokens.policy is not None:
            raise UsageError("part selection needs tokens that are one patch each: leave out the token reduction")


class TransFG(_PartSelector):
    """The patch that each head attends to most through all blocks but the last (He et al., arXiv 2103.07976).

    The part of a head is the patch with the largest entry in the class token's row of `A_{L-2} ... A_1 A_0`, the
    product of the attention matrices of that head. The input of the last block is the prefix and one part per head; a
    patch may be selected twice.

    The row is multiplied through the blocks from the last one back, with weights recomputed from queries and keys. This
    costs O(L H N^2) instead of the O(L H N^3) of the full product; no weights are stored, and attention stays fused.
    The selection has no gradient.

    Trace: `block{L-2}.part_idx`, (B, heads), counted from the end of the prefix.

    Args:
        depth: L, number of blocks.
        contrastive: weight of `contrastive_loss` on the final class token; 0 for no such term.
        margin: margin of that loss, in [0, 1).

    Raises:
        UsageError: an invalid value; in the forward pass, patches that were dropped or merged; in training with a
            contrastive loss, soft labels.
    """

    def __init__(self, *, depth: int, contrastive: float = 0.0, margin: float = 0.4) -> None:
        super().__init__(depth)
        self.contrastive = in_range("contrastive", contrastive, low=0.0)
        self.margin = in_range("margin", margin, low=0.0, high=1.0, high_open=True)
        self.has_losses = self.needs_targets = self.contrastive > 0

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.between`."""
        self._check(tokens)
        q, k = attended.q.detach(), attended.k.detach()
        tokens.scratch[_PARTS].append((q, k, attended.attention.scale, attended.bias))

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        if block != self.last:
            return
        self._check(tokens)
        row = _class_row_of_product(tokens.scratch.pop(_PARTS), tokens.x.shape[1])
        end = tokens.x.shape[1] - tokens.extra
        parts = row[:, :, tokens.prefix : end].argmax(dim=-1)
        tokens.record(block - 1, "part_idx", parts)
        self._keep(take(tokens.x[:, tokens.prefix :], parts), tokens)

    def head_feature(self, feature: Tensor, tokens: Tokens) -> Tensor:
        """See `Plugin.head_feature`."""
        if self.contrastive and self.training and tokens.targets is not None:
            loss = contrastive_loss(feature, tokens.targets, self.margin)
            tokens.losses["transfg_contrastive"] = self.contrastive * loss
        return feature


# fx does not trace into these functions, which compare shapes
torch.fx.wrap("_class_row_of_product")
torch.fx.wrap("_best_rows")
torch.fx.wrap("take")
torch.fx.wrap("_rows_of_output")


@torch.no_grad()
def _class_row_of_product(blocks: list[tuple[Tensor, Tensor, float, Tensor | None]], count: int) -> Tensor:
    """Row 0 of the product of attention matrices, that of the last block first: (B, heads, T).

    Args:
        blocks: queries and keys (B, heads, T, d), scale and bias of each block, first block first.
        count: T, number of tokens after them.

    Raises:
        UsageError: the number of tokens changes between blocks.
    """
    row: Tensor | None = None
    for q, k, scale, bias in reversed(blocks):
        if row is None:  # of the last block, only the row of the class token is needed
            scores = (q[:, :, :1] * scale) @ k.transpose(-2, -1)
            row = (scores if bias is None else scores + bias[:, :, :1]).softmax(dim=-1)
            continue
        if k.shape[2] != row.shape[-1] or q.shape[2] != row.shape[-1]:
            raise UsageError(_TOKENS_CHANGED)
        scores = (q * scale) @ k.transpose(-2, -1)
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        with without_autocast(q):  # rounding errors would add up over blocks
            row = row.float() @ weights.float()
    assert row is not None
    if row.shape[-1] != count:
        raise UsageError(_TOKENS_CHANGED)
    return row[:, :, 0]


def _best_rows(scores: Tensor, count: int) -> Tensor:
    """The `count` tokens with the best scores (B, T), best first."""
    if scores.shape[1] < count:
        raise UsageError(f"selector ffvt selects {count} patches per block, and there are {scores.shape[1]}")
    return scores.topk(count, dim=1).indices


def _rows_of_output(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Rows (B, K) of the output (B, T, D) of a block, for which they were selected among `count` tokens."""
    if x.shape[1] != count:
        raise UsageError("selector ffvt selects from the outputs of a block: put it before other plug-ins")
    return take(x, rows)


class FFVT(_PartSelector):
    """Feature fusion: the input of the last block is patches of every other block (Wang et al., arXiv 2107.02341).

    In each block, the score of a token is its mutual attention with the class token: the mean over heads of the softmax
    over queries of its score for the class token as a key, times the mean over heads of the class token's weight for
    it. The outputs of the block for the `count` best tokens are selected. The selection has no gradient.

    `reference_compat`: the class token and other prefix tokens may be selected.

    Trace: `block{i}.part_idx`, (B, count), best first, counted from the end of the prefix (with `reference_compat` from
    the class token).

    Args:
        depth: number of blocks.
        count: selected tokens per block, at most the number of patches.
        reference_compat: see above.

    Raises:
        UsageError: an invalid value; in the forward pass, patches that were dropped or merged.
    """

    def __init__(self, *, depth: int, count: int = 12, reference_compat: bool = False) -> None:
        super().__init__(depth)
        self.count = whole_number("count", count)
        self.reference_compat = reference_compat

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.between`."""
        self._check(tokens)
        first = 0 if self.reference_compat else tokens.prefix
        # scores of all queries for the class token as a key, (B, heads, T, 1)
        column = (attended.q.detach() * attended.attention.scale) @ attended.k[:, :, :1].detach().transpose(-2, -1)
        if attended.bias is not None:
            column = column + attended.bias[..., :1]
        to_class_token = column[..., 0].softmax(dim=-1).mean(dim=1)  # (B, T)
        mutual = to_class_token * attended.class_row.detach().mean(dim=1)
        end = mutual.shape[1] - tokens.extra
        parts = _best_rows(mutual[:, first:end], self.count)
        tokens.record(block, "part_idx", parts)
        tokens.scratch[f"{_PARTS}.now"] = (parts + first, mutual.shape[1])

    def after(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.after`."""
        if block == self.last:
            return
        parts, count = tokens.scratch.pop(f"{_PARTS}.now")
        tokens.scratch[_PARTS].append(_rows_of_output(tokens.x, parts, count))

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        if block == self.last:
            self._keep(torch.cat(tokens.scratch.pop(_PARTS), dim=1), tokens)


def contrastive_loss(features: Tensor, targets: Tensor, margin: float = 0.4) -> Tensor:
    """TransFG's contrastive loss: pull images of one class together, push others apart (arXiv 2103.07976).

    `1 / B^2 sum_i [ sum_{j: same class} (1 - cos_ij) + sum_{j: other} max(cos_ij - margin, 0) ]`, i itself included.

    Args:
        features: (B, D).
        targets: class ids (B,), integers.
        margin: cosine above which images of other classes are pushed apart.

    Returns:
        A scalar, float32 at least, >= 0.

    Raises:
        UsageError: soft labels.
    """
    if targets.is_floating_point():
        raise UsageError("a contrastive loss needs one class per image: switch MixUp and CutMix off")
    with without_autocast(features):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        directions = functional.normalize(features, dim=1)
        cosines = directions @ directions.T  # (B, B)
        same = targets[:, None] == targets
        terms = torch.where(same, 1 - cosines, (cosines - margin).clamp_min(0))
        return terms.sum() / len(features) ** 2


def make_part_selector(name: str, *, depth: int, reference_compat: bool = False, **options: Any) -> Plugin:
    """Make a part selector by name.

    Args:
        name: one of `PART_SELECTORS`.
        depth: number of blocks of the transformer.
        reference_compat: reproduce what we consider faults of the originals, as documented in each class.
        **options: arguments of the method's class.

    Raises:
        UsageError: an unknown name or option, or an invalid value; the message lists the possible ones.
    """
    kinds: dict[str, type[_PartSelector]] = {"transfg": TransFG, "ffvt": FFVT}
    if name not in kinds:
        near = nearest(name, PART_SELECTORS)
        raise UsageError(f"there is no part selector '{name}'{near}; there are {', '.join(PART_SELECTORS)}")
    accepted = set(inspect.signature(kinds[name]).parameters)
    site = {"depth": depth, "reference_compat": reference_compat}
    known = sorted(accepted - site.keys())
    if unknown := sorted(options.keys() - set(known)):
        raise UsageError(f"selector {name} has no option {', '.join(unknown)}: it has {', '.join(known)}")
    return kinds[name](**{option: value for option, value in (site | options).items() if option in accepted})
