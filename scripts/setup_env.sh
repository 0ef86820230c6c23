#!/usr/bin/env bash
# Makes .venv from pyproject.toml where it is missing or out of date, telling its progress on stderr,
# and prints the Python to use on stdout:   python=$(scripts/setup_env.sh)
#
#   TITAN_PYTHON   the Python to make .venv with (default python3; 3.11 or newer)
#   TITAN_NO_VENV  1: make nothing, use TITAN_PYTHON as it is (machines that bring their own torch)
#
# Safe to interrupt and to call twice at once: .venv/unfinished, which holds the stamp-to-be, is there
# from before the first change and becomes .venv/stamp by one rename after the last; what was left
# unfinished is rebuilt, and a second caller waits for the first.
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
import sys, tomllib
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
    from packaging.version import Version
except ImportError:  # pip carries a copy
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.version import Version

for text in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    requirement = Requirement(text)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        print(text)
        continue
    # Vendors call their build of 2.11 something like 2.11.0a0+1234.
    if not requirement.specifier.contains(Version(found).base_version):
        print(f"{text} (has {found})")
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
is_ready() { [ ! -e "$venv/unfinished" ] && [ "$(cat "$venv/stamp" 2>/dev/null)" = "$wanted" ]; }

build() {
    local began=$SECONDS torch rebuild=
    if [ -e "$venv/unfinished" ] || ! "$venv/bin/python" -c "$is_recent" 2>/dev/null; then
        rebuild=1
    fi
    mkdir -p "$venv"
    printf '%s\n' "$wanted" >"$venv/unfinished"
    if [ "$rebuild" ]; then # the mark stays: a kill half-way through must not leave half a .venv
        find "$venv/" -mindepth 1 -maxdepth 1 ! -name unfinished -exec rm -rf {} +
    fi
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

    mv "$venv/unfinished" "$venv/stamp"
    say "done in $((SECONDS - began)) s"
}

if ! is_ready; then
    # Beside .venv, which may be removed; opened for writing, without which NFS locks nothing. Where
    # there is no flock (macOS), a second caller at the same time is not kept out.
    exec 9>"$root/.venv.lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another process is setting up .venv, waiting for it"
        flock 9
    fi
    is_ready || build
    exec 9>&-
fi
printf '%s\n' "$venv/bin/python"
