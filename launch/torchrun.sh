#!/usr/bin/env bash
# Trains on all GPUs of this machine, else in two CPU processes: launch/torchrun.sh CONFIG [section.key=value ...]
# On several machines, the same on each: NODES=2 HEAD=first-host launch/torchrun.sh CONFIG ...
#   PORT (29500) of the first host; PROCESSES a machine (one a GPU); CHECK=0 leaves out the comparison before.
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: [NODES=N HEAD=HOST] bash launch/torchrun.sh CONFIG [section.key=value ...]" >&2 && exit 2; }
config="$(realpath "$1")"
shift
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_venv all
check_config "$config" "$@"
# torchrun warns unless told; the training sets its own threads (train.threads).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
processes="${PROCESSES:-$(process_count)}"
run=("$PYTHON" -m torch.distributed.run --nproc-per-node "$processes")
if [[ "${NODES:-1}" -gt 1 ]]; then
    [[ -n "${HEAD:-}" ]] || fail "NODES=$NODES needs HEAD=HOST, the machine where all meet"
    # Every machine gives the same address and gets its number there.
    run+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id transfusion)
    if [[ "${CHECK:-1}" != 0 ]]; then
        "${run[@]}" -m transfusion doctor --cluster
    fi
else
    run+=(--standalone)
fi
exec "${run[@]}" -m transfusion train "$config" "$@"
