"""The plugin that the documentation shows is installed as it stands there, and prunes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_pages import ROOT, Page
from transformers import AutoModelForCausalLM

import distprune
from distprune.methods.registry import METHODS, Methods

PAGE = Page(ROOT / "docs" / "adding-a-method.md")
NAME = "quiet-neurons"


def shown(language: str) -> str:
    (block,) = (block for block in PAGE.blocks if block.language == language)
    return block.text


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Iterator[None]:
    """The module on the path, and beside it what an installation leaves of the project's file."""
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    project = tomllib.loads(shown("toml"))["project"]
    (module,) = tomllib.loads(shown("toml"))["tool"]["setuptools"]["py-modules"]
    folder = tmp_path / "site"
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    Path(folder, f"{module}.py").write_text(shown("python"))
    fields = {"Metadata-Version": "2.1", "Name": project["name"], "Version": project["version"]}
    (information / "METADATA").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    (points,) = project["entry-points"].items()
    lines = [f"[{points[0]}]", *(f"{name} = {value}" for name, value in points[1].items())]
    (information / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(METHODS, "data", Methods().data)
    yield
    sys.modules.pop(module, None)


def pruned(model: str, **options):
    distprune.prune(model, "pruned", overwrite=True, calibration="calib.arrow", device="cpu", **options)
    return AutoModelForCausalLM.from_pretrained("pruned", trust_remote_code=True)


@pytest.mark.parametrize("model", ["MODEL", "MIXTURE"])
def test_it_removes_neurons_by_entry_point(installed, here, model):
    dense = AutoModelForCausalLM.from_pretrained(model)
    record = distprune.prune(
        model, "pruned", method=NAME, sparsity=0.2, calibration="calib.arrow", device="cpu", overwrite=True
    )
    assert record.method == NAME
    assert record.decoder_sparsity == pytest.approx(0.2, abs=0.02)
    smaller = AutoModelForCausalLM.from_pretrained("pruned", trust_remote_code=True)
    assert smaller.num_parameters() < dense.num_parameters()


def test_its_option_decides_which_neurons_stay(installed, here):
    given = {"method": NAME, "sparsity": 0.2, "layout": "stock"}
    weighted, plain = (pruned("MODEL", options={"weighted": choice}, **given) for choice in (True, False))
    one, other = (model.model.layers[0].mlp.down_proj.weight for model in (weighted, plain))
    assert one.shape == other.shape and not one.equal(other)
