"""Where a build keeps its files: the output folder and its receipts, Parquet tables, buckets behind URLs."""
