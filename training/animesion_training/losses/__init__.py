"""Losses: classification objectives, their factory by name, and distillation."""
