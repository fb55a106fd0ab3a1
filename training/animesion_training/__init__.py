"""Models, data streaming, objectives and the training engine; reads shards, knows nothing of crawlers."""
