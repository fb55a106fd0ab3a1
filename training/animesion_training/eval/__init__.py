"""Evaluation: scores of a split, metrics and reports, and predictions for image files."""
