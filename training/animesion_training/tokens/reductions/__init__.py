"""Token reductions: methods that drop or merge tokens between the blocks of a vision transformer."""

from animesion_training.tokens.reductions.base import Reduction, ReductionPlan, keep_rows, reduction_layers, take
from animesion_training.tokens.reductions.factory import REDUCTIONS, make_reduction

__all__ = ["REDUCTIONS", "Reduction", "ReductionPlan", "keep_rows", "make_reduction", "reduction_layers", "take"]
