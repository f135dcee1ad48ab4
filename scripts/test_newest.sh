#!/usr/bin/env bash
# Install the newest of everything on the newest Python, and run a part of the tests:
#   scripts/test_newest.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(scripts/find_python.sh 3.13)
export PYTHON VENV=${NEWEST_VENV:-.venv-newest} EXTRA=cluster,test
[ $# -gt 0 ] || set -- -n "${PROCESSES:-2}" --dist loadfile @tests/quick.txt
scripts/test.sh "$@"
