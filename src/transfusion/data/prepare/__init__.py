"""Shards of real data for trying things: digits, emoji, documentation, folders of images."""
