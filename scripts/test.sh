#!/usr/bin/env bash
# Everything that must hold before a change goes in: lint, format, tests.
#   scripts/test.sh              without the slow tests
#   scripts/test.sh --all        with them
#   scripts/test.sh tests/unit/test_config.py -k nearest        other words go to pytest
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(./scripts/setup_env.sh)

select=(-m 'not slow')
words=()
for word in "$@"; do
    if [ "$word" = --all ]; then select=(); else words+=("$word"); fi
done

"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest ${select[@]+"${select[@]}"} ${words[@]+"${words[@]}"}
