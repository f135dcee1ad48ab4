"""The house rules that a test can check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from dotted_names import Names

import distprune

PACKAGE = Path(distprune.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")])


def test_imports_point_one_way():
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


# Modules that pickle, besides all whose names say so, and functions that do by default.
PICKLERS = {"dill", "joblib", "jsonpickle", "marshal", "shelve"}
PICKLING = {
    *("torch.load", "torch.save", "torch.serialization", "torch.package", "torch.jit.load", "torch.jit.save"),
    *("numpy.load", "numpy.save", "numpy.savez", "numpy.savez_compressed"),
}


def pickling(code: str) -> set[str]:
    """The names in it that have to do with pickling."""

    def pickles(name: str) -> bool:
        return (
            "pickle" in name.lower()
            or bool(PICKLERS & set(name.split(".")))
            or any(f"{name}.".startswith(f"{function}.") for function in PICKLING)
        )

    return set(filter(pickles, Names(code).found))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_pickled(file):
    assert not pickling(file.read_text())


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p",
        "import os, _pickle",
        "import ray.cloudpickle as c",
        "from ray import cloudpickle",
        "from ray import cloudpickle as c",
        "from ray.cloudpickle import dumps",
        "from ray._private.serialization import pickle_dumps",
        "import ray\nray.cloudpickle.dumps(1)",
        "def f():\n    from joblib import dump",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module as i\ni('ray.cloudpickle')",
        "from importlib import import_module\nimport_module('pic' + 'kle')",
        "p = __import__('dill')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save(1, 'x')",
        "from torch import load as read",
        "from torch.serialization import load",
        "import torch\nt = torch\nread = t.load",
        "import torch\nread = getattr(torch, 'load')",
        "def f():\n    return t.load('x')\nimport torch as t",
        "import numpy as np\nnp.load('x')",
        "from numpy import savez_compressed",
        "import pandas as pd\npd.read_pickle('x')",
        "f().to_pickle('x')",
    ],
)
def test_pickling_is_seen_however_it_is_spelled(code):
    assert pickling(code)


@pytest.mark.parametrize(
    "code",
    [
        '"""Nothing is pickled."""',
        "import json\njson.load(x)",
        "from safetensors.torch import load, save",
        "model.load()",
    ],
)
def test_what_only_looks_like_pickling_is_let_through(code):
    assert not pickling(code)


def test_importing_distprune_starts_neither_ray_nor_a_download():
    code = "import sys, distprune; print('ray' in sys.modules, 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_mathematics_and_layers_are_typed_strictly():
    pytest.importorskip("mypy", reason="mypy is not installed")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_file_name_occurs_once():
    names = [file.name for file in PACKAGE.rglob("*.py") if file.name not in ("__init__.py", "__main__.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
