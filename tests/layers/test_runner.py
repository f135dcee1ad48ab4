"""How layers are run: micro-batches, sites that are observed, dtypes, and what is left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_families import GROUPS, HEAD_DIM, HEADS, HIDDEN, NEURONS, tiny_model
from torch import Tensor

from distprune.errors import InputError
from distprune.layers.architecture import Architecture
from distprune.layers.module import tapped
from distprune.layers.parts import DecoderLayer, LowRank
from distprune.layers.runner import LayerRunner
from distprune.layers.sites import (
    FFN_INPUT,
    FFN_OUTPUT,
    GATE,
    QUERIES,
    SITES,
)
from distprune.layers.sites import (
    NEURONS as NEURONS_SITE,
)

LENGTH = 12
GRADIENTS = tuple(site.gradient for site in SITES)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def architecture(model) -> Architecture:
    return Architecture(model.config)


@pytest.fixture(scope="module")
def layer(model, architecture) -> DecoderLayer:
    prefix = architecture.layer_prefix(0)
    state = model.state_dict()
    return architecture.layer_from_state(
        0, {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    )


@pytest.fixture(scope="module")
def states() -> Tensor:
    return torch.randn(6, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def runner(architecture) -> LayerRunner:
    return make_runner(architecture)


def make_runner(architecture: Architecture, micro_batch: int = 4, dtype: torch.dtype = torch.float32) -> LayerRunner:
    return LayerRunner(architecture, torch.device("cpu"), dtype, micro_batch)


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_the_micro_batch_does_not_change_what_is_computed(architecture, layer, states, micro_batch):
    expected = make_runner(architecture, 2).run(layer, 0, states)
    output = make_runner(architecture, micro_batch).run(layer, 0, states)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_every_site_is_observed_once_a_micro_batch(runner, layer, states):
    seen = []

    def observe(activations):
        seen.append({site: tuple(activation.shape) for site, activation in activations.items()})

    runner.run(layer, 0, states, observe=observe, sites=SITES)
    keys = GROUPS * HEAD_DIM
    of_heads = [HIDDEN, HEADS * HEAD_DIM, keys, keys, HEADS * HEAD_DIM, HIDDEN]
    widths = dict(zip(SITES, [*of_heads, HIDDEN, NEURONS, NEURONS, NEURONS, HIDDEN], strict=True))
    assert seen == [{site: (samples * LENGTH, width) for site, width in widths.items()} for samples in (4, 2)]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_layer_has_no_sites_of_what_it_lacks(runner, layer, states, site):
    for part in ("attention", "ffn"):
        seen = []
        reduced = replace(layer, **{part: None})
        runner.run(
            reduced, 0, states, observe=lambda activations, seen=seen: seen.append(list(activations)), sites=[site]
        )
        assert seen == [[] if site.part == part else [site]] * 2


def test_a_layer_without_any_part_gives_its_input(runner, layer, states):
    nothing = replace(layer, attention=None, ffn=None)
    assert torch.equal(runner.run(nothing, 0, states), states)


def test_observing_does_not_change_the_output(runner, layer, states):
    watched = runner.run(layer, 0, states, observe=lambda activations: None, sites=SITES)
    assert torch.equal(watched, runner.run(layer, 0, states))


@pytest.mark.parametrize("last", SITES, ids=str)
def test_a_pass_that_is_only_observed_sees_what_a_whole_one_does(runner, layer, states, last):
    seen, complete = [], []
    runner.run(layer, 0, states, observe=lambda found: complete.append(dict(found)), sites=SITES)
    runner.observe(layer, 0, states, lambda found: seen.append(dict(found)), {SITES[0], last})
    assert [set(batch) for batch in seen] == [{SITES[0], last}] * 2
    for batch, whole in zip(seen, complete, strict=True):
        assert all(torch.equal(activation, whole[site]) for site, activation in batch.items())


def test_a_pass_that_is_only_observed_ends_with_the_last_site(runner, layer, states, monkeypatch):
    ended = []
    forward = LayerRunner.forward

    def watched(self, module, index, hidden_states):
        module.mlp.down_proj.register_forward_hook(lambda *_: ended.append("went on"))
        return forward(self, module, index, hidden_states)

    monkeypatch.setattr(LayerRunner, "forward", watched)
    runner.observe(layer, 0, states, lambda found: None, {NEURONS_SITE})
    assert not ended


def test_nothing_is_run_where_nothing_is_observed(runner, layer, states, monkeypatch):
    monkeypatch.setattr(LayerRunner, "forward", None)
    runner.observe(layer, 0, states, lambda activations: None, set())


def test_the_networks_output_holds_its_branch(runner, layer, states):
    branch = LowRank(right=torch.randn(3, HIDDEN), left=torch.randn(HIDDEN, 3))
    branched = replace(layer, ffn=replace(layer.ffn, branch=branch))
    found, plain = {}, {}
    runner.run(branched, 0, states[:1], observe=found.update, sites=SITES)
    runner.run(layer, 0, states[:1], observe=plain.update, sites=SITES)
    added = found[FFN_INPUT] @ branch.right.mT @ branch.left.mT
    torch.testing.assert_close(found[FFN_OUTPUT], plain[FFN_OUTPUT] + added, atol=1e-4, rtol=1e-4)


def test_hooks_are_gone_when_observation_ends(runner, architecture, layer, states):
    module = runner.build(layer, 0, torch.float32)

    def hooks() -> int:
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())

    with pytest.raises(ZeroDivisionError), tapped(module, architecture.family, layer.shape, SITES):
        assert hooks() == len(SITES)
        _ = 1 / 0
    assert hooks() == 0


def test_hidden_states_stay_as_they_are_and_the_output_has_their_dtype(architecture, layer, states):
    given = states.to(torch.bfloat16)
    before = given.clone()
    output = make_runner(architecture, dtype=torch.float32).run(layer, 0, given)
    assert output.dtype == torch.bfloat16
    assert torch.equal(given, before)


def test_the_runner_leaves_the_layer_as_it_was(architecture, layer, states):
    before = layer.to(torch.float32, copy=True)
    make_runner(architecture, dtype=torch.bfloat16).run(layer, 0, states)
    names = architecture.names(0)
    assert all(torch.equal(tensor, names.state_of(before)[name]) for name, tensor in names.state_of(layer).items())


def test_an_overflow_names_the_layer_and_the_fix(architecture, layer, states):
    with pytest.raises(InputError, match=r"layer 0: its hidden states overflow in float16\. Give another --dtype"):
        make_runner(architecture, dtype=torch.float16).run(layer, 0, 1e5 * states)


# ---------------------------------------------------------------- backward


def test_only_what_is_asked_for_is_seen_and_once_a_micro_batch(runner, layer, states):
    asked, seen = {FFN_INPUT, GATE.gradient, QUERIES}, []
    runner.backward(layer, 0, states, states, observe=lambda found: seen.append(dict(found)), sites=asked)
    assert [set(batch) for batch in seen] == [asked] * 2
    assert [len(batch[GATE.gradient]) for batch in seen] == [4 * LENGTH, 2 * LENGTH]
    assert not any(tensor.requires_grad for batch in seen for tensor in batch.values())


def test_observing_does_not_change_the_gradient_and_nothing_else_changes(runner, layer, states):
    weight, given = layer.ffn.gate.weight.clone(), states.clone()
    plain = runner.backward(layer, 0, states, states)
    watched = runner.backward(layer, 0, states, states, observe=lambda found: None, sites=SITES + GRADIENTS)
    assert torch.equal(plain, watched)
    assert torch.equal(layer.ffn.gate.weight, weight) and torch.equal(states, given)
    assert layer.ffn.gate.weight.grad is None and not states.requires_grad


def test_hidden_states_made_in_inference_mode_have_gradients_too(runner, layer, states):
    with torch.inference_mode():
        made = states.clone()
    assert torch.equal(runner.backward(layer, 0, made, made), runner.backward(layer, 0, states, states))


def test_gradients_stay_those_of_a_layer_run_in_inference_mode_before(runner, layer, states):
    """Masks and rotary tables that a forward pass has recorded take part in gradients later."""
    runner.run(layer, 0, states)
    runner.backward(layer, 0, states, states)
