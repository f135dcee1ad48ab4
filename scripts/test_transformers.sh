#!/usr/bin/env bash
# Run a part of the tests with other versions of transformers:  scripts/test_transformers.sh 5.16.1 5.19.0
# Each is installed, with what it needs of other versions, into a small environment on top of the tests' own.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || scripts/setup.sh "$venv" dev
site='import sysconfig; print(sysconfig.get_path("purelib"))'
for version in "$@"; do
    layer=$venv-transformers-$version
    "$venv/bin/python" -m venv --without-pip "$layer"
    below=$("$venv/bin/python" -c "$site") above=$("$layer/bin/python" -c "$site")
    echo "import site; site.addsitedir('$below')" >"$above/below.pth"
    "$venv/bin/python" -m pip --disable-pip-version-check --python "$layer/bin/python" install --quiet "transformers==$version"
    echo "transformers $version:"
    "$layer/bin/python" -m pytest -n "${PROCESSES:-2}" --dist loadfile -m "not slow" @tests/quick.txt
done
