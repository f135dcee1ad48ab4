"""Models of random weights that are made for measurements."""

from __future__ import annotations

import pytest
import torch
from random_model import config_of, make_calibration, make_model, random_pruned
from tiny_families import tiny_config
from transformers import AutoModelForCausalLM

from distprune.budgets import Target, decoder_parameters, outer_parameters
from distprune.layers.architecture import Architecture
from distprune.methods import make_method


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_neox", "llama", "opt", "phi3", "qwen3_5_text"])
def test_transformers_finds_every_tensor_and_predicts_unevenly(model_type, tmp_path):
    make_model(tmp_path, tiny_config(model_type), dtype=torch.float32, gain=1.5)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    tokens = torch.from_numpy(make_calibration(tmp_path / "calibration.arrow", tmp_path, 2, 16)).long()
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.1


@pytest.mark.parametrize("layout", ["free", "heterogeneous", "stock"])
def test_a_pruned_one_has_the_parameters_that_its_shapes_count(layout):
    architecture = Architecture(config_of("tiny"))
    target = Target(architecture, 0.3, layout=layout)
    shapes = make_method("curvature", {}).even_shapes(target, 8)
    model = random_pruned(architecture, shapes, dtype=torch.bfloat16, device="cpu")
    counted = decoder_parameters(architecture, shapes) + outer_parameters(architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) == counted < 0.9 * architecture_size(architecture)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(torch.arange(32).view(2, 16)).logits.isfinite().all()


def architecture_size(architecture: Architecture) -> int:
    """The parameters of the dense model."""
    return sum(parameter.numel() for parameter in architecture.model.parameters())
