"""Losses: classification objectives, their factory by name, counterfactual attention learning, and distillation."""

from animesion_training.losses.classification import Objective, SoftmaxObjective

__all__ = ["Objective", "SoftmaxObjective"]
