"""Decoding of untrusted bytes, and features of the pixels: digests, hashes, thumbnails, quality figures."""
