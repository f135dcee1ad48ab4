#!/usr/bin/env bash
# Install distprune with what its tests need, and run them:  scripts/test.sh [PYTEST ARGUMENTS]
# The slow ones are left out; -m slow runs those. @tests/quick.txt runs those that meet other packages most.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
scripts/setup.sh "$venv" "${EXTRA:-dev}"
# Tests that need llama.cpp are skipped where there is no wheel of it.
"$venv/bin/python" -m pip install --quiet --only-binary :all: llama-cpp-python 2>/dev/null ||
    echo "No wheel of llama-cpp-python fits this machine; with a compiler: pip install 'distprune[llama-cpp]'"
# Two at a time, in the order that tests/conftest.py gives; a file's tests share what takes long to make. Those that need
# a process or most of the machine to themselves come last.
run_tests() { "$venv/bin/python" -m pytest --durations=10 "$@"; }
if [ $# -gt 0 ]; then
    run_tests -m "not slow" "$@"
else
    two_at_a_time=(-n "${PROCESSES:-2}" --dist loadfile --no-loadscope-reorder)
    run_tests "${two_at_a_time[@]}" -m "not slow and not alone"
    run_tests "${two_at_a_time[@]}" -m "alone and not slow"
fi
