"""What a method can plan for, and what it refuses before a weight is read."""

from __future__ import annotations

import pytest

from distprune.budgets import RESOURCES, Target, decoder_parameters, is_stock
from distprune.errors import InputError
from distprune.methods import METHODS
from distprune.modeling import PrunedConfig

STOCK = [name for name, method in METHODS.items() if "stock" in method.layouts]


@pytest.fixture(scope="module")
def config() -> PrunedConfig:
    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    return PrunedConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, head_dim=8)


@pytest.mark.parametrize("name", METHODS)
def test_a_resource_or_layout_that_a_method_does_not_offer_is_refused(config, name):
    method = METHODS[name]()
    for resource in RESOURCES:
        target = Target(config, 0.2, resource=resource)
        if resource in method.targets:
            method.check_target(target, 8)
        else:
            with pytest.raises(InputError, match=rf"--target {resource}: method {name} .*give --target parameters"):
                method.check_target(target, 8)
    if name not in STOCK:
        with pytest.raises(
            InputError, match=rf"--layout stock: method {name} .*methods .*magnitude.*--layout per-layer"
        ):
            method.check_target(Target(config, 0.2, stock=True), 8)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.45])
@pytest.mark.parametrize("name", ["magnitude", "wanda-sp"])
def test_a_stock_plan_is_one_that_the_original_architecture_can_have(config, name, sparsity):
    """Of eight heads 10% would leave seven, which don't divide the hidden size of 48."""
    assert name in STOCK
    target, method = Target(config, sparsity, stock=True), METHODS[name]()
    method.check_target(target, 8)
    plan = method.plan(target, (), 8)
    assert is_stock(config, plan)
    step = 3 * 8 * config.hidden_size
    assert abs(decoder_parameters(config, plan) - target.remaining) <= len(plan) * step / 2
