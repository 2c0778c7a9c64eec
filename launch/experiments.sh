#!/usr/bin/env bash
# The emoji grids of configs/experiments: their data, their runs, their tables and figure.
#
#   bash launch/experiments.sh prepare IMAGES TEXT KL VQ   once: IMAGES/{train,val}/*.tar, TEXT/{train,val}/*.jsonl, two codecs
#   bash launch/experiments.sh scaling [section.key=value ...]
#   bash launch/experiments.sh ablation [section.key=value ...]
#   bash launch/experiments.sh position [section.key=value ...]
#   bash launch/experiments.sh recipes [section.key=value ...]
#   bash launch/experiments.sh frozen [section.key=value ...]
#   bash launch/experiments.sh tuning [section.key=value ...]
#   bash launch/experiments.sh budgets [section.key=value ...]
#   bash launch/experiments.sh gallery [section.key=value ...]
#   bash launch/experiments.sh editing PAIRS [section.key=value ...]     PAIRS/{train,val}/*.tar: an image, a text, an image
#
# Run again, each goes on where it stopped. Grids make PROCESSES (default 2) runs at once, a thread each.
set -euo pipefail

usage="usage: bash launch/experiments.sh prepare IMAGES TEXT KL VQ | editing PAIRS | scaling|ablation|position|recipes|frozen|tuning|budgets|gallery, each with [section.key=value ...]"
[[ $# -ge 1 ]] || { echo "$usage" >&2 && exit 2; }
command="$1"
shift
case "$command $#" in
    "prepare 4" | "editing "[1-9]* | "scaling "* | "ablation "* | "position "* | "recipes "* | "frozen "* | "tuning "* | "budgets "* | "gallery "*) ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
# What is named from here, before the script goes to its checkout.
places=()
if [[ "$command" == prepare ]]; then
    for place in "$@"; do
        places+=("$(realpath -e "$place")") || exit 2
    done
elif [[ "$command" == editing ]]; then
    places+=("$(realpath -e "$1")") || exit 2
    shift
fi

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
DATA=data/emoji
GRIDS=configs/experiments
# Documents of the validation text that are measured: all of them would cost more than the training.
VALIDATION=200
GUIDED=(--metric text_loss_nats_per_byte --metric classifier_frechet_at_best_guidance --metric caption_token_f1)
EDITED=(--metric edits_image_loss --metric edit_nats_per_value --metric edit_nats_per_value_without_the_image --metric edit_distance)
METRICS=(--metric text_loss_nats_per_byte --metric classifier_frechet --metric caption_token_f1)

transfusion() {
    "$PYTHON" -m transfusion "$@"
}

prepare() {
    mkdir -p "$DATA"
    ln -sfnT "$1" "$DATA/images"
    ln -sfnT "$2" "$DATA/text"
    ln -sfnT "$3" "$DATA/kl"
    ln -sfnT "$4" "$DATA/vq"
    cat "$DATA"/text/val/*.jsonl | awk -v most="$VALIDATION" 'NR <= most' > "$DATA/text_validation.jsonl"
    [[ -e "$DATA/tokenizer.model" ]] || transfusion tokenizer train "$DATA/images/train/*.tar" \
        "$DATA/text/train/00000.jsonl" --out "$DATA/tokenizer.model" --vocabulary 1024
    local kind
    for kind in kl vq; do
        transfusion codec encode "$DATA/$kind" "$DATA/images/train/*.tar" --out "$DATA/encoded/$kind"
    done
    [[ -e "$DATA/classifier.safetensors" ]] || transfusion classifier "$GRIDS/emoji.yaml" \
        --out "$DATA/classifier.safetensors" "data.sources.1.shards=$DATA/images/train/*.tar"
}

scaling() {
    with_laws emoji-scaling "$@"
}

budgets() {
    METRICS=("${GUIDED[@]}")
    with_laws emoji-budgets "$@"
}

# with_laws GRID [section.key=value ...]
with_laws() {
    local out="runs/$1"
    run "$GRIDS/$1.yaml" "$out" "${@:2}"
    transfusion scaling fit "$out" "${METRICS[@]}" | tee "$out/laws.md"
    transfusion scaling plot "$out" "${METRICS[@]}" --out "$out/figure.png"
}

ablation() {
    run "$GRIDS/emoji-ablation.yaml" runs/emoji-ablation "$@"
}

position() {
    run "$GRIDS/emoji-position.yaml" runs/emoji-position "$@"
}

recipes() {
    METRICS=("${GUIDED[@]}")
    run "$GRIDS/emoji-recipes.yaml" runs/emoji-recipes "$@"
}

tuning() {
    METRICS=("${GUIDED[@]}")
    run "$GRIDS/emoji-tuning.yaml" runs/emoji-tuning "$@"
}

frozen() {
    local out=runs/emoji-frozen grid="$GRIDS/emoji-frozen.yaml"
    METRICS=("${GUIDED[@]}")
    if [[ ! -e "$DATA/language/config.json" ]]; then
        transfusion scaling run "$grid" --out "$out" --processes "${PROCESSES:-2}" --only language "$@"
        transfusion export "$out/language.seed-0" --out "$out/language.seed-0/export" --text-model "$DATA/language"
    fi
    run "$grid" "$out" "$@"
}

# One training, and what it draws of captions that it has not seen: eight images of each, none picked.
gallery() {
    local config="$GRIDS/emoji-gallery.yaml" out=runs/emoji-gallery
    check_config "$config" "$@"
    transfusion train "$config" "run.dir=$out" "$@"
    transfusion export "$out" --out "$out/export"
    rm -rf "$out/gallery"
    transfusion sample "$out/export" --prompts "$GRIDS/emoji-gallery.txt" -n 8 --seed 0 --steps 50 \
        --out "$out/gallery" --sheet "$out/gallery.png"
    transfusion eval "$out/export" --suite validation --suite guidance --suite captions --suite nearest \
        --classifier "$DATA/classifier.safetensors" --out "$out"
    transfusion report "$out"
}

editing() {
    ln -sfnT "${places[0]}" "$DATA/edits"
    METRICS=("${EDITED[@]}")
    run "$GRIDS/context-editing.yaml" runs/context-editing "$@"
}

# run GRID OUT [section.key=value ...]: with METRICS in the table
run() {
    transfusion scaling run "$1" --out "$2" --processes "${PROCESSES:-2}" "${@:3}"
    transfusion scaling table "$2" "${METRICS[@]}" | tee "$2/table.md"
}

[[ "$command" != editing || -d "$DATA" ]] || fail "$DATA is not there; make it by: bash launch/experiments.sh prepare IMAGES TEXT KL VQ"
ensure_venv all
if [[ "$command" == prepare ]]; then
    prepare "${places[@]}"
else
    "$command" "$@"
fi
