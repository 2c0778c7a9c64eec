"""Shards of real data for trying things: digits, documentation, folders of images."""
