#!/usr/bin/env bash
# All that only a GPU can tell, in one run of less than nine minutes:
#
#   bash launch/gpu_check.sh [--cpu] [--seconds N] [--only PART,PART...] OUT
#
# Parts: environment, tests (pytest -m gpu), step (the end-to-end step: local, compiled, ZeRO), quickstart (a short one,
# from data to report), attention (the table; it has what time is left). Each runs under a time limit, and one that
# fails stops no other. OUT then holds results.json, log.txt, report.html and grid.png. Exit code 0 if all parts passed,
# 3 if not.
#
# --cpu      all of it tiny and on the CPU: a test of this script
# --seconds  for everything together, 520 unless given
# --only     parts to run, so that several runs can share the work; step and quickstart stand for all of theirs
#
# Nothing is installed: the checkout is used where it stands. On a machine without network WHEELS=DIR names a folder of
# wheels for what its Python lacks. Beside torch, Triton, numpy, pillow, pyyaml, safetensors, sentencepiece, rich, typer,
# scikit-learn, matplotlib, jinja2 and pytest, training needs pydantic (with pydantic_core, annotated_types and
# typing_inspection), webdataset and braceexpand; ZeRO needs deepspeed, hjson and py-cpuinfo too (deepspeed has no wheel
# of its own: DS_BUILD_OPS=0 pip wheel --no-deps deepspeed makes one). PYTHON=... names the Python to use; else it is
# that of .venv, else python3.
set -euo pipefail
unset CDPATH

usage="usage: bash launch/gpu_check.sh [--cpu] [--seconds N] [--only PART,PART...] OUT"
refuse() { echo "$usage" >&2 && exit 2; }
cpu=false
limit=520
only=""
out=""
while [[ $# -gt 0 ]]; do
    case "$1" in
        --cpu) cpu=true ;;
        --seconds | --only)
            [[ $# -ge 2 ]] || refuse
            if [[ "$1" == --seconds ]]; then limit="$2"; else only="$2"; fi
            shift
            ;;
        -h | --help) echo "$usage" && exit 0 ;;
        -*) refuse ;;
        *) out="$1" ;;
    esac
    shift
done
[[ -n "$out" && "$limit" =~ ^[1-9][0-9]*$ ]] || refuse
mkdir -p "$out"
OUT="$(cd "$out" && pwd)"
WHEELS="${WHEELS:+$(cd "$WHEELS" && pwd)}"

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON="$ROOT/.venv/bin/python"
fi
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
LOG="$OUT/log.txt"
DATA="$WORK/data"
RUN="$WORK/run"
MODEL="$RUN/export"
# Seconds kept for the collecting at the end.
RESERVE=10
failed=0
: >"$LOG"
: >"$WORK/parts.tsv"

# wanted PART: by --only, under its own name or the first word of it.
wanted() {
    [[ -z "$only" || ",$only," == *",$1,"* || ",$only," == *",${1%%-*},"* ]]
}

# part NAME SECONDS COMMAND...: run it within the time, note how it went.
part() {
    local name="$1" most="$2" begin=$SECONDS code=0 left
    shift 2
    wanted "$name" || return 0
    left=$((limit - RESERVE - SECONDS))
    # A machine that tests this script may be busy with other tests.
    if $cpu; then most=$((most * 6)); fi
    if ((most > left)); then most=$left; fi
    printf '\n== %s\n' "$name" | tee -a "$LOG"
    if ((most < 5)); then
        echo "no time left" | tee -a "$LOG"
        code=124
    elif ! timeout --kill-after=5 "$most" "$@" 2>&1 | tee -a "$LOG"; then
        code="${PIPESTATUS[0]}"
    fi
    if ((code != 0)); then
        failed=$((failed + 1))
        printf '== %s FAILED: exit code %d (124: out of time)\n' "$name" "$code" | tee -a "$LOG"
    fi
    printf '%s\t%d\t%d\n' "$name" $((SECONDS - begin)) "$code" >>"$WORK/parts.tsv"
}

transfusion() {
    part "$1" "$2" "$PYTHON" -m transfusion "${@:3}"
}

