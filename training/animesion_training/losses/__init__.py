"""Losses: classification objectives, their factory by name, and distillation."""

from animesion_training.losses.classification import Objective, SoftmaxObjective

__all__ = ["Objective", "SoftmaxObjective"]
