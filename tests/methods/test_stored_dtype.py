"""Methods are given a layer as the checkpoint stores it, and compute with it in float32."""

from __future__ import annotations

import pytest
import torch

from distprune.budgets import Target
from distprune.decoder_layer import state_of
from distprune.methods import METHODS


@pytest.mark.filterwarnings("ignore::distprune.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", METHODS)
def test_a_layer_in_bfloat16_is_pruned_like_the_same_weights_in_float32(subject, name):
    this, method = subject(biases=False, num_hidden_layers=2), METHODS[name]()
    stored = this.layer.to(torch.bfloat16)
    target = Target(this.config, 0.3)

    def pruned(layer) -> dict[str, torch.Tensor]:
        profile = method.profile(
            layer, this.observe(layer, [*method.dense_moments(layer.shape), *method.gradient_moments(layer.shape)])
        )
        planned = method.plan(target, [profile, profile], align=1)[0]
        statistics = this.observe(layer, method.pruning_moments(layer.shape, planned))
        return state_of(method.prune(layer, planned, statistics, profile, this.observe).to(torch.bfloat16))

    before = {name: tensor.clone() for name, tensor in state_of(stored).items()}
    half, single = pruned(stored), pruned(stored.to(torch.float32))
    assert half.keys() == single.keys()
    for tensor in half:
        torch.testing.assert_close(half[tensor], single[tensor])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(stored).items())
