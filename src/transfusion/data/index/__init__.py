"""What stands where in the shards: an index file for each shard, the index of a source, and how both are made."""
