#!/usr/bin/env bash
# The second main job: a model that draws the emoji of this system's font and names them, with today's recipe.
#
#   bash launch/emoji.sh [--fresh] [section.key=value ...]
#
# Run again, it goes on where it stopped. --fresh starts over. Overrides go to the training. FONT=FILE takes another font,
# CODEC_STEPS=N trains the autoencoder for so many steps, EVALUATION="images.count=200" is told to the evaluation.
set -euo pipefail

CONFIG=configs/train/emoji.yaml
DATA=data/emoji-font
RUN=runs/emoji-font
VOCABULARY=2048
TEXTS=("$DATA/images/train/*.tar" "$DATA/text/train/*.tar")
IMAGES=(-n 8 --cfg 3 --steps 50 --seed 0 --prompt "red heart" --prompt "cat face" --prompt "flag: japan" --prompt "hamburger")
PROMPT="grinning face"
FASTEST=yes
# Named from here, before the script goes to its checkout.
FONT="${FONT:+$(realpath -m "$FONT")}"
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

prepare() {
    transfusion prepare emoji --out "$DATA/images" ${FONT:+--font "$FONT"}
    transfusion prepare python-docs --out "$DATA/text"
}

# The autoencoder, and what it makes of the training images.
make_codec() {
    local made="$DATA/codec-run"
    transfusion codec train configs/codec/emoji-kl.yaml "run.dir=$made" "images.shards=$DATA/images/train/*.tar" \
        "images.validation=$DATA/images/validation/*.tar" ${CODEC_STEPS:+"steps=$CODEC_STEPS"} threads=0
    transfusion codec encode "$made/codec" "$DATA/images/train/*.tar" --out "$DATA/latents"
    # Last, since the stage is done once it is there.
    ln -sfn codec-run/codec "$DATA/codec"
}

measure() {
    local classifier="$DATA/classifier.safetensors"
    [[ -e "$classifier" ]] || transfusion classifier "$CONFIG" --out "$classifier" \
        "data.sources.0.shards=$DATA/images/train/*.tar"
    transfusion eval "$MODEL" --suite validation --suite images --suite captions --suite nearest \
        --classifier "$classifier" --out "$RUN" ${evaluation[@]+"${evaluation[@]}"}
}

run_job
