#!/usr/bin/env bash
# Finds or makes a Python environment in .venv, installs the portal's packages there, and hands over to
# `python -m app.cli`, which does everything else. Try: ./setup_llm.sh --help
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
requirements=$root/backend/requirements.txt
stamp=$venv/requirements.stamp

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local name
    for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null && is_new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "Prompt Portal needs Python 3.11 or newer, and none was found. To get one:" \
        "  Debian, Ubuntu:  sudo apt install python3 python3-venv" \
        "  Fedora:          sudo dnf install python3" \
        "  macOS:           brew install python" \
        "then run this again."
}

make_venv() {
    local python
    python=$(find_python)
    echo "Making a Python environment in .venv ($("$python" --version)) ..."
    "$python" -m venv --clear "$venv" || fail \
        "The environment could not be made. On Debian and Ubuntu its part of Python is a package of its own:" \
        "  sudo apt install python3-venv" \
        "Otherwise look at the message above: often the disk is full or the folder is not writable."
}

install_requirements() {
    local wanted
    wanted=$(cksum <"$requirements")
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    echo "Installing the portal's packages (once, about half a minute) ..."
    local quiet=--quiet
    [[ -t 1 ]] && quiet=--progress-bar=on
    "$venv/bin/python" -m pip install --disable-pip-version-check "$quiet" --requirement "$requirements" || fail \
        "The packages could not be installed; the message above says why. Without a network, or behind a" \
        "proxy or mirror, set https_proxy or PIP_INDEX_URL and run this again."
    echo "$wanted" >"$stamp"
}

# Without pip it is what an attempt left that broke off.
has_pip() {
    [[ -f $stamp ]] || "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

if ! { [[ -x $venv/bin/python ]] && is_new_enough "$venv/bin/python" && has_pip; }; then
    make_venv
fi
install_requirements
PYTHONPATH=$root/backend exec "$venv/bin/python" -m app.cli "$@"
