"""What a method can plan for, and what it refuses before a weight is read."""

from __future__ import annotations

import pytest
from kinds_of_methods import ALL_LAYERS, OF_ALL_MODELS
from latency_tables import made_up_table
from tiny_architectures import tiny

from distprune.budgets import RESOURCES, Target, decoder_parameters, is_heterogeneous, is_stock
from distprune.errors import InputError
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import FeedForwardShape, Removable
from distprune.methods import METHODS

STOCK = [name for name in OF_ALL_MODELS if "stock" in METHODS[name].layouts]
HETEROGENEOUS = [name for name in OF_ALL_MODELS if "heterogeneous" in METHODS[name].layouts]
#: Options with which a method's plans say nothing that a plain layout can't.
OPTIONS = {"flap": {"compensation": False}}


@pytest.fixture(scope="module")
def model() -> Architecture:
    return tiny(hidden_size=48, num_attention_heads=8, num_key_value_heads=8)


def method_of(name: str):
    return METHODS[name](**OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", OF_ALL_MODELS)
def test_a_resource_that_a_method_does_not_offer_is_refused(model, name):
    method = METHODS[name]()
    for resource in RESOURCES:
        target = Target(model, 0.2, resource=resource, latencies=made_up_table(model))
        if resource in method.targets:
            method.check_target(target, 8)
        else:
            with pytest.raises(InputError, match=rf"--target {resource}: method {name} .*give --target parameters"):
                method.check_target(target, 8)


@pytest.mark.parametrize("name", OF_ALL_MODELS)
def test_a_layout_that_a_method_does_not_offer_is_refused_with_those_that_do(model, name):
    for layout in ("free", "heterogeneous", "stock"):
        target = Target(model, 0.2, layout=layout)
        if layout in METHODS[name].layouts:
            method_of(name).check_target(target, 8)
        else:
            advice = rf"--layout {layout}: method {name} .*methods .*magnitude.*give --layout free"
            with pytest.raises(InputError, match=advice):
                method_of(name).check_target(target, 8)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.45])
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_plan_is_one_that_the_original_architecture_can_have(model, name, sparsity):
    """Of eight heads 10% would leave seven, which don't divide the hidden size of 48."""
    target, method = Target(model, sparsity, layout="stock"), method_of(name)
    plan = method.even_shapes(target, 8)
    assert is_stock(model, plan)
    step = 3 * 8 * model.hidden_size
    assert abs(decoder_parameters(model, plan) - target.remaining) <= len(plan) * step / 2


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.45])
@pytest.mark.parametrize("name", HETEROGENEOUS)
def test_a_heterogeneous_plan_has_lost_heads_and_neurons_alone(name, sparsity):
    for model in (tiny(), tiny("qwen2"), tiny("nemotron")):
        target, method = Target(model, sparsity, layout="heterogeneous"), method_of(name)
        plan = method.even_shapes(target, 8)
        assert is_heterogeneous(model, plan)
        assert abs(decoder_parameters(model, plan) - target.remaining) <= 3 * 8 * model.hidden_size


def test_layers_that_differ_have_no_stock_layout():
    model = tiny(num_hidden_layers=3)

    class Growing:
        """Each layer's FFN is wider than the one before."""

        def __getattr__(self, name):
            return getattr(model, name)

        def dense_shape(self, index):
            return model.dense_shape(index).with_ffn(width=96 + 8 * index)

        def kind(self, index):
            return index

    for name in STOCK:
        with pytest.raises(InputError, match=r"--layout stock: the layers of this llama model differ.*heterogeneous"):
            METHODS[name]().check_target(Target(Growing(), 0.2, layout="stock"), 8)


@pytest.mark.parametrize("name", OF_ALL_MODELS)
def test_a_model_from_which_nothing_can_go_that_the_method_removes_is_refused_once(name):
    model = tiny(num_hidden_layers=2)

    class Rigid:
        """A family that gives up nothing, or but its rotary pairs."""

        def __init__(self, **removable):
            self._removable = Removable(**removable)

        def __getattr__(self, name):
            return getattr(model, name)

        def removable(self, index):
            return self._removable

    nothing = Target(Rigid(), 0.2)
    with pytest.raises(InputError, match=rf"method {name} removes .* llama model in the layout free.*No other"):
        METHODS[name]().check_target(nothing, 8)
    METHODS[name]().check_target(Target(Rigid(), 0.0), 8)
    if name != "curvature":
        with pytest.raises(InputError, match=rf"method {name} removes .*Choose one of the methods curvature\."):
            METHODS[name]().check_target(Target(Rigid(pairs=True), 0.2), 8)


@pytest.mark.parametrize("name", OF_ALL_MODELS)
@pytest.mark.parametrize("family", ["gpt_neox", "deepseek_v3", "opt", "qwen3", "starcoder2", "mixtral"])
def test_what_a_family_can_not_lose_stays_in_every_methods_plan(name, family):
    """Where heads can't go the FFNs pay, and what a layer lacks is left alone."""
    model = tiny(family, num_hidden_layers=4)
    dense = [model.dense_shape(index) for index in range(4)]
    prunable = sum(
        Target(model, 0).ffn_amount(index, shape.ffn) + Target(model, 0).attention_amount(index, shape.attention)
        for index, shape in enumerate(dense)
    )
    sparsity = 0.15 * prunable / Target(model, 0).dense
    method = METHODS[name](**ALL_LAYERS.get(name, {}))
    target = Target(model, sparsity)
    plan = method.even_shapes(target, 1)
    assert target.amount(plan) <= target.remaining + 2 * 3 * 96
    for index, (before, after) in enumerate(zip(dense, plan, strict=True)):
        removable = target.removable(index)
        assert before.attention or not after.attention
        assert before.ffn or not after.ffn
        if after.attention and not removable.heads:
            assert after.attention.kv_heads == before.attention.kv_heads
        if after.attention and not removable.pairs:
            assert after.attention.query_key_dim == before.attention.query_key_dim
        if isinstance(after.ffn, FeedForwardShape) and not removable.branch:
            assert after.ffn.branch_rank is None
