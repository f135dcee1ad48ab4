#!/usr/bin/env bash
# Install distprune with what its tests need, and run them:  scripts/test.sh [PYTEST ARGUMENTS]
# The slow ones are left out; -m slow runs those.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
scripts/setup.sh "$venv" dev
# A file's tests stay together: they share what takes long to make.
exec "$venv/bin/python" -m pytest -n "${PROCESSES:-2}" --dist loadfile --durations=10 -m "not slow" "$@"
