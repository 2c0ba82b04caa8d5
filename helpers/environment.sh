# Sourced by train.sh and tests/run.sh, from the project's root: sets PYTHON to an interpreter that has what
# requirements.txt asks for. Works with the bash 3.2 of macOS.
# shellcheck shell=bash disable=SC2034

# Stands in .venv while packages are installed, so that an interrupted set-up is completed the next time.
floydtuner_unfinished=.venv/.unfinished

# Set PYTHON to the active Python, else to that of .venv, if it has all requirements; fail otherwise.
find_python() {
    local candidate
    for candidate in python python3 .venv/bin/python; do
        if [ "$candidate" = .venv/bin/python ] && [ -e "$floydtuner_unfinished" ]; then
            continue
        fi
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" helpers/config/requirements.py requirements.txt >/dev/null 2>&1; then
            PYTHON=$candidate
            return 0
        fi
    done
    return 1
}

# Like find_python, but make or complete .venv where neither has all requirements; fail with the code of what failed.
need_python() {
    find_python && return 0
    local base candidate lacks
    if [ -e .venv/bin/python ] && ! .venv/bin/python -c "" 2>/dev/null; then
        echo "The Python of .venv does not run (was it made on another machine?): remove the folder .venv and start again." >&2
        return 1
    fi
    for candidate in python python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then
            base=$candidate
            break
        fi
    done
    if [ -z "${base:-}" ]; then
        echo "FloydTuner needs Python 3.11 or newer, and found none: install it from https://www.python.org/downloads/" >&2
        return 1
    fi
    if [ -e .venv/bin/python ]; then
        lacks=$(.venv/bin/python helpers/config/requirements.py requirements.txt 2>&1 | head -n 3)
        echo "Completing the Python environment in $PWD/.venv (${lacks:-its set-up was interrupted})." >&2
    else
        echo "The active Python lacks some of requirements.txt: making an environment of its own in $PWD/.venv." >&2
    fi
    echo "This is done once; it downloads PyTorch and takes some minutes." >&2
    mkdir -p .venv && : >"$floydtuner_unfinished" || return
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$base" -m venv .venv || return
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt >&2 || return
    rm -f "$floydtuner_unfinished"
    PYTHON=.venv/bin/python
}
