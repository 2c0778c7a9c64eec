#!/usr/bin/env bash
# From nothing to a trained model and a report: data, tokenizer, training under ZeRO-3, samples, evaluation.
#
#   bash launch/quickstart.sh [--fresh] [section.key=value ...]
#
# Run again, it goes on where it stopped. --fresh starts over. Overrides go to the training.
set -euo pipefail

usage="usage: bash launch/quickstart.sh [--fresh] [section.key=value ...]"
fresh=false
overrides=()
for argument in "$@"; do
    case "$argument" in
        --fresh) fresh=true ;;
        -h | --help) echo "$usage" && exit 0 ;;
        -*) echo "$usage" >&2 && exit 2 ;;
        *=*) overrides+=("$argument") ;;
        *) echo "$usage" >&2 && exit 2 ;;
    esac
done

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
CONFIG=configs/train/quickstart.yaml
DATA=data/quickstart
RUN=runs/quickstart
MODEL=$RUN/export
IMAGES=$RUN/images

timings=()
current=""

# stage NAME COMMAND...: run it, and note the time.
stage() {
    local begin=$SECONDS
    current="$1"
    shift
    printf '\n== %s\n' "$current" >&2
    "$@"
    timings+=("$(printf '%-10s %4d s' "$current" $((SECONDS - begin)))")
    current=""
}

# newer PRODUCT SOURCE: PRODUCT was made after SOURCE last changed, so that its stage need not run.
newer() {
    [[ -e "$1" && ! "$1" -ot "$2" ]]
}

transfusion() {
    "$PYTHON" -m transfusion "$@"
}

tell_how_to_go_on() {
    local code=$?
    if [[ $code -ne 0 && $code -ne 2 && -n "$current" ]]; then
        printf '\nStopped in stage "%s" (exit code %d). The same command goes on from here.\n' "$current" $code >&2
    fi
}
trap tell_how_to_go_on EXIT

prepare() {
    transfusion prepare digits --out "$DATA/digits"
    transfusion prepare python-docs --out "$DATA/text"
}

train_tokenizer() {
    transfusion tokenizer train "$DATA/digits/train/*.tar" "$DATA/text/train/*.tar" \
        --out "$DATA/tokenizer.model" --vocabulary 1280
}

train() {
    # torchrun warns unless told; the training sets its own threads (train.threads).
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
        "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$(process_count 8)" \
        -m transfusion train "$CONFIG" "run.dir=$RUN" ${overrides[@]+"${overrides[@]}"}
}

sample() {
    # Those of a former run.
    rm -rf "$IMAGES"
    transfusion sample "$MODEL" --out "$IMAGES" -n 8 --cfg 3 --sampler ddim --steps 50 --seed 0 \
        --prompt "a handwritten three" --prompt "a handwritten seven"
}

if $fresh; then
    rm -rf "$RUN" "$DATA"
fi
stage set-up ensure_venv all
check_config "$CONFIG" ${overrides[@]+"${overrides[@]}"}
stage prepare prepare
[[ -e "$DATA/tokenizer.model" ]] || stage tokenizer train_tokenizer
stage train train
newer "$MODEL/config.json" "$RUN/metrics.jsonl" || stage export transfusion export "$RUN" --out "$MODEL"
newer "$IMAGES/index.jsonl" "$MODEL/config.json" || stage sample sample
newer "$RUN/metrics.json" "$MODEL/config.json" \
    || stage evaluate transfusion eval "$MODEL" --suite digits --suite validation --out "$RUN"
stage report transfusion report "$RUN"

printf '\n'
printf '  %s\n' "${timings[@]}"
cat <<END

Report    $ROOT/$RUN/report.html
Images    $ROOT/$IMAGES
Metrics   $ROOT/$RUN/metrics.json
Model     $ROOT/$MODEL   (.venv/bin/transfusion sample $MODEL --prompt "a handwritten five" --out images)
END
