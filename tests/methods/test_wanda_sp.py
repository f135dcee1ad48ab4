"""Wanda-sp's choice, against scores of single weights on the activations themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons, with_heads
from distprune.methods.wanda_sp import WandaSp


def wanda(weight: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """|W|·‖x‖₂ of every weight."""
    return np.abs(weight.double().numpy()) * np.linalg.norm(x.numpy(), axis=0)


def largest(scores: np.ndarray, keep: int) -> torch.Tensor:
    return torch.from_numpy(np.sort(np.argsort(scores)[len(scores) - keep :]))


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 3), (6, 3), (8, 4)])
def test_the_units_of_the_highest_scores_stay_and_stay_as_they_are(subject, query_heads, kv_heads):
    this, method = subject(query_heads=query_heads, kv_heads=kv_heads), WandaSp()
    layer, taps = this.layer, this.activations()
    of_output = wanda(layer.output.weight, taps["attention_values"])
    groups = largest(np.array([part.sum() for part in np.split(of_output, kv_heads, axis=1)]), kv_heads - 1)
    neurons = largest(wanda(layer.down.weight, taps["ffn_neurons"]).sum(axis=0), 24)
    expected = keep_neurons(keep_heads(layer, heads_of_groups(groups, query_heads // kv_heads)), neurons)

    planned = replace(with_heads(layer.shape, kv_heads - 1, query_heads // kv_heads), ffn_width=24)
    statistics = this.statistics(method.pruning_moments(layer.shape, planned))
    pruned = method.prune(layer, planned, statistics, {}, this.observe)
    assert pruned.shape == planned
    assert torch.equal(this.run(pruned), this.run(expected))


def test_a_neuron_of_small_weights_is_kept_for_its_large_activations(subject):
    this, method = subject(biases=False), WandaSp()
    layer = this.layer
    # The same function: what the up projection gains, the down projection loses.
    scale = torch.ones(40).index_fill(0, torch.arange(0, 40, 2), 100)
    up = replace(layer.up, weight=layer.up.weight * scale[:, None])
    rescaled = replace(layer, up=up, down=replace(layer.down, weight=layer.down.weight / scale))
    planned = replace(layer.shape, ffn_width=24)
    kept = []
    for dense in (layer, rescaled):
        statistics = this.statistics(method.pruning_moments(layer.shape, planned), dense)
        kept.append(method.prune(dense, planned, statistics, {}, this.observe).gate.weight)
    assert torch.equal(*kept)
