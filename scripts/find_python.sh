#!/usr/bin/env bash
# Print the path of a Python of the given version, such as 3.10, from PATH or from pyenv's folder.
set -euo pipefail
for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if found=$("$python" -c 'import sys; print(sys.executable)' 2>/dev/null); then
        echo "$found"
        exit
    fi
done
echo "There is no Python $1 here. Install it (apt-get install python$1-venv, or pyenv install $1)." >&2
exit 1
