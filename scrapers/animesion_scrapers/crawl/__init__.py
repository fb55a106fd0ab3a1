"""A crawl that survives a kill: the crawler, its ledger and the spool files."""
