"""Token reductions that merge tokens: ToMe, DPC-KNN, SiT, PatchMerger and Sinkhorn.

ToMe merges pairs inside its block, by keys. The others replace tokens before their block: by clusters (DPC-KNN) or by
a learned soft assignment to a fixed number of tokens. Plans and keep rates are in `base`, methods that drop tokens
in `pruning`.
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
from animesion_training.options import whole_number
from animesion_training.tokens.attention import Attended
from animesion_training.tokens.reductions.base import Reduction, ReductionPlan, init_linear, take
from animesion_training.tokens.state import Tokens


class ToMe(Reduction):
    """Token merging: pairs of tokens with similar keys become their size-weighted mean (Bolya et al., ICLR 2023).

    Between attention and MLP, each token at an even place proposes its most similar partner at an odd place; the most
    similar pairs merge. Sizes are tracked, and attention weighs keys by them in all following blocks.

    One step can at most halve the number of tokens. If the plan requires more, the following blocks merge on until the
    number of tokens is the planned one, or the next stage begins, which merges the rest too. The original limits the
    number of pairs to half the tokens and stops there, so a lower keep rate can keep more tokens than a higher one;
    `reference_compat` does the same. Tokens that a cache has restored are not counted by the plan. They can merge in
    the block of a stage, and are left unchanged in the blocks after it.

    Trace: `cluster_assign` (B, T - 1), the new index, minus one, of each token after the class token (without
    registers); `attn_size` (B, T', 1).
    """

    def __init__(self, plan: ReductionPlan) -> None:
        super().__init__(plan)
        self.merges = _planned_merges(plan)
        self.opens = frozenset(self.merges)

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """See `Plugin.between`."""
        if block not in self.merges:
            return
        # restored tokens may merge in a stage's own block, and are put aside in the blocks that continue it
        aside = 0 if block in self.stages else tokens.extra
        count, prefix = tokens.x.shape[1], tokens.prefix
        size = torch.ones(tokens.x.shape[:2], device=tokens.x.device) if tokens.size is None else tokens.size

        def body(values: Tensor) -> Tensor:
            """The class token and the tokens that may merge, without registers and the last `aside` tokens."""
            if prefix == 1 and not aside:
                return values
            return torch.cat([values[:, :1], values[:, prefix : count - aside]], dim=1)

        matching = match_pairs(body(attended.k.mean(dim=1)), self.merges[block])
        tokens.record(block, "cluster_assign", (matching.assignment()[:, 1:] - 1).float())
        if tokens.maps is not None:
            places = matching.assignment()[:, 1:] - 1
            ends = places.shape[1] - matching.merged.shape[1] + torch.arange(aside, device=places.device)
            tokens.maps.move(torch.cat([places, ends.expand(len(places), -1)], dim=1))
        merged, merged_size = merge_pairs(body(tokens.x), body(size), matching)
        tokens.x = _restore_aside(tokens.x, merged, prefix, aside)
        tokens.size = _restore_aside(size, merged_size, prefix, aside)
        tokens.record(block, "attn_size", tokens.size[:, :, None])
        tokens.grid, tokens.extra = None, aside


def _restore_aside(old: Tensor, new: Tensor, prefix: int, aside: int) -> Tensor:
    """The merged body (B, T', ...) with the registers and the last `aside` tokens of `old` around it."""
    if prefix == 1 and not aside:
        return new
    return torch.cat([new[:, :1], old[:, 1:prefix], new[:, 1:], old[:, old.shape[1] - aside :]], dim=1)


def _planned_merges(plan: ReductionPlan) -> dict[int, int]:
    """Block -> number of pairs to merge in it."""
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
    """The pairs to merge, of T tokens: sources are at even places (class token first), targets at odd ones.

    Attributes:
        kept: (B, Ts - r), the sources that are not merged, ascending; Ts is the number of sources.
        merged: (B, r), the sources that are merged, best pair first.
        targets: (B, r), the target of each of them.
        total: T.
    """

    kept: Tensor
    merged: Tensor
    targets: Tensor
    total: int

    def assignment(self) -> Tensor:
        """The new index of each of the T tokens, (B, T)."""
        # the new order is kept sources, then targets
        places = torch.arange(self.total // 2, device=self.kept.device) + self.kept.shape[1]
        targets = places.expand(len(self.kept), -1)  # (B, T // 2)
        sources = targets.new_zeros(len(targets), self.total - self.total // 2)
        sources = sources.scatter(
            1, self.kept, torch.arange(self.kept.shape[1], device=targets.device).expand_as(self.kept)
        )
        sources = sources.scatter(1, self.merged, self.targets + self.kept.shape[1])
        assignment = targets.new_zeros(len(targets), self.total)
        assignment[:, ::2], assignment[:, 1::2] = sources, targets
        return assignment


def match_pairs(keys: Tensor, pairs: int) -> Matching:
    """Bipartite soft matching (ToMe, section 3): each source proposes its most similar target, the best r pairs merge.

    Args:
        keys: (B, T, d), class token first, which is never merged. Similarity is the cosine.
        pairs: r, at most half of the tokens without the class token.

    Returns:
        The matching; T - r tokens are left after it.
    """
    with torch.no_grad():
        normed = functional.normalize(keys.float(), dim=-1)
        scores = normed[:, ::2] @ normed[:, 1::2].transpose(1, 2)  # (B, sources, targets)
        scores[:, 0] = -math.inf  # the class token is last in the order, and thus never among the merged
        best, target = scores.max(dim=-1)  # (B, sources)
        order = best.argsort(dim=-1, descending=True)
        pairs = min(pairs, (keys.shape[1] - 1) // 2)
        merged = order[:, :pairs]
        return Matching(order[:, pairs:].sort(dim=-1).values, merged, target.gather(1, merged), keys.shape[1])


def merge_pairs(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge tokens to their size-weighted means.

    Args:
        x: (B, T, D).
        size: (B, T) float32, number of patches that each token represents.
        matching: the pairs to merge.

    Returns:
        Tokens (B, T - r, D), kept sources first, then targets; and their sizes (B, T - r).
    """
    # (B, T, D + 1): one scatter adds tokens and sizes; float32 at least, as half precision would round sizes
    weighted = torch.cat([x * size[:, :, None], size[:, :, None]], dim=-1)
    sources, targets = weighted[:, ::2], weighted[:, 1::2]
    places = matching.targets[:, :, None].expand(-1, -1, weighted.shape[-1])
    targets = targets.scatter_add(1, places, take(sources, matching.merged))
    merged = torch.cat([take(sources, matching.kept), targets], dim=1)
    sizes = merged[..., -1]
    return (merged[..., :-1] / sizes[:, :, None]).to(x.dtype), sizes


class DPCKNN(Reduction):
    """Clusters around density peaks, each merged into a weighted mean (TCFormer: Zeng et al., CVPR 2022, section 3).

    Patches are clustered before the block; prefix tokens and those of a cache do not change. The weight of a token in
    the mean of its cluster is `exp` of a learned score.

    The number of neighbours is at most the number of tokens, so any number of tokens can be clustered. The original
    needs five tokens before each stage, and plans at least five in all but the last; `reference_compat` does the same.
    The original also adds noise of 1e-6 to the density to break ties; here results are deterministic.

    Trace: `cluster{j}.idx_centers` (B, K), best first; `cluster{j}.idx_cluster` (B, n); `cluster{j}.x` (B, K, D).

    Args:
        plan: blocks and keep rates.
        neighbours: k of the density, including the token itself.
        equal_weight: use plain means in place of learned weights.

    Raises:
        UsageError: an invalid value.
    """

    _LEAST = 5

    def __init__(self, plan: ReductionPlan, neighbours: int = 5, equal_weight: bool = False) -> None:
        super().__init__(plan)
        whole_number("neighbours of reduction dpcknn", neighbours)
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
        if stage is None or (clusters := self._num_clusters(stage)) >= patches.shape[1]:
            return
        centers, assignment = density_peaks(patches, clusters, self.neighbours)
        if str(stage) in self.scores:
            weights = self.scores[str(stage)](patches).exp()
        else:
            weights = torch.ones_like(patches[:, :, :1])
        merged = merge_clusters(patches, assignment, weights, clusters)
        _record_cluster(tokens, stage, idx_centers=centers, idx_cluster=assignment, x=merged)
        extra = tokens.x[:, tokens.x.shape[1] - tokens.extra :]
        if tokens.maps is not None:
            ends = clusters + torch.arange(tokens.extra, device=assignment.device)
            tokens.maps.move(torch.cat([assignment, ends.expand(len(assignment), -1)], dim=1))
        tokens.x = torch.cat([tokens.x[:, : tokens.prefix], merged, extra], dim=1)
        tokens.grid = None

    def _num_clusters(self, stage: int) -> int:
        clusters = self.plan.counts[stage]
        if not self.plan.reference_compat:
            return clusters
        return max(clusters, self._LEAST if stage < len(self.plan.layers) - 1 else 1)


def density_peaks(x: Tensor, clusters: int, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """Density-peak clustering with k nearest neighbours (Du et al., 2016, in the form of TCFormer).

    The density is `exp(-mean of the k smallest squared distances)`, with distances divided by sqrt(D). A center has a
    high density and a large distance from all tokens of higher density.

    Args:
        x: (B, N, D).
        clusters: K, at most N.
        neighbours: k, including the token itself; at most N are used.

    Returns:
        Indices of the centers (B, K), best first, and the cluster of each token (B, N); each center is in its own.
    """
    with torch.no_grad():
        points = x.float()
        distance = torch.cdist(points, points) / points.shape[-1] ** 0.5  # (B, N, N)
        nearest = distance.topk(min(neighbours, x.shape[1]), dim=-1, largest=False).values
        density = (-nearest.square().mean(dim=-1)).exp()
        denser = density[:, None, :] > density[:, :, None]  # (B, i, j): j is denser than i
        farthest = distance.flatten(1).amax(dim=1)[:, None, None]
        # distance to the nearest denser token; for the densest one the largest distance of all
        separation = distance.where(denser, farthest).amin(dim=-1)  # (B, N)
        centers = (separation * density).topk(clusters, dim=-1).indices
        to_centers = distance.gather(1, centers[:, :, None].expand(-1, -1, x.shape[1]))
        assignment = to_centers.argmin(dim=1)
        # a center that coincides with another one would be in the wrong cluster
        own = torch.arange(clusters, device=x.device).expand(len(x), -1)
        return centers, assignment.scatter(1, centers, own)


def merge_clusters(x: Tensor, assignment: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Merge clusters to their weighted means, `sum w x / (sum w + 1e-6)`.

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
    weighted = x * shares
    return weighted.new_zeros(len(x), clusters, x.shape[-1]).scatter_add(1, places, weighted)


def _record_cluster(tokens: Tokens, stage: int, **values: Tensor) -> None:
    if tokens.trace is not None:
        tokens.trace |= {f"cluster{stage}.{name}": value.detach() for name, value in values.items()}


class SoftReduction(Reduction):
    """Before its block, all tokens after the prefix are replaced by a fixed number of weighted sums of them.

    The number of sums is the planned one, at least one. It is part of the shapes of weights, so a model is bound to the
    number of patches that it was built for. The original can plan 0; `reference_compat` does the same.

    Trace: `cluster{j}.soft_assign` (B, K, n), `cluster{j}.x` (B, K, D).
    """

    def __init__(self, plan: ReductionPlan, assignment: Callable[[int], nn.Module]) -> None:
        super().__init__(plan)
        # each module takes tokens (B, n, D), and returns values (B, n, D) and weights (B, K, n) of the sums
        self.assignments = nn.ModuleDict({str(stage): assignment(plan.counts[stage]) for stage in self.stages.values()})

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        stage = self.stages.get(block)
        if stage is None:
            return
        values, weights = self.assignments[str(stage)](tokens.x[:, tokens.prefix :])
        sums = weights @ values  # (B, K, D)
        _record_cluster(tokens, stage, soft_assign=weights, x=sums)
        if tokens.maps is not None:  # a patch is part of the sum in which it has the largest weight
            tokens.maps.move(weights.argmax(dim=1))
        tokens.x = torch.cat([tokens.x[:, : tokens.prefix], sums], dim=1)
        tokens.grid, tokens.extra = None, 0


class SoftAssignment(SoftReduction):
    """Token slimming: weights are a softmax over tokens of the scores of a small network (SiT, ECCV 2022)."""

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
        scores = self.fc_out(functional.gelu(self.fc_in(self.norm(x))))  # (B, n, K)
        return x, (self.scale * scores).transpose(1, 2).softmax(dim=-1)


class PatchMerger(SoftReduction):
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


class Sinkhorn(SoftReduction):
    """Assignment to learned centers by entropic optimal transport (Haurum et al., "Which tokens to use?", ICCVW 2023).

    Tokens and centers are normalised to length one, also in the weighted sums.

    Args:
        plan: blocks and keep rates.
        eps: temperature of the similarities, > 0.
        iterations: number of iterations of Sinkhorn's algorithm, from 1.

    Raises:
        UsageError: values outside of these ranges.
    """

    def __init__(self, plan: ReductionPlan, eps: float = 1.0, iterations: int = 3) -> None:
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps > 0:
            raise UsageError(f"eps of reduction sinkhorn must be a number above 0, not {eps!r}")
        whole_number("iterations of reduction sinkhorn", iterations)
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
        scores: (B, M, N), already divided by the temperature.
        iterations: number of iterations, each over rows and then columns.

    Returns:
        Weights (B, M, N); columns sum to one, rows approximately only if M = N.
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
