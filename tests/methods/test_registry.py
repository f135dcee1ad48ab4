"""Methods that other distributions bring by an entry point."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distprune.errors import InputError
from distprune.methods.registry import BUILT_IN, Methods

CODE = """
from distprune.methods import Method

class Nothing(Method):
    name = "nothing"

class Impostor:
    pass
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution on the path, whose entry points are given, beside a module that has a method."""

    def put(distribution: str = "acme-pruning", **points: str) -> Methods:
        folder = tmp_path / distribution
        information = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name.replace('_', '-')} = {value}" for name, value in points.items()]
        (information / "entry_points.txt").write_text("\n".join(["[distprune.methods]", *lines, ""]))
        Path(folder, "acme_method.py").write_text(CODE)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "acme_method", raising=False)
        return Methods()

    return put


def test_without_plugins_there_are_our_own():
    assert set(Methods()) == set(BUILT_IN)
    assert all(Methods()[name].name == name for name in BUILT_IN)


def test_a_plugins_method_is_found_beside_ours(install):
    methods = install(nothing="acme_method:Nothing")
    assert set(methods) == {*BUILT_IN, "nothing"}
    assert methods["nothing"].__module__ == "acme_method"


def test_a_plugin_is_not_imported_before_it_is_asked_for(install):
    methods = install(nothing="acme_method:Nothing", broken="acme_missing:Method")
    assert "broken" in methods and methods["flap"].name == "flap"
    assert "acme_method" not in sys.modules
    with pytest.raises(InputError, match=r"method 'broken' of the package acme-pruning: acme_missing:Method can't be"):
        methods["broken"]


def test_a_name_that_is_taken_is_an_error_that_names_both_packages(install):
    with pytest.raises(InputError, match=r"a method called 'flap': distprune and acme-pruning.*Uninstall one"):
        list(install(flap="acme_method:Nothing"))


def test_two_plugins_of_one_name_are_an_error_too(install):
    install(nothing="acme_method:Nothing")
    with pytest.raises(InputError, match=r"a method called 'nothing': .*other-pruning"):
        list(install("other-pruning", nothing="acme_method:Impostor"))


@pytest.mark.parametrize("value", ["acme_method:Impostor", "acme_method:Absent"])
def test_an_entry_point_that_is_no_method_is_named(install, value):
    with pytest.raises(InputError, match=rf"method 'nothing' of the package acme-pruning: {value}"):
        install(nothing=value)["nothing"]


def test_our_own_entry_points_are_those_that_the_code_lists():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in Python 3.11")
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["distprune.methods"] == BUILT_IN
