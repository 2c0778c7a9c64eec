"""Named suites of metrics, and the command that runs them."""
