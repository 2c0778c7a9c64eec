"""Shards that stand elsewhere: their download, and the cache of their copies."""
