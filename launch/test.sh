#!/usr/bin/env bash
# Sets up what the tests need and runs them all on the CPU. Arguments go to pytest: launch/test.sh -m 'not slow'
# TEST_PROCESSES: how many test at once, 2 unless given; 0: none beside pytest itself.
set -euo pipefail

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_venv all,test,oracles,docs

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# The site of docs/ in build/site: every link and every docstring. Its theme's advertisement is left out.
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs build --strict
# The page is tested in a browser, which Debian has. Elsewhere these tests are left out, and say so.
if ! command -v chromium google-chrome >/dev/null && command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    printf 'Installing Chromium\n' >&2
    { apt-get install -qy chromium || { apt-get update -q && apt-get install -qy chromium; }; } >/dev/null 2>&1 || true
fi
# Emoji are drawn from Debian's font. Elsewhere the test of the system's font is left out.
if ! [[ -e /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ]] && command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    printf 'Installing the colour emoji font\n' >&2
    fonts=(fonts-noto-color-emoji unicode-data unicode-cldr-core)
    { apt-get install -qy "${fonts[@]}" || { apt-get update -q && apt-get install -qy "${fonts[@]}"; }; } >/dev/null 2>&1 || true
fi
# Two at a time, the tests of a file in one process: many wait for processes that they started. A thread each, since
# threads of two processes on two cores wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