has() {
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

# The packages from the checkout, and the benchmarks' shared module.
mkdir -p "$WORK/site"
export PYTHONPATH="$WORK/site:$ROOT/kernels:$ROOT/src:$ROOT/benchmarks"
export PYTHONUNBUFFERED=1 DS_BUILD_OPS=0 WANDB_MODE=offline
if $cpu; then
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
if [[ -n "$WHEELS" ]]; then
    only="${only:+$only,wheels}"
    part wheels 60 "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --no-cache-dir --target "$WORK/site" "$WHEELS"/*.whl
fi
zero=false
if { wanted step-zero || wanted quickstart-train; } && has deepspeed && "$PYTHON" -c 'import deepspeed' >>"$LOG" 2>&1; then zero=true; fi

# Sizes, on a GPU and tiny.
sources="[{name: digits, shards: $DATA/digits/train/*.tar, weight: 0.8}, "
sources+="{name: python-docs, shards: $DATA/text/train/*.tar, weight: 0.2}]"
validation="[{name: digits, shards: $DATA/digits/validation/*.tar}, "
validation+="{name: python-docs, shards: $DATA/text/validation/*.tar}]"
training=("run.dir=$RUN" "data.tokenizer=$DATA/tokenizer.model" "data.sources=$sources" "data.validation=$validation")
if $cpu; then
    training+=(train.steps=3 train.threads=1 train.engine=local train.precision=fp32 model.layers=2 model.hidden_size=64
        model.heads=2 sample_grid.steps=2 sample_grid.per_prompt=1)
    sampling=(-n 1 --steps 2)
    suites=(--suite validation)
    stepping=(--steps 3 --seconds 5)
    table=(--families transfusion causal)
    workers=()
else
    training+=(train.steps=300 train.precision=bf16 data.global_batch_size=32 checkpoint.every=300 log.every=10)
    if ! $zero; then training+=(train.engine=local); fi
    sampling=(-n 8 --steps 50)
    suites=(--suite validation --suite digits)
    stepping=(--steps 20 --seconds 20)
    table=()
    workers=()
    if has xdist; then workers=(-n 8); fi
fi

# shellcheck disable=SC2016  # "$1" is for the inner shell
part environment 60 bash -c '
    nvidia-smi || echo "no nvidia-smi"
    "$1" --version
    "$1" -m pip list --disable-pip-version-check 2>/dev/null \
        | grep -iE "^(torch|triton|deepspeed|numpy|pydantic|webdataset|sentencepiece|safetensors|flash)" || true
    # 3 says that something is missing, which is printed; whether it matters the other parts tell.
    "$1" -m transfusion doctor || [[ $? -eq 3 ]]
' environment "$PYTHON"

part tests 140 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --maxfail=30 --junitxml "$WORK/tests.xml" \
    ${workers[@]+"${workers[@]}"} tests/kernels

part step-local 45 "$PYTHON" benchmarks/step.py train.engine=local "${stepping[@]}" --out "$WORK/step-local.json"
if ! $cpu; then
    part step-compiled 60 "$PYTHON" benchmarks/step.py train.engine=local train.compile=true "${stepping[@]}" \
        --out "$WORK/step-compiled.json"
fi
if $zero; then
    part step-zero 60 "$PYTHON" benchmarks/step.py train.engine=zero "${stepping[@]}" --out "$WORK/step-zero.json"
fi

transfusion quickstart-digits 30 prepare digits --out "$DATA/digits"
transfusion quickstart-text 30 prepare python-docs --out "$DATA/text"
transfusion quickstart-tokenizer 40 tokenizer train "$DATA/*/train/*.tar" --out "$DATA/tokenizer.model" \
    --vocabulary 1280
transfusion quickstart-train 120 train configs/train/quickstart.yaml "${training[@]}"
transfusion quickstart-export 30 export "$RUN" --out "$MODEL"
transfusion quickstart-sample 40 sample "$MODEL" --out "$RUN/images" --cfg 3 --sampler ddim --seed 0 \
    --prompt "a handwritten three" --prompt "a handwritten seven" "${sampling[@]}"
transfusion quickstart-evaluate 60 eval "$MODEL" --out "$RUN" "${suites[@]}"
transfusion quickstart-report 30 report "$RUN"

left=$((limit - RESERVE - SECONDS))
if $cpu && ((left > 20)); then left=20; fi
# Begun compilations go on past the table's own budget, hence the margin; what is measured is written as it comes.
part attention "$left" "$PYTHON" benchmarks/attention.py --seconds $((left > 50 ? left - 35 : left)) \
    --out "$WORK/attention.json" ${table[@]+"${table[@]}"}

if [[ -e "$RUN/report.html" ]]; then cp "$RUN/report.html" "$OUT/report.html"; fi
for grid in "$RUN"/samples/step_*.png; do
    if [[ -e "$grid" ]]; then cp "$grid" "$OUT/grid.png"; fi # the last one stays
done
"$PYTHON" - "$WORK" "$OUT/results.json" <<'PYTHON'
"""Joins what the parts left behind; what a part did not write is null."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

work, out = Path(sys.argv[1]), Path(sys.argv[2])


def read(name: str) -> object:
    path = work / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def tests() -> object:
    path = work / "tests.xml"
    if not path.exists():
        return None
    suite = ElementTree.parse(path).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    bad = {
        case.get("name"): " ".join((found.get("message") or "").split())[:400]
        for case in suite.iter("testcase")
        for kind in ("failure", "error")
        for found in case.findall(kind)
    }
    return counts | {"seconds": float(suite.get("time")), "failed": bad}


lines = []
if (work / "run" / "metrics.jsonl").exists():
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
parts = [line.split("\t") for line in (work / "parts.tsv").read_text().splitlines()]
record = {
    "passed": all(code == "0" for _, _, code in parts),
    "parts": [{"name": name, "seconds": int(s), "exit_code": int(code)} for name, s, code in parts],
    "tests": tests(),
    "attention": read("attention.json"),
    "steps": {name: read(f"step-{name}.json") for name in ("local", "compiled", "zero")},
    "quickstart": {
        "environment": read("run/env.json"),
        "metrics": read("run/metrics.json"),
        "log": lines[:: max(1, len(lines) // 30)] + lines[-1:],
    },
}
out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
PYTHON

printf '\n'
awk -F '\t' '{ printf "  %-22s %4d s  %s\n", $1, $2, ($3 == 0 ? "passed" : "FAILED (exit code " $3 ")") }' "$WORK/parts.tsv"
printf '\n%d s in all; results in %s\n' "$SECONDS" "$OUT"
((failed == 0)) || exit 3
