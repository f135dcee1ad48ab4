"""The script that distprune is measured with: Olica written once more, from a whole model and full decompositions."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from distprune import load

SCRIPT = Path(__file__).parents[2] / "scripts" / "single_process.py"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("propagation", ["1", "full"])
def test_one_ordinary_process_and_distprune_make_the_same_model(
    run, dense_path, calibration_path, tmp_path, monkeypatch, propagation
):
    ours, _ = run(sparsity=0.3, propagation=propagation, calibration=calibration_path)
    options = {"--calibration": calibration_path, "--output": tmp_path, "--propagation": propagation, "--threads": 1}
    arguments = [str(SCRIPT), str(dense_path), *(str(part) for option in options.items() for part in option)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(SCRIPT), run_name="__main__")

    tokens = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense, mine, theirs = (load(folder)(tokens).logits for folder in (dense_path, ours, tmp_path))
    # Bases differ, and with them every tensor, but not what the model computes.
    assert (mine - theirs).norm() < 1e-3 * (mine - dense).norm()
