#!/usr/bin/env bash
# See that distprune is right and fast on this machine's GPU, in ten minutes and without internet:
#     [WHEELS=FOLDER] scripts/gpu_check.sh [--out FOLDER] [--parts correctness layers ...]
# It takes the packages that are installed, and from the folder WHEELS those that are not. Needs a CUDA GPU of 40 GB or
# more; `--device cpu` tries the script itself, at a small size.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    for wheel in "$WHEELS"/*.whl; do
        name=$(basename "$wheel" | cut -d- -f1)
        "$python" -m pip show --quiet "$name" >/dev/null 2>&1 && continue
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheel"
    done
    export PYTHONPATH=$PYTHONPATH:$site
fi
"$python" scripts/gpu_check.py "$@"
