# Sourced by the scripts here: goes to the checkout and makes sure `.venv` has what pyproject.toml
# names. Installs only when that has changed. Progress goes to stderr: llama-cpp-python compiles
# for minutes on a machine that has not built it before.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

say() { printf '%s\n' "$*" >&2; }

# $1: the dependency group to add, or nothing.
ensure_venv() {
    local want stamp=.venv/.llmster-installed group=${1:-}
    want=$(sha256sum pyproject.toml | cut -d' ' -f1)${group:+-$group}
    case $(cat "$stamp" 2>/dev/null || true) in
        "$want" | "${want%%-*}-dev") return 0 ;;
    esac
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        say "error: Python 3.11 or newer is needed; $("$PYTHON" --version 2>&1) was found"
        say "hint: PYTHON=/path/to/python3.12 $0"
        exit 1
    }
    if ! command -v cc >/dev/null && ! command -v gcc >/dev/null; then
        say "error: a C and C++ compiler is needed to build llama-cpp-python"
        say "hint: apt-get install build-essential"
        exit 1
    fi
    say "installing into .venv (the first time, llama-cpp-python compiles for 5 to 15 minutes)"
    if command -v uv >/dev/null; then
        [ -x .venv/bin/python ] || uv venv --quiet --seed --python "$PYTHON" .venv
        watch_build uv pip install --python .venv/bin/python ${group:+--group "$group"} -e .
    else
        [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
        .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
        watch_build .venv/bin/python -m pip install --quiet ${group:+--group "$group"} -e .
    fi
    # The command itself must start, or the stamp would hide a broken environment.
    .venv/bin/llmster --version >/dev/null
    printf '%s' "$want" > "$stamp"
}

# Runs an installation; says every 15 seconds that it is still going, and what compiles.
watch_build() {
    local begun=$SECONDS unit
    "$@" >&2 &
    local work=$!
    while kill -0 "$work" 2>/dev/null; do
        for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
            sleep 1
            kill -0 "$work" 2>/dev/null || break 2
        done
        unit=$(ps -eo args 2>/dev/null | grep -o '[^/ ]*\.\(cpp\|cc\|c\)\.o' | head -n 1 || true)
        say "  still installing, $((SECONDS - begun)) s${unit:+, compiling ${unit%.o}}"
    done
    wait "$work"
}
