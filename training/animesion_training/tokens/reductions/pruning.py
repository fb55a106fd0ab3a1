"""Token reductions that drop tokens: TopK, EViT, ATS and DynamicViT.

The attention of the class token (TopK, EViT, ATS) or a small network (DynamicViT) decides which tokens are kept. Plans
and keep rates are in `base`, methods that merge tokens in `merging`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.tokens.attention import Attended
from animesion_training.tokens.reductions.base import Reduction, ReductionPlan, init_linear, keep_rows, take
from animesion_training.tokens.state import Tokens

_SHARE_EPS = 1e-6


class TopK(Reduction):
    """Keep the tokens that the class token attends to most, mean over heads, in that order.

    Each stage keeps `ceil(rate * n)` of the n tokens after the prefix, between attention and MLP of its block. It does
    nothing if that is all of them (the original stops with an unbound variable).

    Trace: `kept_idx` (B, K), counted from the end of the prefix, by descending attention; with `reference_compat`
    followed by -1.
    """

    def __init__(self, plan: ReductionPlan) -> None:
        super().__init__(plan)
        self.opens = frozenset(self.stages)

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.between`."""
        stage = self.stages.get(block)
        count = tokens.x.shape[1] - tokens.prefix
        if stage is None or (keep := self.plan.kept(stage, count)) >= count:
            return
        attention = attended.class_row[:, :, tokens.prefix :].mean(dim=1)  # (B, count)
        self._reduce(block, tokens, attention, attention.topk(keep, dim=1).indices)

    def _reduce(self, block: int, tokens: Tokens, attention: Tensor, rows: Tensor) -> None:
        tokens.record(block, "kept_idx", functional.pad(rows, (0, 1), value=-1) if self.plan.reference_compat else rows)
        keep_rows(tokens, rows)


class EViT(TopK):
    """TopK, and one token after the kept ones that is the sum of the dropped ones, weighted by their attention.

    Liang et al., ICLR 2022, section 3; the weights are not normalised.

    Trace: `kept_idx` (B, K + 1), as for TopK, with -1 for the fused token at the end; `fused_idx` (B, n - K),
    ascending.
    """

    def _reduce(self, block: int, tokens: Tokens, attention: Tensor, rows: Tensor) -> None:
        weights = attention.scatter(1, rows, 0.0)  # (B, n), 0 for the kept tokens
        fused = weights[:, None].to(tokens.x.dtype) @ tokens.x[:, tokens.prefix :]  # (B, 1, D)
        if tokens.trace is not None:
            tokens.record(block, "kept_idx", functional.pad(rows, (0, 1), value=-1))
            tokens.record(block, "fused_idx", complement(rows, attention.shape[1]))
        keep_rows(tokens, rows)
        tokens.append(fused)
        tokens.extra = 0  # later stages treat it like any other token


def complement(rows: Tensor, count: int) -> Tensor:
    """The indices below `count` that are not in rows (B, K), ascending: (B, count - K)."""
    kept = torch.zeros(rows.shape[0], count, dtype=torch.int8, device=rows.device).scatter(1, rows, 1)  # (B, count)
    return kept.argsort(dim=1, stable=True)[:, : count - rows.shape[1]]


