#!/usr/bin/env bash
# Makes .venv from pyproject.toml where it is missing or out of date, telling its progress on stderr,
# and prints the Python to use on stdout:   python=$(scripts/setup_env.sh)
#
#   TITAN_PYTHON   the Python to make .venv with (default python3; 3.11 or newer)
#   TITAN_NO_VENV  1: make nothing, use TITAN_PYTHON as it is (machines that bring their own torch)
#
# Safe to interrupt and to call twice at once: the stamp is written last, an unfinished .venv is
# rebuilt, and a second caller waits for the first.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=${TITAN_PYTHON:-python3}

say() { printf 'set-up: %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

command -v "$python" >/dev/null || die "$python: no such command; TITAN_PYTHON names a Python >= 3.11"
is_recent='import sys; sys.exit(sys.version_info < (3, 11))'
"$python" -c "$is_recent" ||
    die "titan_vlm needs Python >= 3.11, but $python is $("$python" -V 2>&1); set TITAN_PYTHON"

if [ "${TITAN_NO_VENV:-0}" = 1 ]; then
    missing=$("$python" - "$root/pyproject.toml" <<'PY'
import re, sys, tomllib
from importlib.metadata import PackageNotFoundError, version

for requirement in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    name = re.match(r"[\w.-]+", requirement)[0]
    try:
        version(name)
    except PackageNotFoundError:
        print(requirement)
PY
    )
    [ -z "$missing" ] || die "TITAN_NO_VENV=1, but $python lacks:" $missing
    command -v "$python"
    exit
fi

# The place counts too: scripts and the editable install of a .venv that was moved point elsewhere.
wanted=$("$python" - "$root" <<'PY'
import hashlib, sys
root = sys.argv[1]
print(hashlib.sha256(root.encode() + open(f"{root}/pyproject.toml", "rb").read()).hexdigest())
PY
)
is_ready() { [ "$(cat "$venv/stamp" 2>/dev/null)" = "$wanted" ]; }

build() {
    local began=$SECONDS torch
    if [ -e "$venv/unfinished" ] || ! "$venv/bin/python" -c "$is_recent" 2>/dev/null; then
        rm -rf "$venv"
    fi
    mkdir -p "$venv"
    touch "$venv/unfinished"
    if [ ! -e "$venv/bin/python" ]; then
        say "1/3 making .venv with $("$python" -V)"
        "$python" -m venv "$venv" >&2 ||
            die "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
    else
        say "1/3 pyproject.toml changed, updating .venv"
    fi

    # torch first, so that no other package chooses which build of it comes.
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then torch='torch>=2.11'; else torch=torch==2.13.0; fi
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    say "2/3 installing $torch (the largest part, some minutes)"
    "$venv/bin/python" -m pip install "$torch" >&2 ||
        die "installing $torch failed, pip says why above; the same command tries again"
    say "3/3 installing titan_vlm and the rest"
    "$venv/bin/python" -m pip install -e "$root[dev]" >&2 ||
        die "installing titan_vlm failed, pip says why above; the same command tries again"

    printf '%s\n' "$wanted" >"$venv/stamp"
    rm "$venv/unfinished"
    say "done in $((SECONDS - began)) s"
}

if ! is_ready; then
    # The lock is on pyproject.toml itself: .venv may be removed. Where there is no flock (macOS), a
    # second caller at the same time is not kept out.
    exec 9<"$root/pyproject.toml"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another process is setting up .venv, waiting for it"
        flock 9
    fi
    is_ready || build
    exec 9<&-
fi
printf '%s\n' "$venv/bin/python"
