"""Training state on disk: saved whole or not at all, read at any number of processes."""
