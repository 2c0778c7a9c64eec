#!/usr/bin/env bash
# From nothing to a trained model and a report: digits, text, tokenizer, training under ZeRO-3, samples, evaluation.
#
#   bash launch/quickstart.sh [--fresh] [section.key=value ...]
#
# Run again, it goes on where it stopped. --fresh starts over. Overrides go to the training, EVALUATION="digits.count=10"
# to the evaluation.
set -euo pipefail

CONFIG=configs/train/quickstart.yaml
DATA=data/quickstart
RUN=runs/quickstart
VOCABULARY=1280
TEXTS=("$DATA/digits/train/*.tar" "$DATA/text/train/*.tar")
IMAGES=(-n 8 --cfg 3 --steps 50 --seed 0 --prompt "a handwritten three" --prompt "a handwritten seven")
PROMPT="a handwritten five"
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

prepare() {
    transfusion prepare digits --out "$DATA/digits"
    transfusion prepare python-docs --out "$DATA/text"
}

measure() {
    transfusion eval "$MODEL" --suite digits --suite validation --out "$RUN" ${evaluation[@]+"${evaluation[@]}"}
}

run_job
