#!/usr/bin/env bash
# All that only a GPU can tell, in two calls of 400 and 310 seconds:
#
#   bash launch/gpu_check.sh [--call 1|2] [--after DIR] [--cpu] [--seconds N] [--only PART,...] [--carried DIR] OUT
#
# The first call finds out which kernels are right, each in a process of its own, how fast attention and the steps of two
# models are, and runs the tests. Its last lines say what the second one does, and print its command. The second sweeps
# variants of the kernels, or looks into those that were wrong, and then trains configs/train/emoji-gpu.yaml.
#
# Each part is a command with a limit, and one that hangs, crashes or fails loses nothing of the others. OUT holds at any
# second results.json with all that was found so far, and log.txt. Exit code 0 if all parts passed, 3 if not.
#
# Nothing is installed: the checkout is used where it stands. What a machine without a network lacks is carried there:
# `bash launch/gpu_wheels.sh build/gpu IMAGES TEXT` makes the folder, wheels and data.
#
# PYTHON names the Python to use. Else it is that of .venv, else python3. --cpu rehearses the call, all of it tiny.
set -euo pipefail
unset CDPATH

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x "$ROOT/.venv/bin/python" ]] && PYTHON="$ROOT/.venv/bin/python"
fi
export PYTHONPATH="$ROOT/benchmarks"
exec "$PYTHON" -m gpu_check "$@"
