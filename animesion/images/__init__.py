"""From hostile bytes to pixels, and what is computed from pixels: digests, hashes, thumbnails, quality."""
