"""A run without Ray, which the GPU check measures and compares: its tasks are those of the engine."""

from __future__ import annotations

import pytest
import torch
from in_process import InProcess
from safetensors.torch import load_file

from distprune.calibration import open_calibration
from distprune.config import PruneConfig


@pytest.mark.parametrize(
    "options",
    [
        {"method": "curvature"},
        {"method": "olica", "propagation": 2},
        {"method": "flop", "options": {"steps": 3}},
        {"method": "magnitude", "distill": {"learning_rate": 1e-3}},
    ],
    ids=str,
)
def test_it_gives_the_tensors_of_a_run(run, dense_path, calibration_path, tmp_path, options):
    options = {"sparsity": 0.3, "calibration": calibration_path, "micro_batch": 3, **options}
    output, _ = run(**options)
    config = PruneConfig(model=str(dense_path), output=tmp_path / "none", **options)
    here = InProcess(config, dense_path, torch.device("cpu"))
    result = here.prune(open_calibration(calibration_path).tokens)

    stored = {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for index, layer in enumerate(result.layers):
        for name, tensor in here.model.to_disk(index, layer).items():
            assert torch.equal(tensor, stored.pop(name)), name
    assert not [name for name in stored if ".layers." in name]
