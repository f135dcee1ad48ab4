"""The notebooks run from beginning to end, and hold nothing of the machine that they were written on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from smollm2 import bundled_smollm2

import distprune

nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient

ROOT = Path(distprune.__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "prune_smollm2.ipynb"


def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: Any):
    """Run the notebook in a folder, some parameters in its cell for them replaced; returns it with its outputs."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    replaced = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(replaced))
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def outputs_of(notebook, code: str) -> str:
    """All text that the cell with that code has put out."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source)
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def check(notebook, folder: Path) -> None:
    """See that progress was shown, and that the results are in the model card."""
    pruning = outputs_of(notebook, "distprune.prune(")
    assert "Pruning" in pruning and "decoder layers' parameters are gone" in pruning
    assert "perplexity" in outputs_of(notebook, "distprune.evaluate(")
    assert outputs_of(notebook, "generate(").strip()
    assert "| perplexity |" in (folder / "smollm2-pruned" / "README.md").read_text()


def test_a_stored_notebook_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_the_notebook_runs_with_a_tiny_model(dense_path, tmp_path, monkeypatch):
    notebook = execute(tmp_path, monkeypatch, MODEL=str(dense_path), SAMPLES=8, SEQUENCE_LENGTH=16)
    check(notebook, tmp_path)


@pytest.mark.slow
def test_the_notebook_runs_with_smollm2(tmp_path, monkeypatch):
    notebook = execute(tmp_path, monkeypatch, MODEL=str(bundled_smollm2()), SAMPLES=8, SEQUENCE_LENGTH=64)
    check(notebook, tmp_path)
