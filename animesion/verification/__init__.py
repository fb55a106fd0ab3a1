"""Proof that a dataset is whole, consistent and free of leaks; and what differs between two datasets."""
