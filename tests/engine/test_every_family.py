"""Whole runs over a random model of every family: what pruning doesn't touch is on disk as it was, under its name."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES
from transformers import AutoConfig

from distprune.layers.architecture import Architecture

#: Those of the tests' tokenizer stand in for them.
OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id")


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, save_model):
    sizes = {name: value for name, value in FAMILIES[request.param].items() if name not in OF_THE_TOKENIZER}
    return save_model(request.param, **sizes)


def test_at_sparsity_0_every_tensor_is_as_it_was(model, prune_here, tmp_path):
    record = prune_here(tmp_path / "pruned", model, method="magnitude", sparsity=0, distill=None)
    before, after = stored(model), stored(tmp_path / "pruned")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record.layout == "stock"


def test_what_pruning_does_not_know_is_as_it_was(model, prune_here, tmp_path):
    record = prune_here(tmp_path / "pruned", model, method="llm-pruner", sparsity=0.1, distill=None)
    assert record.decoder_sparsity == pytest.approx(0.1, abs=0.04)
    before, after = stored(model), stored(tmp_path / "pruned")
    assert before.keys() == after.keys()
    architecture = Architecture(AutoConfig.from_pretrained(model))
    untouched = {*architecture.outer_tensors()}
    for index in range(architecture.num_layers):
        untouched |= {architecture.layer_prefix(index) + name for name in architecture.rest_tensors(index)}
    assert all(torch.equal(before[name], after[name]) for name in untouched & before.keys())


@pytest.mark.parametrize("objective", ["layers", "logits"])
def test_it_is_distilled(model, prune_here, tmp_path, objective):
    distill = {"objective": objective, "batch": 2, "learning_rate": 1e-4}
    record = prune_here(tmp_path / "pruned", model, method="wanda-sp", sparsity=0.1, distill=distill)
    for layer in record.layers:
        report = layer.distillation
        losses = [*report.training, report.held_out_before, report.held_out_after]
        assert report.training and all(map(math.isfinite, losses))
