"""Scripts are run by hand, and rarely: that each still fits the package is seen here."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from distprune.methods import make_method

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize("name", sorted(file.stem for file in SCRIPTS.glob("*.py")))
def test_it_is_imported(name):
    import_module(name)


def test_the_ablations_of_the_benchmark_are_options_of_their_methods():
    for method, variants in import_module("benchmark").ABLATIONS.items():
        for variant in variants.values():
            make_method(method, variant.get("options", {}))


@pytest.mark.parametrize(
    "file", [ROOT / "tests" / "quick.txt", *sorted(SCRIPTS.glob("*.sh"))], ids=lambda file: file.name
)
def test_the_tests_that_are_chosen_are_there(file):
    chosen = re.findall(r"\btests/[\w/.]+", file.read_text())
    assert not [name for name in chosen if not (ROOT / name).exists()]
