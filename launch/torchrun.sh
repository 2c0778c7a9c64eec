#!/usr/bin/env bash
# Trains on all GPUs of this machine, else in two CPU processes: launch/torchrun.sh CONFIG [section.key=value ...]
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: bash launch/torchrun.sh CONFIG [section.key=value ...]" >&2 && exit 2; }
config="$(realpath "$1")"
shift
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_venv all
check_config "$config" "$@"
# torchrun warns unless told; the training sets its own threads (train.threads).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$(process_count)" \
    -m transfusion train "$config" "$@"
