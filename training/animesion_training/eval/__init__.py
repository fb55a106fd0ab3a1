"""Evaluation: scores of a split, metrics, reports; and predictions for single images."""
