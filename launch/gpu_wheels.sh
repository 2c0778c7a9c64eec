#!/usr/bin/env bash
# Makes the folder that launch/gpu_check.sh takes along to a machine without a network, at most 64 MiB with the checkout:
#
#   bash launch/gpu_wheels.sh OUT [IMAGES TEXT]
#
# OUT/wheels holds what is not on a machine with PyTorch and Triton. OUT/emoji holds data for configs/train/emoji-gpu.yaml
# from IMAGES/{train,val}/*.tar and TEXT/{train,val}/*.jsonl, with a tokenizer. Without both it is left out.
#
# PYTHON_VERSION and LIMIT_MIB change the target, 3.12 and 64 unless given.
set -euo pipefail

usage="usage: bash launch/gpu_wheels.sh OUT [IMAGES TEXT]"
[[ $# -eq 1 || $# -eq 3 ]] || { echo "$usage" >&2 && exit 2; }
[[ "$1" != -* ]] || { echo "$usage" >&2 && exit 2; }
mkdir -p "$1"
OUT="$(cd "$1" && pwd)"
sources=()
for folder in "${@:2}"; do
    sources+=("$(realpath -e "$folder")")
done

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
PYTHON_VERSION="${PYTHON_VERSION:-3.12}"
LIMIT_MIB="${LIMIT_MIB:-64}"
# What the GPU machine lacks. typing_extensions and pytest-timeout may be there, but older than is needed.
PACKAGES=(pydantic pydantic_core annotated_types typing_inspection typing_extensions webdataset braceexpand hjson
    pytest-timeout)
# It has no wheel of its own.
BUILT=(deepspeed)
# Shards of images, of text, and documents of validation text.
IMAGE_SHARDS=8
TEXT_SHARDS=2
VALIDATION=200
VOCABULARY=32000

ensure_venv all
pip() {
    "$PYTHON" -m pip --quiet --disable-pip-version-check "$@"
}

rm -rf "$OUT/wheels"
mkdir -p "$OUT/wheels"
platforms=()
for tag in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64; do
    platforms+=(--platform "$tag")
done
# pydantic takes one version of its core alone: those that this checkout is tested with.
versions=()
for package in "${PACKAGES[@]}"; do
    version="$("$PYTHON" -c 'import importlib.metadata as m, sys
try: print("==" + m.version(sys.argv[1]))
except m.PackageNotFoundError: pass' "$package")"
    versions+=("$package$version")
done
pip download --no-deps --only-binary=:all: --implementation cp --python-version "$PYTHON_VERSION" \
    "${platforms[@]}" --dest "$OUT/wheels" "${versions[@]}"
pip wheel --no-deps -c constraints.txt --wheel-dir "$OUT/wheels" "${BUILT[@]}"

if [[ ${#sources[@]} -gt 0 ]]; then
    emoji="$OUT/emoji"
    rm -rf "$emoji"
    mkdir -p "$emoji"/images/{train,val} "$emoji"/text/train
    images=("${sources[0]}"/train/*.tar)
    texts=("${sources[1]}"/train/*.jsonl)
    cp "${images[@]:0:IMAGE_SHARDS}" "$emoji/images/train"
    cp "${sources[0]}"/val/*.tar "$emoji/images/val"
    cp "${texts[@]:0:TEXT_SHARDS}" "$emoji/text/train"
    cat "${sources[1]}"/val/*.jsonl | awk -v most="$VALIDATION" 'NR <= most' >"$emoji/text_validation.jsonl"
    chmod -R u+w "$emoji"
    "$PYTHON" -m transfusion tokenizer train "$emoji/images/train/*.tar" "$emoji/text/train/*.jsonl" \
        --out "$emoji/tokenizer.model" --vocabulary "$VOCABULARY"
fi

tracked="$(git ls-files -z 2>/dev/null | xargs -0 -r stat --format %s -- 2>/dev/null | awk '{ sum += $1 } END { print sum + 0 }')"
carried="$(find "$OUT" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')"
find "$OUT" -type f -printf '%s %P\n' | sort -k2 | awk '{ printf "%8.2f MiB  %s\n", $1 / 1048576, $2 }'
awk -v c="$carried" -v t="$tracked" 'BEGIN { printf "%8.2f MiB, and the checkout %.2f MiB\n", c / 1048576, t / 1048576 }'
if ((carried + tracked > LIMIT_MIB * 1048576)); then
    fail "that is more than $LIMIT_MIB MiB"
fi