class ATS(Reduction):
    """Adaptive token sampling: the number of tokens depends on the image (Fayyaz et al., ECCV 2022).

    In the attention of its block, tokens are scored by the attention of the class token times the norm of their value,
    summed over heads. The cumulative distribution of scores is inverted at evenly spaced points, which may hit a token
    more than once; the distinct ones are kept, in their order. Only their queries attend, to the keys of all tokens.
    Images that keep fewer tokens than others in the batch are padded; attention masks the padding.

    There are K points at `(i + 1/2) / K`, with K the planned number of tokens, which is thus the maximum.

    `reference_compat`: the points are those of K + 1 without the last, so the tail of the distribution is not sampled;
    and padding, which precedes the tokens that a cache has restored, may be drawn in place of a token.

    Trace: `sample_ids` (B, T'), counted from the class token, padded with 0; `mask` (B, T') bool, False for padding.
    """

    def __init__(self, plan: ReductionPlan) -> None:
        super().__init__(plan)
        self.opens = frozenset(self.stages)

    def attention(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.attention`."""
        stage = self.stages.get(block)
        if stage is None:
            return
        prefix = tokens.prefix
        batch, count, _ = tokens.x.shape
        steps = sampling_steps(self.plan.counts[stage], self.plan.reference_compat, tokens.x.device)
        norms = attended.v[:, :, prefix:].float().norm(dim=-1)  # (B, heads, N)
        scores = (attended.class_row[:, :, prefix:].float() * norms).sum(dim=1)  # (B, N)
        real = None if tokens.real is None else tokens.real[:, prefix:]
        drawn = inverse_samples(scores, steps, real, self.plan.reference_compat)
        rows, real = _distinct(drawn, count - prefix)
        rows = torch.cat([torch.arange(prefix, device=rows.device).expand(batch, -1), rows + prefix], dim=1)
        if real is not None:
            real = functional.pad(real, (prefix, 0), value=True)
            rows = rows.where(real, 0)  # any valid index will do for padding
        tokens.record(block, "sample_ids", rows)
        tokens.record(block, "mask", torch.ones_like(rows, dtype=torch.bool) if real is None else real)
        self._keep(rows, real, tokens, attended)

    @staticmethod
    def _keep(rows: Tensor, real: Tensor | None, tokens: Tokens, attended: Attended) -> None:
        """Keep rows (B, T'), prefix included, of all that is indexed by queries; keys and values stay complete."""
        index = rows[:, None, :, None]
        attended.q = attended.q.gather(2, index.expand(-1, attended.q.shape[1], -1, attended.q.shape[3]))
        if attended.bias is not None and attended.bias.shape[2] > 1:  # a bias per query
            bias = attended.bias.expand(len(rows), -1, -1, -1)
            attended.bias = bias.gather(2, index.expand(-1, bias.shape[1], -1, bias.shape[3]))
        attended.normed = take(attended.normed, rows)
        if tokens.maps is not None:
            places = torch.full(tokens.x.shape[:2], -1, device=rows.device)
            # padding points at the class token, whose place is left out below
            places = places.scatter(1, rows, torch.arange(rows.shape[1], device=rows.device).expand_as(rows))
            tokens.maps.move((places[:, tokens.prefix :] - tokens.prefix).clamp(min=-1))
        tokens.x = take(tokens.x, rows)
        tokens.size = None if tokens.size is None else take(tokens.size, rows)
        tokens.policy = None if tokens.policy is None else take(tokens.policy, rows)
        tokens.real, tokens.grid, tokens.extra = real, None, 0


def sampling_steps(count: int, reference_compat: bool = False, device: torch.device | None = None) -> Tensor:
    """Points in (0, 1) at which ATS inverts the distribution, ascending: `(i + 1/2) / count`.

    Args:
        count: number of points.
        reference_compat: the first `count` of `count + 1` evenly spaced points, in single precision as in the
            original; through rounding the last one is sometimes included.
        device: device of the result.
    """
    if not reference_compat:
        return (torch.arange(count, device=device) + 0.5) / count
    total = count + 1
    return torch.arange(1 / (2 * total), (2 * total - 1) / (2 * total), 1 / total).to(device)


def inverse_samples(
    scores: Tensor, steps: Tensor, real: Tensor | None = None, reference_compat: bool = False
) -> Tensor:
    """For each step, the token at which the cumulative distribution of scores is nearest to it.

    Args:
        scores: (B, N), >= 0; normalised here.
        steps: (K,) in (0, 1).
        real: (B, N) bool, False for padding, which is never drawn and whose scores are 0; None for no padding.
        reference_compat: move padding by 0.1 in place of a distance that rules it out.

    Returns:
        (B, K) int64, ascending, with repetitions.
    """
    distribution = (scores / (scores.sum(dim=1, keepdim=True) + _SHARE_EPS)).cumsum(dim=1)
    if real is not None:
        distribution = distribution + (0.1 if reference_compat else 9.0) * ~real
    # (B, K, N): distances of steps to values of the distribution; argmin returns the first of equal ones
    return (steps[None, :, None] - distribution[:, None]).abs().argmin(dim=-1)


def _distinct(drawn: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The distinct indices of each row of `drawn` (B, K), ascending, padded to the largest number of a row.

    Returns:
        Indices (B, K'), and (B, K') bool, False for padding; the latter is None without padding.
    """
    hit = torch.zeros(len(drawn), count, dtype=torch.int8, device=drawn.device).scatter(1, drawn, 1)
    numbers = hit.sum(dim=1)  # of distinct indices, (B,)
    least, most = torch.stack([numbers.min(), numbers.max()]).tolist()  # one synchronisation with the device
    rows = hit.argsort(dim=1, descending=True, stable=True)[:, :most]
    if least == most:
        return rows, None
    return rows, torch.arange(most, device=drawn.device) < numbers[:, None]


class DynamicViT(Reduction):
    """Learned decisions about which tokens to keep (Rao et al., NeurIPS 2021).

    A small network before the block of each stage predicts log-probabilities to keep and to drop, from each token and
    the mean of the kept ones. In training no token is removed: hard Gumbel-softmax decisions, multiplied over stages,
    mask dropped tokens in attention (section 3.3), and a term of the loss pulls the share of kept tokens to the planned
    one. In evaluation the planned number of tokens with the highest log-probability is kept, in that order; tokens
    that a cache has restored are not counted by the plan. Distillation, which the paper trains with, is left to the
    trainer.

    `reference_compat`: with a cache, a stage keeps `floor((n - 1) * rate)` of n tokens in evaluation, and tokens that
    the cache has restored count as dropped in the mean; 1e-6 is added to the mean in place of guarding its
    denominator.

    Trace: `keep_policy` (B, K) in evaluation, counted from the end of the prefix; `decision` (B, n) in training.

    Args:
        plan: blocks and keep rates.
        loss_weight: weight of the term `dynamicvit_ratio`, the mean over stages and images of
            (share kept - planned share)^2.

    Raises:
        UsageError: a negative weight.
    """

    def __init__(self, plan: ReductionPlan, loss_weight: float = 2.0) -> None:
        super().__init__(plan)
        if isinstance(loss_weight, bool) or not isinstance(loss_weight, int | float) or not loss_weight >= 0:
            raise UsageError(f"loss_weight of reduction dynamicvit must be a number from 0, not {loss_weight!r}")
        self.loss_weight = loss_weight
        self.has_losses = bool(self.stages and loss_weight)
        self.opens = frozenset(range(min(self.stages), plan.depth)) if self.stages else frozenset()
        self.predictors = nn.ModuleDict(
            {str(stage): KeepPredictor(plan.width, plan.reference_compat) for stage in self.stages.values()}
        )

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        stage = self.stages.get(block)
        if stage is None:
            return
        if self.training:
            self._decide(block, stage, tokens)
        else:
            self._drop(block, stage, tokens)

    def attention(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.attention`."""
        if tokens.policy is not None:
            attended.mixing = partial(softmax_with_policy, policy=tokens.policy)

    def _decide(self, block: int, stage: int, tokens: Tokens) -> None:
        if tokens.policy is None:
            tokens.policy = tokens.x.new_ones(tokens.x.shape[:2])
        so_far = tokens.policy[:, tokens.prefix :]  # (B, n)
        log_probabilities = self.predictors[str(stage)](tokens.x[:, tokens.prefix :], so_far)  # (B, n, 2)
        keep = functional.gumbel_softmax(log_probabilities.float(), hard=True, dim=-1)[..., 0]
        decision = keep.to(so_far.dtype) * so_far  # dropped tokens stay dropped
        tokens.policy = torch.cat([tokens.policy[:, : tokens.prefix], decision], dim=1)
        tokens.record(block, "decision", decision)
        if self.has_losses:
            error = (decision.float().mean(dim=1) - self.plan.shares[stage]).square().mean()
            term = self.loss_weight / len(self.stages) * error
            tokens.losses["dynamicvit_ratio"] = tokens.losses.get("dynamicvit_ratio", 0.0) + term

    def _drop(self, block: int, stage: int, tokens: Tokens) -> None:
        body = tokens.x[:, tokens.prefix :]
        count = body.shape[1]
        keep = self._kept(stage, count, cached=tokens.extra > 0)
        if keep >= count:
            return
        so_far = self._so_far(tokens, body)
        rows = self.predictors[str(stage)](body, so_far)[..., 0].topk(keep, dim=1).indices
        tokens.record(block, "keep_policy", rows)
        if so_far is not None:
            tokens.scratch["dynamicvit"] = take(so_far, rows)
        keep_rows(tokens, rows)

    def _kept(self, stage: int, count: int, cached: bool) -> int:
        if not self.plan.reference_compat:
            return max(1, count - self.plan.dropped[stage])
        return int((count - 1) * self.plan.keep_rates[stage]) if cached else self.plan.counts[stage]

    def _so_far(self, tokens: Tokens, body: Tensor) -> Tensor | None:
        """The tokens that the original counts as kept in evaluation, (B, n): all but those that the cache restored."""
        if not self.plan.reference_compat:
            return None
        known = tokens.scratch.get("dynamicvit")
        if known is None:
            return body.new_ones(body.shape[:2])
        return functional.pad(known, (0, body.shape[1] - known.shape[1]))


class KeepPredictor(nn.Module):
    """Log-probabilities to keep and to drop each token (DynamicViT, section 3.2).

    Args:
        width: D.
        reference_compat: add 1e-6 to the mean of kept tokens in place of guarding its denominator.

    Shape:
        Tokens (B, N, D) and decisions so far, (B, N) of 0 and 1 or None for all kept, to (B, N, 2): keep, drop.
    """

    def __init__(self, width: int, reference_compat: bool = False) -> None:
        super().__init__()
        self.reference_compat = reference_compat
        self.norm = nn.LayerNorm(width)
        self.fc_in = nn.Linear(width, width)
        self.fc_out = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )
        init_linear(self)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """See the class."""
        own, shared = functional.gelu(self.fc_in(self.norm(x))).chunk(2, dim=-1)  # local and global half, (B, N, D/2)
        if kept is None:
            mean = shared.mean(dim=1, keepdim=True)
        else:
            weights = kept[:, :, None].to(shared.dtype)
            total, number = (shared * weights).sum(dim=1, keepdim=True), weights.sum(dim=1, keepdim=True)
            mean = total / number + _SHARE_EPS if self.reference_compat else total / number.clamp(min=1)
        both = torch.cat([own, mean.expand(-1, x.shape[1], -1)], dim=-1)  # (B, N, D)
        return functional.log_softmax(self.fc_out(both), dim=-1)


def softmax_with_policy(scores: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over the kept keys and the query's own (DynamicViT, section 3.3).

    Args:
        scores: (B, heads, T, T).
        policy: (B, T), 1 for kept and 0 for dropped.
        eps: avoids vanishing gradients: `(e + eps / T) / (sum e + eps)`.

    Returns:
        Weights of the shape and type of scores, computed in float32.
    """
    count = scores.shape[-1]
    diagonal = torch.eye(count, dtype=torch.float32, device=scores.device)
    visible = diagonal + (1 - diagonal) * policy.float()[:, None, None, :]  # (B, 1, T, T)
    exponential = (scores - scores.amax(dim=-1, keepdim=True)).float().exp() * visible
    weights = (exponential + eps / count) / (exponential.sum(dim=-1, keepdim=True) + eps)
    return weights.to(scores.dtype)
