"""Where and how a model runs: processes, engines, and what all ranks agree on."""
