"""Verification of a dataset: integrity, consistency and leaks between splits; and comparison of two datasets."""
