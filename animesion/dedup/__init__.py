"""Duplicate search over hashes and thumbnails, and the clusters that come of it."""
