"""Store the files of a build: the output folder and its receipts, Parquet tables, buckets behind URLs."""
