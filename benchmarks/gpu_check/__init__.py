"""What launch/gpu_check.sh runs: two calls of a few minutes each that find out what only a GPU can tell.

`calls` lists the parts of both calls, `runner` runs them one by one, and `record` keeps what came of them on disk. What
these three import is in every Python, for the packages of the project may still have to be installed.
"""
