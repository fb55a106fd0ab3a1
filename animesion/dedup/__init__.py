"""Duplicate search over digests, hashes, thumbnails and embeddings, and the resulting clusters."""
