"""Wanda-sp's choice, against scores of single weights on the activations themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distprune.layers.sites import ATTENDED, NEURONS
from distprune.methods.even_layers import with_heads
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons
from distprune.methods.wanda_sp import WandaSp


def wanda(weight: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """|W|·‖x‖₂ of every weight."""
    return np.abs(weight.double().numpy()) * np.linalg.norm(x.numpy(), axis=0)


def largest(scores: np.ndarray, keep: int) -> torch.Tensor:
    return torch.from_numpy(np.sort(np.argsort(scores)[len(scores) - keep :]))


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 3), (6, 3), (8, 4)])
def test_the_units_of_the_highest_scores_stay_and_stay_as_they_are(subject, query_heads, kv_heads):
    this = subject(query_heads=query_heads, kv_heads=kv_heads)
    seen = this.activations()
    of_output = wanda(this.attention.output.weight, seen[ATTENDED])
    groups = largest(np.array([part.sum() for part in np.split(of_output, kv_heads, axis=1)]), kv_heads - 1)
    neurons = largest(wanda(this.ffn.down.weight, seen[NEURONS]).sum(axis=0), 24)
    heads = heads_of_groups(groups, query_heads // kv_heads)
    expected = this.run_with(attention=keep_heads(this.attention, heads), ffn=keep_neurons(this.ffn, neurons))
    planned = with_heads(this.layer.shape, kv_heads - 1, query_heads // kv_heads).with_ffn(width=24)
    assert torch.equal(this.run(this.prune(WandaSp(), planned)), expected)


def test_neurons_without_a_gate_are_scored_alike(gateless):
    neurons = largest(wanda(gateless.ffn.down.weight, gateless.activations()[NEURONS]).sum(axis=0), 24)
    pruned = gateless.prune(WandaSp(), gateless.layer.shape.with_ffn(width=24))
    assert torch.equal(gateless.run(pruned), gateless.run_with(ffn=keep_neurons(gateless.ffn, neurons)))


def test_a_neuron_of_small_weights_is_kept_for_its_large_activations(subject):
    this, method = subject(biases=False), WandaSp()
    ffn = this.ffn
    # The same function: what the up projection gains, the down projection loses.
    scale = torch.ones(40).index_fill(0, torch.arange(0, 40, 2), 100)
    up = replace(ffn.up, weight=ffn.up.weight * scale[:, None])
    rescaled = this.changed(ffn=replace(ffn, up=up, down=replace(ffn.down, weight=ffn.down.weight / scale)))
    planned = this.layer.shape.with_ffn(width=24)
    assert torch.equal(*(each.prune(method, planned).ffn.gate.weight for each in (this, rescaled)))
