# Sourced by the scripts that go from nothing to a report, quickstart.sh and emoji.sh, with their arguments. Each names
#
#   CONFIG, DATA, RUN   its configuration, and the folders of its data and its run
#   VOCABULARY          of its tokenizer
#   prepare             a function: its data, under $DATA
#   make_codec          a function, where images have a codec of their own: it makes $DATA/codec
#   TEXTS               an array: the shards whose texts the tokenizer learns from
#   IMAGES              an array: options of `transfusion sample`
#   PROMPT              of an image to try
#   FASTEST             anything, to train in bf16 where that is fast
#   measure             a function: evaluates $MODEL into $RUN, with the settings in the array `evaluation`
#
# and calls run_job. Run again, a job goes on where it stopped.
# shellcheck shell=bash disable=SC2154

usage="usage: bash launch/$(basename "$0") [--fresh] [section.key=value ...]"
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

# Settings of suites, between them white space.
read -ra evaluation <<<"${EVALUATION:-}"

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

lacks_codec() {
    declare -F make_codec >/dev/null && { $fresh || [[ ! -e "$DATA/codec/config.json" ]]; }
}

# Where the processor multiplies it, bf16 is faster on CPUs too. Elsewhere it is far slower.
fast_precision() {
    case "$("$PYTHON" -c 'import torch; print(torch.cuda.is_available() and (torch.cuda.is_bf16_supported(False) or "none"))')" in
        True) echo bf16 ;;
        none) echo fp32 ;;
        *) grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo bf16 || echo fp32 ;;
    esac
}

train_tokenizer() {
    transfusion tokenizer train "${TEXTS[@]}" --out "$DATA/tokenizer.model" --vocabulary "$VOCABULARY"
}

train() {
    # torchrun warns unless told; the training sets its own threads (train.threads).
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
        "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$(process_count 8)" \
        -m transfusion train "$CONFIG" "run.dir=$RUN" ${FASTEST:+"train.precision=$(fast_precision)"} \
        ${overrides[@]+"${overrides[@]}"}
}

sample() {
    # Those of a former run. The folder has its name last, since the stage is done once it is there.
    rm -rf "$RUN/images" "$RUN/images-unfinished"
    transfusion sample "$MODEL" --out "$RUN/images-unfinished" "${IMAGES[@]}"
    mv "$RUN/images-unfinished" "$RUN/images"
}

run_job() {
    MODEL="$RUN/export"
    stage set-up ensure_venv all
    if lacks_codec; then
        # Which needs no codec to be there.
        transfusion plan "$CONFIG" ${overrides[@]+"${overrides[@]}"} >/dev/null
    else
        check_config "$CONFIG" ${overrides[@]+"${overrides[@]}"}
    fi
    if $fresh; then
        rm -rf "$RUN" "$DATA"
    fi
    stage prepare prepare
    if lacks_codec; then
        stage codec make_codec
    fi
    [[ -e "$DATA/tokenizer.model" ]] || stage tokenizer train_tokenizer
    stage train train
    newer "$MODEL/config.json" "$RUN/metrics.jsonl" || stage export transfusion export "$RUN" --out "$MODEL"
    newer "$RUN/images/index.jsonl" "$MODEL/config.json" || stage sample sample
    # Once all of it is there, and was measured as it is told to.
    if ! newer "$RUN/.evaluated" "$MODEL/config.json" || [[ "$(<"$RUN/.evaluated")" != "${EVALUATION:-}" ]]; then
        stage evaluate measure
        printf '%s\n' "${EVALUATION:-}" >"$RUN/.evaluated"
    fi
    stage report transfusion report "$RUN"

    printf '\n'
    printf '  %s\n' "${timings[@]}"
    cat <<END

Report    $ROOT/$RUN/report.html
Images    $ROOT/$RUN/images
Metrics   $ROOT/$RUN/metrics.json
Model     $ROOT/$MODEL   (.venv/bin/transfusion sample $MODEL --prompt "$PROMPT" --out images)
END
}
