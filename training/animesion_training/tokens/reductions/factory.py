"""The names of the token reductions, and the factory that makes their plug-ins.

Other packages add reductions through the entry-point group `animesion.reductions`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.tokens.reductions.base import Reduction, ReductionPlan
from animesion_training.tokens.reductions.cropr import Cropr
from animesion_training.tokens.reductions.merging import DPCKNN, PatchMerger, Sinkhorn, SoftAssignment, ToMe
from animesion_training.tokens.reductions.pruning import ATS, DynamicViT, EViT, TopK

#: Name -> description.
REDUCTIONS = {
    "topk": "keep the tokens with the highest attention from the class token",
    "evit": "TopK, plus one token that fuses the dropped ones (Liang et al., ICLR 2022)",
    "ats": "sample tokens by the class token's attention; their number depends on the image (Fayyaz et al., ECCV 2022)",
    "dynamicvit": "learned keep decisions for each token (Rao et al., NeurIPS 2021)",
    "cropr": "scores by queries that auxiliary classifiers train (Bergner et al., Token Cropr, CVPR 2025)",
    "tome": "merge pairs of tokens with similar keys, weighted by size (Bolya et al., ICLR 2023)",
    "dpcknn": "merge clusters around density peaks (Zeng et al., TCFormer, CVPR 2022)",
    "sit": "learned soft assignment to a fixed number of tokens (Zong et al., Self-slimmed ViT, ECCV 2022)",
    "patchmerger": "learned queries that attend to all tokens (Renggli et al., 2022)",
    "sinkhorn": "soft assignment to learned centers by optimal transport (Haurum et al., ICCVW 2023)",
}

GROUP = "animesion.reductions"
_PACKAGE = "animesion_training.tokens.reductions"


def make_reduction(
    name: str,
    *,
    keep_rate: float | Sequence[float],
    layers: Sequence[int] | None = None,
    depth: int,
    width: int,
    tokens: int,
    reference_compat: bool = False,
    **options: Any,
) -> Reduction:
    """Make a token reduction by name.

    Args:
        name: one of `REDUCTIONS`, or the name of an entry point.
        keep_rate: share of tokens that each stage keeps, in (0, 1]; one for all or one per stage. A stage with 1 does
            nothing.
        layers: blocks that reduce, from 0, ascending; None for 3, 6 and 9.
        depth: number of blocks of the transformer.
        width: D.
        tokens: number of patches.
        reference_compat: reproduce what we consider faults of the originals, as documented in each class.
        **options: arguments of the method's class.

    Raises:
        UsageError: an unknown name or option, or an invalid value; the message lists the possible ones.
    """
    kind = _class(name)
    known = [option for option in inspect.signature(kind).parameters if option != "plan"]
    if unknown := sorted(options.keys() - set(known)):
        available = f"it has {', '.join(known)}" if known else "it has none"
        raise UsageError(f"reduction {name} has no option {', '.join(unknown)}: {available}")
    plan = ReductionPlan.of(
        keep_rate, layers, depth=depth, width=width, tokens=tokens, reference_compat=reference_compat
    )
    return kind(plan, **options)


def _class(name: str) -> type[Reduction]:
    classes: dict[str, type[Reduction]] = {
        "topk": TopK,
        "evit": EViT,
        "ats": ATS,
        "dynamicvit": DynamicViT,
        "cropr": Cropr,
        "tome": ToMe,
        "dpcknn": DPCKNN,
        "sit": SoftAssignment,
        "patchmerger": PatchMerger,
        "sinkhorn": Sinkhorn,
    }
    if name not in classes:
        for point in entry_points(group=GROUP, name=name):
            found = point.load()
            if isinstance(found, type) and issubclass(found, Reduction):
                return found
            raise UsageError(f"reduction '{name}': {point.value} is not a subclass of {_PACKAGE}.Reduction")
        raise UsageError(
            f"there is no reduction '{name}'{nearest(name, REDUCTIONS)}; there are {', '.join(REDUCTIONS)}"
        )
    return classes[name]
