"""Read a built dataset and its files: shards, tables and label files, in a folder or behind a URL."""
