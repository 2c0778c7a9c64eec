"""From a plan to batches: rows of arrays, their collation, worker processes, the loaders of training and validation."""
