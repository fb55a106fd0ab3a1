"""Token Cropr: tokens are scored by learned queries, which auxiliary classifiers train and inference does without.

Plans and keep rates are in `base`, methods without classifiers of their own in `pruning` and `merging`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.options import in_range
from animesion_training.tokens.reductions.base import Reduction, ReductionPlan, init_linear, keep_rows, take
from animesion_training.tokens.state import Tokens

_DROPPED = "cropr.dropped"


class Cropr(Reduction):
    """Cross-attention pruning: keep the tokens that an auxiliary classifier reads (Bergner et al., CVPR 2025).

    Before its block, each stage scores the tokens X (n, D) after the prefix by a learned query q (section 3 of the
    paper, arXiv 2412.00965): `a = X q`, without projections, heads or norm. The planned number of tokens with the
    highest scores is kept, in that order; tokens that a cache has restored are not counted by the plan. In training,
    with targets, the same attention aggregates all of them, `softmax(a / sqrt(D)) X`, and a classifier on that vector
    adds its cross entropy to the loss. A stop-gradient in front of the scores keeps this term out of the backbone, so
    it trains queries and auxiliary classifiers alone. Without targets and in evaluation only the scores are computed.

    With `last_layer_fusion`, all dropped tokens return before the last block, as they were when they were dropped and
    at their old places (the paper's LLF); the patches form their grid again. For heads that read patches.

    The paper removes a constant number R of tokens after every block but the last. This is `reduction_layers` from 1
    to L - 1 with keep rates `(N - (i + 1) R) / (N - i R)`.

    Open in what we have of the paper, and chosen here: the class token is neither scored nor aggregated; queries start
    truncated normal with standard deviation 0.02; the aggregated vector v passes `v + MLP(LayerNorm(v))` with the MLP
    of a ViT (4 D, GELU) and one linear layer; terms of stages are summed with weight 1. As in the paper's
    classification networks, a stage has one query.

    Trace: `kept_idx` (B, K), counted from the end of the prefix, by descending score.

    Args:
        plan: blocks and keep rates.
        loss_weight: weight of the term `cropr_auxiliary`, the sum over stages of the cross entropy; above 0.
        last_layer_fusion: see above.

    Raises:
        UsageError: an invalid value, or a stage at the last block with `last_layer_fusion`.
    """

    def __init__(self, plan: ReductionPlan, loss_weight: float = 1.0, last_layer_fusion: bool = False) -> None:
        super().__init__(plan)
        self.loss_weight = in_range("loss_weight of reduction cropr", loss_weight, low=0.0, low_open=True)
        if not isinstance(last_layer_fusion, bool):
            raise UsageError(f"last_layer_fusion of reduction cropr is true or false, not {last_layer_fusion!r}")
        if last_layer_fusion and plan.depth - 1 in self.stages:
            raise UsageError(
                f"last_layer_fusion of reduction cropr restores tokens before block {plan.depth - 1}, the last one: "
                "leave it out of reduction_layers"
            )
        self.fuses = last_layer_fusion and bool(self.stages)
        names = [str(stage) for stage in self.stages.values()]
        self.queries = nn.ParameterDict(
            {name: nn.Parameter(nn.init.trunc_normal_(torch.empty(plan.width), std=0.02)) for name in names}
        )
        self.aggregators = nn.ModuleDict({name: Aggregator(plan.width) for name in names})
        self.heads = nn.ModuleDict()

    def reset_classes(self, num_classes: int, like: Tensor) -> None:
        """See `Plugin.reset_classes`."""
        self.heads = nn.ModuleDict(
            {name: nn.Linear(self.plan.width, num_classes) for name in self.queries} if num_classes else {}
        )
        init_linear(self.heads)
        self.heads.to(like).train(self.training)
        self.has_losses = self.needs_targets = len(self.heads) > 0

    def classifiers(self) -> nn.Module | None:
        """See `Plugin.classifiers`."""
        return self.heads

    def no_weight_decay(self) -> set[str]:
        """The queries are embeddings."""
        return {f"queries.{name}" for name in self.queries}

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        if self.fuses and block == self.plan.depth - 1:
            self._fuse(tokens)
        stage = self.stages.get(block)
        if stage is None:
            return
        body = tokens.x[:, tokens.prefix :].detach()
        count = body.shape[1]
        keep = max(1, count - self.plan.dropped[stage])
        scores = body @ self.queries[str(stage)]  # (B, n)
        if self.training and self.has_losses and tokens.targets is not None:
            self._learn(str(stage), body, scores, tokens, tokens.targets)
        if keep >= count:
            return
        order = scores.argsort(dim=1, descending=True, stable=True)
        rows = order[:, :keep]
        tokens.record(block, "kept_idx", rows)
        if self.fuses:
            self._remember(rows, order[:, keep:], tokens)
        keep_rows(tokens, rows)

    def _learn(self, name: str, body: Tensor, scores: Tensor, tokens: Tokens, targets: Tensor) -> None:
        weights = (scores / self.plan.width**0.5).softmax(dim=1)
        vector = self.aggregators[name]((weights[:, None].to(body.dtype) @ body)[:, 0])  # (B, D)
        term = self.loss_weight * functional.cross_entropy(self.heads[name](vector).float(), targets)
        tokens.losses["cropr_auxiliary"] = tokens.losses.get("cropr_auxiliary", 0.0) + term

    # -- last layer fusion -------------------------------------------------------------------------------------------

    def _remember(self, kept: Tensor, dropped: Tensor, tokens: Tokens) -> None:
        """Keep the tokens that are dropped, and the places of all: patches from 0, then other tokens as they came."""
        body = tokens.x[:, tokens.prefix :]
        state: dict[str, Any] = tokens.scratch.get(_DROPPED) or {
            "grid": tokens.grid,
            "patches": tokens.patches.shape[1],
            "vectors": body[:, :0],
            "places": torch.zeros_like(dropped[:, :0]),
            "current": torch.zeros_like(dropped[:, :0]),
        }
        before = state["current"].shape[1]
        added = torch.arange(body.shape[1] - before, device=body.device) + before + state["places"].shape[1]
        current = torch.cat([state["current"], added.expand(len(body), -1)], dim=1)
        tokens.scratch[_DROPPED] = state | {
            "vectors": torch.cat([state["vectors"], take(body, dropped)], dim=1),
            "places": torch.cat([state["places"], take(current, dropped)], dim=1),
            "current": take(current, kept),
        }

    def _fuse(self, tokens: Tokens) -> None:
        state = tokens.scratch.pop(_DROPPED, None)
        if state is None:
            return
        body = tokens.x[:, tokens.prefix :]
        before, dropped = state["current"].shape[1], state["places"].shape[1]
        added = torch.arange(body.shape[1] - before, device=body.device) + before + dropped
        places = torch.cat([state["current"], added.expand(len(body), -1), state["places"]], dim=1)
        every = take(torch.cat([body, state["vectors"]], dim=1), places.argsort(dim=1))
        tokens.x = torch.cat([tokens.x[:, : tokens.prefix], every], dim=1)
        tokens.grid, tokens.extra = state["grid"], every.shape[1] - state["patches"]
        if tokens.maps is not None:
            tokens.maps.restore()


class Aggregator(nn.Module):
    """`v + MLP(LayerNorm(v))`, with the MLP of a vision transformer (4 D, GELU).

    Shape:
        (B, D) to (B, D).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        init_linear(self.mlp)

    def forward(self, vector: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = vector + self.mlp(self.norm(vector))
        return result
