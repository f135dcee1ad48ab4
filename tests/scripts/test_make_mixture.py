"""Mixtures of experts that are made of dense models."""

from __future__ import annotations

import pytest
import torch
from make_mixture import assign_evenly, cluster, distill, empty_mixture, save, split
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM

from distprune.errors import InputError


@pytest.fixture(scope="module")
def dense(dense_path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(dense_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(dense) -> torch.Tensor:
    return torch.randint(dense.config.vocab_size, (16, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_with_all_experts_active_and_equal_it_predicts_what_the_dense_model_does(dense, windows, tmp_path, dense_path):
    mixture = empty_mixture(dense, experts=4, active=4)
    split(dense, mixture, windows, seed=0, spread=0.0)
    save(mixture, dense_path, tmp_path / "mixture")
    opened = MixtralForCausalLM.from_pretrained(tmp_path / "mixture")
    torch.testing.assert_close(opened(windows).logits, dense(windows).logits, rtol=1e-4, atol=1e-4)


def test_each_neuron_is_in_one_expert(dense, windows):
    mixture = empty_mixture(dense, experts=4, active=2)
    split(dense, mixture, windows, seed=0)
    for old, new in zip(dense.model.layers, mixture.model.layers, strict=True):
        gates, ups = new.mlp.experts.gate_up_proj.chunk(2, dim=1)
        of_the_dense = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight], dim=1)
        of_experts = torch.cat([gates.flatten(0, 1), ups.flatten(0, 1)], dim=1)
        assert torch.equal(of_experts.unique(dim=0), of_the_dense.unique(dim=0))


def test_neurons_that_are_active_together_are_clustered():
    random = torch.Generator().manual_seed(0)
    planted = torch.randperm(24, generator=random) % 4
    active = torch.rand(200, 4, generator=random).topk(2, dim=1).indices
    energy = torch.zeros(200, 4).scatter(1, active, 1.0)[:, planted] + 0.1 * torch.rand(200, 24, generator=random)
    found = cluster(energy, experts=4, active=2, seed=0)
    assert {tuple((found == expert).tolist()) for expert in range(4)} == {
        tuple((planted == expert).tolist()) for expert in range(4)
    }


def test_columns_get_equally_many_rows_and_those_that_gain_most():
    gain = torch.tensor([[9.0, 1.0], [8.0, 0.0], [7.0, 6.0], [5.0, 5.5]])
    assert assign_evenly(gain).tolist() == [0, 0, 1, 1]


def test_distillation_brings_its_predictions_nearer_to_the_dense_model_s(dense, windows):
    mixture = empty_mixture(dense, experts=4, active=2)
    split(dense, mixture, windows, seed=0)
    first = divergence(dense, mixture, windows)
    distill(dense, mixture, windows, steps=20)
    assert divergence(dense, mixture, windows) < first


def test_distillation_ends_with_its_minutes(dense, windows):
    mixture = empty_mixture(dense, experts=4, active=2)
    split(dense, mixture, windows, seed=0)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    distill(dense, mixture, windows, steps=10**9, minutes=0.001)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())


@pytest.mark.parametrize(("experts", "active", "said"), [(5, 2, "--experts 5"), (4, 5, "--active 5")])
def test_impossible_numbers_of_experts_are_refused(dense, experts, active, said):
    with pytest.raises(InputError, match=said):
        empty_mixture(dense, experts, active)


@torch.no_grad()
def divergence(dense: LlamaForCausalLM, mixture: MixtralForCausalLM, windows: torch.Tensor) -> float:
    expected, got = (model(windows).logits.log_softmax(-1) for model in (dense, mixture))
    return (expected.exp() * (expected - got)).sum(-1).mean().item()
