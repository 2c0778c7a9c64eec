"""What a shard holds: members of a tar file, samples and their faults, writing and finding shards."""
