"""Print pip constraints for the oldest version of everything that pyproject.toml asks for."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def main() -> None:
    for requirement in sorted({*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())}):
        if bound := re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement):
            print("{}=={}".format(*bound.groups()))


if __name__ == "__main__":
    main()
