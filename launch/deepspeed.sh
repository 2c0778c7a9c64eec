#!/usr/bin/env bash
# Trains with DeepSpeed's launcher: launch/deepspeed.sh CONFIG [section.key=value ...]
# Over the machines of launch/hostfile where that file exists, else on all GPUs of this one.
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: bash launch/deepspeed.sh CONFIG [section.key=value ...]" >&2 && exit 2; }
config="$(realpath "$1")"
shift
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [[ -f launch/hostfile && "$config$*" == *"'"* ]]; then
    # DeepSpeed puts each argument between two of them for the shells of the other machines.
    fail "an argument holds a ', which does not reach other machines; write that setting into the configuration file"
fi
ensure_venv all
check_config "$config" "$@"
# The launcher starts `python` and asks for `ninja` by name.
export PATH="$ROOT/.venv/bin:$PATH"
if [[ -f launch/hostfile ]]; then
    where=(--hostfile launch/hostfile)
    # Versions, clocks, shared storage and bandwidth of the machines; CHECK=0 leaves it out.
    [[ "${CHECK:-1}" == 0 ]] || deepspeed "${where[@]}" --module transfusion doctor --cluster
else
    where=(--num_gpus "$(process_count)")
fi
exec deepspeed "${where[@]}" --module transfusion train "$config" "$@"
