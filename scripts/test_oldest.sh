#!/usr/bin/env bash
# Install the oldest of everything that pyproject.toml allows, on the oldest Python, and run a part of the tests:
#   scripts/test_oldest.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/find_python.sh 3.10)
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
"$python" scripts/oldest.py >"$constraints"
export PYTHON=$python VENV=${OLDEST_VENV:-.venv-oldest} EXTRA=cluster,test PIP_CONSTRAINT=$constraints
TORCH_VERSION=$(sed -n 's/^torch==//p' "$constraints")
export TORCH_VERSION
if [ $# -eq 0 ]; then
    set -- -n "${PROCESSES:-2}" --dist loadfile @tests/quick.txt tests/solvers tests/calibration tests/test_config.py
fi
scripts/test.sh "$@"
