"""Token reductions that put tokens together: ToMe, DPC-KNN, SiT, PatchMerger and Sinkhorn.

ToMe merges pairs inside its block, by keys. The others replace tokens before their block: by clusters (DPC-KNN) or by
a learned soft assignment to a fixed number of tokens. Plans and keep rates are in `reductions`, methods that drop
tokens in `pruning`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.tokens.attention import Attended
from animesion_training.tokens.reductions.base import Reduction, ReductionPlan, init_linear, take
from animesion_training.tokens.state import Tokens


class ToMe(Reduction):
    """Token merging: pairs of tokens with similar keys become their size-weighted mean (Bolya et al., ICLR 2023).

    Between attention and MLP, every second token proposes its most similar partner among the others; the best pairs
    merge. Sizes are tracked, and attention weighs keys by them from then on.

    One step can at most halve the tokens. Where the plan asks for more, the blocks that follow go on merging, until the
    number of tokens is the plan's or the next stage begins, which takes over what is left. The original cuts the number
    of pairs at half the tokens and leaves it there, so lower keep rates can keep more tokens than higher ones:
    `reference_compat` does so too. Tokens that a cache has given back come on top of the plan. They are merged like any
    other in a stage's own block, and left alone in those that follow.

    Trace: `cluster_assign` (B, T - 1), the new place, less one, of each token behind the class token (registers left
    out); `attn_size` (B, T', 1).
    """

    def __init__(self, plan: ReductionPlan) -> None:
        super().__init__(plan)
        self.merges = _planned_merges(plan)
        self.opens = frozenset(self.merges)

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.between`."""
        if block not in self.merges:
            return
        aside = 0 if block in self.stages else tokens.extra
        count, prefix = tokens.x.shape[1], tokens.prefix
        size = torch.ones(tokens.x.shape[:2], device=tokens.x.device) if tokens.size is None else tokens.size

        def body(values: Tensor) -> Tensor:
            """The class token and what may merge: registers in front and tokens behind are left alone."""
            if prefix == 1 and not aside:
                return values
            return torch.cat([values[:, :1], values[:, prefix : count - aside]], dim=1)

        matching = match_pairs(body(attended.k.mean(dim=1)), self.merges[block])
        tokens.note(block, "cluster_assign", (matching.assignment()[:, 1:] - 1).float())
        merged, merged_size = merge_pairs(body(tokens.x), body(size), matching)
        tokens.x = _around(tokens.x, merged, prefix, aside)
        tokens.size = _around(size, merged_size, prefix, aside)
        tokens.note(block, "attn_size", tokens.size[:, :, None])
        tokens.grid, tokens.extra = None, aside


def _around(old: Tensor, new: Tensor, prefix: int, aside: int) -> Tensor:
    """The new body among the tokens that were left alone."""
    if prefix == 1 and not aside:
        return new
    return torch.cat([new[:, :1], old[:, 1:prefix], new[:, 1:], old[:, old.shape[1] - aside :]], dim=1)


def _planned_merges(plan: ReductionPlan) -> dict[int, int]:
    """Block -> number of pairs that merge in it."""
    if plan.reference_compat:
        return {layer: plan.dropped[j] for layer, j in plan.stages.items() if plan.dropped[j]}
    merges = {}
    count = plan.tokens
    for j, (layer, end) in enumerate(zip(plan.layers, (*plan.layers[1:], plan.depth), strict=True)):
        for block in range(layer, end):
            pairs = min(count - plan.counts[j], count // 2)
            if pairs > 0:
                merges[block] = pairs
                count -= pairs
    return merges


class Matching(NamedTuple):
    """Which tokens merge, of T in two halves: sources at even places (the class token first), targets at odd ones.

    Attributes:
        kept: sources that stay, ascending, (B, Ts - r).
        merged: sources that merge, best pair first, (B, r).
        targets: the target of each of them, (B, r).
        total: T.
    """

    kept: Tensor
    merged: Tensor
    targets: Tensor
    total: int

    def assignment(self) -> Tensor:
        """The new place of each of the T tokens: (B, T)."""
        places = torch.arange(self.total // 2, device=self.kept.device) + self.kept.shape[1]
        targets = places.expand(len(self.kept), -1)
        sources = targets.new_zeros(len(targets), self.total - self.total // 2)
        sources = sources.scatter(
            1, self.kept, torch.arange(self.kept.shape[1], device=targets.device).expand_as(self.kept)
        )
        sources = sources.scatter(1, self.merged, self.targets + self.kept.shape[1])
        together = targets.new_zeros(len(targets), self.total)
        together[:, ::2], together[:, 1::2] = sources, targets
        return together


def match_pairs(keys: Tensor, pairs: int) -> Matching:
    """Bipartite soft matching (ToMe, section 3): each source proposes its most similar target, the best pairs count.

    Args:
        keys: (B, T, d), the class token first: it is never merged. Similarity is the cosine.
        pairs: r, cut at half of the other tokens.

    Returns:
        The matching; the number of tokens after it is T - r.
    """
    with torch.no_grad():
        normed = functional.normalize(keys.float(), dim=-1)
        scores = normed[:, ::2] @ normed[:, 1::2].transpose(1, 2)
        scores[:, 0] = -math.inf
        best, target = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        pairs = min(pairs, (keys.shape[1] - 1) // 2)
        merged = order[:, :pairs]
        return Matching(order[:, pairs:].sort(dim=-1).values, merged, target.gather(1, merged), keys.shape[1])


def merge_pairs(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Size-weighted means.

    Args:
        x: (B, T, D).
        size: (B, T) float32, how many patches each token stands for.
        matching: which merge.

    Returns:
        Tokens (B, T - r, D), kept sources first, then targets; and their sizes (B, T - r).
    """
    weighed = torch.cat([x * size[:, :, None], size[:, :, None]], dim=-1)  # float32 at least: sizes must stay whole
    sources, targets = weighed[:, ::2], weighed[:, 1::2]
    places = matching.targets[:, :, None].expand(-1, -1, weighed.shape[-1])
    targets = targets.scatter_add(1, places, take(sources, matching.merged))
    together = torch.cat([take(sources, matching.kept), targets], dim=1)
    sizes = together[..., -1]
    return (together[..., :-1] / sizes[:, :, None]).to(x.dtype), sizes


class DPCKNN(Reduction):
    """Clusters around density peaks, each merged into a weighted mean (TCFormer: Zeng et al., CVPR 2022, section 3).

    Before its block. Patches alone are clustered: prefix tokens and those of a cache stay as they are. The weight of a
    token in its cluster's mean is `exp` of a learned score.

    The density's neighbours are cut at the number of tokens, so any number can be clustered. The original needs five
    tokens before each stage and raises its plan to five in all but the last: `reference_compat` does so too. The
    original also adds noise of 1e-6 to the density to break ties; here results do not change from run to run.

    Trace: `cluster{j}.idx_centers` (B, K), best first; `cluster{j}.idx_cluster` (B, n); `cluster{j}.x` (B, K, D).

    Args:
        plan: where and how much.
        neighbours: k of the density, the token itself included.
        equal_weight: plain means in place of learned weights.

    Raises:
        UsageError: no neighbours, or a switch that is none.
    """

    _LEAST = 5

    def __init__(self, plan: ReductionPlan, neighbours: int = 5, equal_weight: bool = False) -> None:
        super().__init__(plan)
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
            raise UsageError(f"neighbours of reduction dpcknn is a number from 1, not {neighbours!r}")
        if not isinstance(equal_weight, bool):
            raise UsageError(f"equal_weight of reduction dpcknn is true or false, not {equal_weight!r}")
        self.neighbours = neighbours
        self.scores = nn.ModuleDict(
            {} if equal_weight else {str(stage): nn.Linear(plan.width, 1) for stage in self.stages.values()}
        )
        init_linear(self.scores)

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        stage = self.stages.get(block)
        patches = tokens.patches
        if stage is None or (clusters := self._planned(stage)) >= patches.shape[1]:
            return
        centers, assignment = density_peaks(patches, clusters, self.neighbours)
        if str(stage) in self.scores:
            weights = self.scores[str(stage)](patches).exp()
        else:
            weights = torch.ones_like(patches[:, :, :1])
        merged = merge_clusters(patches, assignment, weights, clusters)
        _note_cluster(tokens, stage, idx_centers=centers, idx_cluster=assignment, x=merged)
        behind = tokens.x[:, tokens.x.shape[1] - tokens.extra :]
        tokens.x = torch.cat([tokens.x[:, : tokens.prefix], merged, behind], dim=1)
        tokens.grid = None

    def _planned(self, stage: int) -> int:
        clusters = self.plan.counts[stage]
        if not self.plan.reference_compat:
            return clusters
        return max(clusters, self._LEAST if stage < len(self.plan.layers) - 1 else 1)


def density_peaks(x: Tensor, clusters: int, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """Density-peak clustering with k nearest neighbours (Du et al., 2016, as TCFormer has it).

    Density is `exp(-mean of the k smallest squared distances)`, distances over sqrt(D). A center has a high density and
    is far from any token of higher density.

    Args:
        x: (B, N, D).
        clusters: K, at most N.
        neighbours: k, cut at N; the token itself is one of them.

    Returns:
        Centers (B, K), best first, and the cluster of each token, (B, N), each center in its own.
    """
    with torch.no_grad():
        points = x.float()
        distance = torch.cdist(points, points) / points.shape[-1] ** 0.5
        nearest = distance.topk(min(neighbours, x.shape[1]), dim=-1, largest=False).values
        density = (-nearest.square().mean(dim=-1)).exp()
        denser = density[:, None, :] > density[:, :, None]
        farthest = distance.flatten(1).amax(dim=1)[:, None, None]
        separation = distance.where(denser, farthest).amin(dim=-1)
        centers = (separation * density).topk(clusters, dim=-1).indices
        to_centers = distance.gather(1, centers[:, :, None].expand(-1, -1, x.shape[1]))
        assignment = to_centers.argmin(dim=1)
        own = torch.arange(clusters, device=x.device).expand(len(x), -1)
        return centers, assignment.scatter(1, centers, own)


def merge_clusters(x: Tensor, assignment: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Weighted means of clusters, `sum w x / (sum w + 1e-6)`.

    Args:
        x: (B, N, D).
        assignment: cluster of each token, (B, N).
        weights: (B, N, 1), > 0.
        clusters: K.

    Returns:
        (B, K, D).
    """
    total = weights.new_zeros(len(x), clusters, 1).scatter_add(1, assignment[:, :, None], weights) + 1e-6
    shares = weights / take(total, assignment)
    places = assignment[:, :, None].expand(-1, -1, x.shape[-1])
    weighed = x * shares
    return weighed.new_zeros(len(x), clusters, x.shape[-1]).scatter_add(1, places, weighed)


def _note_cluster(tokens: Tokens, stage: int, **what: Tensor) -> None:
    if tokens.trace is not None:
        tokens.trace |= {f"cluster{stage}.{name}": value.detach() for name, value in what.items()}


class _SoftReduction(Reduction):
    """Before its block, all tokens behind the prefix become a fixed number of mixtures of them.

    The number of mixtures is the plan's and at least one: it is part of the weights' shapes, so a model is bound to the
    number of patches it was built for. The original can plan none: `reference_compat` does so too.

    Trace: `cluster{j}.soft_assign` (B, K, n), `cluster{j}.x` (B, K, D).
    """

    def __init__(self, plan: ReductionPlan, assignment: Callable[[int], nn.Module]) -> None:
        super().__init__(plan)
        # each from tokens (B, n, D) to what is mixed, (B, n, D), and weights, (B, K, n)
        self.assignments = nn.ModuleDict({str(stage): assignment(plan.counts[stage]) for stage in self.stages.values()})

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        stage = self.stages.get(block)
        if stage is None:
            return
        mixed, weights = self.assignments[str(stage)](tokens.x[:, tokens.prefix :])
        made = weights @ mixed
        _note_cluster(tokens, stage, soft_assign=weights, x=made)
        tokens.x = torch.cat([tokens.x[:, : tokens.prefix], made], dim=1)
        tokens.grid, tokens.extra = None, 0


class SoftAssignment(_SoftReduction):
    """Token slimming: weights are a softmax over tokens of what a small network says of each (SiT, ECCV 2022)."""

    def __init__(self, plan: ReductionPlan) -> None:
        super().__init__(plan, partial(SlimmingAssignment, plan.width))


class SlimmingAssignment(nn.Module):
    """`softmax over tokens of scale * (LayerNorm, Linear(D, D/2), GELU, Linear(D/2, K))`.

    Shape:
        (B, n, D) to the same tokens and weights (B, K, n), each row of which sums to one.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc_in = nn.Linear(width, width // 2)
        self.fc_out = nn.Linear(width // 2, count)
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        init_linear(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        said = self.fc_out(functional.gelu(self.fc_in(self.norm(x))))
        return x, (self.scale * said).transpose(1, 2).softmax(dim=-1)


class PatchMerger(_SoftReduction):
    """Learned queries attend to all tokens, without a scale (Renggli et al., arXiv 2202.12015)."""

    def __init__(self, plan: ReductionPlan) -> None:
        super().__init__(plan, partial(QueryAssignment, plan.width))

    def no_weight_decay(self) -> set[str]:
        """The queries are embeddings."""
        return {f"assignments.{stage}.queries" for stage in self.assignments}


class QueryAssignment(nn.Module):
    """`softmax over tokens of queries LayerNorm(x)^T`.

    Shape:
        (B, n, D) to normalised tokens and weights (B, K, n), each row of which sums to one.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        normed = self.norm(x)
        return normed, (self.queries @ normed.transpose(1, 2)).softmax(dim=-1)


class Sinkhorn(_SoftReduction):
    """Assignment to learned centers by entropic optimal transport (Haurum et al., "Which tokens to use?", ICCVW 2023).

    Tokens and centers are of length one, and so are the tokens that are mixed.

    Args:
        plan: where and how much.
        eps: temperature of the similarities, > 0.
        iterations: of Sinkhorn's algorithm, from 1.

    Raises:
        UsageError: values outside of these ranges.
    """

    def __init__(self, plan: ReductionPlan, eps: float = 1.0, iterations: int = 3) -> None:
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps > 0:
            raise UsageError(f"eps of reduction sinkhorn is a number above 0, not {eps!r}")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise UsageError(f"iterations of reduction sinkhorn is a number from 1, not {iterations!r}")
        super().__init__(plan, partial(TransportAssignment, plan.width, eps=eps, iterations=iterations))

    def no_weight_decay(self) -> set[str]:
        """The centers are embeddings."""
        return {f"assignments.{stage}.centers" for stage in self.assignments}


class TransportAssignment(nn.Module):
    """Optimal transport from tokens to centers by their cosines.

    Shape:
        (B, n, D) to normalised tokens and weights (B, K, n), each column of which sums to one.
    """

    def __init__(self, width: int, count: int, eps: float = 1.0, iterations: int = 3) -> None:
        super().__init__()
        self.eps, self.iterations = eps, iterations
        self.centers = nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        normed = functional.normalize(x, dim=-1)
        scores = functional.normalize(self.centers, dim=-1) @ normed.transpose(1, 2) / self.eps
        return normed, transport(scores.float(), self.iterations).to(x.dtype)


def transport(scores: Tensor, iterations: int = 3) -> Tensor:
    """Sinkhorn's algorithm in the log domain, with mass `1 / (M + N)` for each row and each column, times M + N.

    Args:
        scores: (B, M, N), over the temperature already.
        iterations: rounds of rows, then columns.

    Returns:
        Weights (B, M, N); columns sum to one, rows come near to it only where M = N.
    """
    rows, columns = (
        scores.new_zeros(scores.shape[0], scores.shape[1], 1),
        scores.new_zeros(scores.shape[0], 1, scores.shape[2]),
    )
    # the mass log(1 / (M + N)) of every row and column and the factor M + N at the end cancel out
    for _ in range(iterations):
        rows = -(scores + columns).logsumexp(dim=2, keepdim=True)
        columns = -(scores + rows).logsumexp(dim=1, keepdim=True)
    return (scores + rows + columns).exp()
