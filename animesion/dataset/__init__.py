"""A built dataset and the files it is made of: shards, checksums, label files; local or behind a URL."""
