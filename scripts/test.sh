#!/usr/bin/env bash
# Install distprune with what its tests need, and run them:  scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
scripts/setup.sh "$venv" dev
exec "$venv/bin/python" -m pytest --durations=10 "$@"
