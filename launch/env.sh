# Sourced by the other scripts, after `set -euo pipefail`: goes to the checkout and keeps its .venv in step with
# setup.py and constraints.txt. Afterwards "$PYTHON" is the Python of that environment.
# shellcheck shell=bash

# With it `cd` may go elsewhere, and prints where it went.
unset CDPATH
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit 2
PYTHON="$ROOT/.venv/bin/python"

# DeepSpeed compiles nothing when it is installed.
export DS_BUILD_OPS=0

fail() {
    printf '%s\n' "$*" >&2
    exit 2
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# The Python to make the environment with: 3.11, which the tests run on, else a newer one.
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and was not found; install it (apt-get install python3.11 python3.11-venv)"
}

# ensure_venv EXTRAS: .venv holds this project with these extras, at the versions of constraints.txt.
ensure_venv() {
    local extras="$1" base installed wanted stamp=.venv/.installed
    # Killed while it was made, an environment may have no pip.
    if ! is_new_enough "$PYTHON" || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        base="$(find_python)"
        "$base" -c 'import ensurepip' 2>/dev/null \
            || fail "$base cannot make virtual environments; install its venv package (apt-get install $base-venv)"
        printf 'Making .venv with %s\n' "$("$base" --version)" >&2
        "$base" -m venv --clear .venv
    fi
    wanted="$(cat setup.py pyproject.toml constraints.txt | "$PYTHON" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    installed="$(sed -n "s/^$wanted //p" "$stamp" 2>/dev/null || true)"
    if includes "$installed" "$extras"; then
        return
    fi
    printf 'Installing into .venv; the first time takes a few minutes and about 2 GB\n' >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    printf '%s %s\n' "$wanted" "${installed:+$installed,}$extras" >"$stamp"
}

# includes LIST NAMES: every one of these comma-separated names is in the list.
includes() {
    local name
    for name in ${2//,/ }; do
        [[ ",$1," == *",$name,"* ]] || return 1
    done
}

# process_count [ROWS]: how many processes train here: one a GPU, else two; as many as share ROWS evenly.
process_count() {
    "$PYTHON" -c 'import sys, torch; rows = int(sys.argv[1]); most = torch.cuda.device_count() or 2
print(max(n for n in range(1, most + 1) if rows % n == 0))' "${1:-0}"
}

# Refuses a configuration in one line, before several processes would each do so.
check_config() {
    "$PYTHON" -m transfusion config "$@" >/dev/null
}
