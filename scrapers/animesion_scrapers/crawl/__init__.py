"""Resumable crawls: the crawler, its ledger and the spool files."""
