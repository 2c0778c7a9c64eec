"""Grids of runs, the power laws through their results, and the figure of both."""
