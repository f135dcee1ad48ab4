"""Methods are given a layer as the checkpoint stores it, and compute with it in float32."""

from __future__ import annotations

import pytest
import torch
from kinds_of_methods import OF_ALL_MODELS

from distprune.budgets import Target
from distprune.methods import METHODS


@pytest.mark.filterwarnings("ignore::distprune.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", OF_ALL_MODELS)
def test_a_layer_in_bfloat16_is_pruned_like_the_same_weights_in_float32(subject, name):
    this, method = subject(biases=False, layers=2), METHODS[name]()
    stored, state_of = this.layer.to(torch.bfloat16), this.model.names(0).state_of
    target = Target(this.model, 0.3)

    def pruned(layer) -> dict[str, torch.Tensor]:
        profile = this.profile(method, layer)
        planned = method.plan(target, [profile, profile], align=1)[0]
        return state_of(this.prune(method, planned, profile, layer).to(torch.bfloat16))

    before = {name: tensor.clone() for name, tensor in state_of(stored).items()}
    half, single = pruned(stored), pruned(stored.to(torch.float32))
    assert half.keys() == single.keys()
    for tensor in half:
        torch.testing.assert_close(half[tensor], single[tensor])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(stored).items())
