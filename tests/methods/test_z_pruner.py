"""Z-Pruner's scores, the units and the single weights that stay, and what it refuses, in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixture_layers import MIXTURES
from tiny_architectures import tiny

from distprune.budgets import Target
from distprune.errors import InputError
from distprune.layers.parts import Experts, FeedForward, Linear
from distprune.layers.sites import ATTENDED, ATTENTION_INPUT, FFN_INPUT, NEURONS
from distprune.methods import make_method
from distprune.methods.even_layers import with_heads
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons
from distprune.methods.z_pruner import ZPruner


def scores(linear: Linear, x: torch.Tensor) -> np.ndarray:
    """The score of every weight, as the published code's formula says."""
    weight = linear.weight.double().numpy()

    def cubed(scaled: np.ndarray) -> np.ndarray:
        return np.abs((scaled - scaled.mean()) / scaled.std(ddof=1)) ** 3

    rows = cubed(weight / np.linalg.norm(weight, axis=1, keepdims=True))
    columns = cubed(weight / np.linalg.norm(weight, axis=0, keepdims=True))
    share = 0.7 * (1 - 0.3 * np.mean(np.abs(weight) < 0.1 * np.abs(weight).mean()))
    return (share * rows + (1 - share) * columns) * np.sqrt(np.square(x.numpy()).mean(axis=0)) ** 1.5


def largest(worth: np.ndarray, keep: int) -> torch.Tensor:
    return torch.from_numpy(np.sort(np.argsort(worth)[len(worth) - keep :]))


def projections(this) -> list[tuple[Linear, torch.Tensor]]:
    """All linear maps of a layer, each with what it reads."""
    seen, attention, ffn = this.activations(), this.attention, this.ffn
    return [
        *((each, seen[ATTENTION_INPUT]) for each in (attention.query, attention.key, attention.value)),
        (attention.output, seen[ATTENDED]),
        *((each, seen[FFN_INPUT]) for each in ffn.inputs),
        (ffn.down, seen[NEURONS]),
    ]


def linears(layer) -> list[Linear]:
    attention, ffn = layer.attention, layer.ffn
    return [attention.query, attention.key, attention.value, attention.output, *ffn.inputs, ffn.down]


# ------------------------------------------------------------------ units


def test_the_units_of_the_highest_scores_stay_and_stay_as_they_are(any_subject):
    this, kv_heads = any_subject, any_subject.attention.kv_heads
    query, key, value, output, gate, up, down = (scores(*each) for each in projections(this))
    channels = [*(rows.sum(axis=1) for rows in (query, key, value)), output.sum(axis=0)]
    worth = sum(np.array([part.sum() for part in np.split(each, kv_heads)]) for each in channels)
    left, heads_each = max(1, kv_heads - 1), this.attention.query_heads // kv_heads
    heads = heads_of_groups(largest(worth, left), heads_each)
    neurons = largest(gate.sum(axis=1) + up.sum(axis=1) + down.sum(axis=0), 24)
    expected = this.run_with(attention=keep_heads(this.attention, heads), ffn=keep_neurons(this.ffn, neurons))
    planned = with_heads(this.layer.shape, left, heads_each).with_ffn(width=24)
    assert torch.equal(this.run(this.prune(ZPruner(), planned)), expected)


def test_neurons_without_a_gate_are_scored_alike(gateless):
    *_, up, down = (scores(*each) for each in projections(gateless))
    neurons = largest(up.sum(axis=1) + down.sum(axis=0), 24)
    pruned = gateless.prune(ZPruner(), gateless.layer.shape.with_ffn(width=24))
    assert torch.equal(gateless.run(pruned), gateless.run_with(ffn=keep_neurons(gateless.ffn, neurons)))


# ------------------------------------------------------------------ single weights


@pytest.mark.parametrize("sparsity", [0.1, 0.5])
def test_the_weights_of_the_lowest_scores_become_zero_and_the_others_stay(any_subject, sparsity):
    this = any_subject
    pruned = this.prune(ZPruner(mode="unstructured"), this.layer.shape, sparsity=sparsity)
    for (linear, x), zeroed in zip(projections(this), linears(pruned), strict=True):
        worth = scores(linear, x)
        least = np.sort(worth, axis=None)[: round(sparsity * worth.size)].max()
        assert torch.equal(zeroed.weight, linear.weight.masked_fill(torch.from_numpy(worth <= least), 0))
        assert zeroed.bias is linear.bias or torch.equal(zeroed.bias, linear.bias)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_a_pattern_leaves_the_best_of_every_group_of_neighbours(subject, pattern):
    this, (kept, group) = subject(), map(int, pattern.split(":"))
    method = make_method("z-pruner", {"mode": "unstructured", "pattern": pattern})
    pruned = this.prune(method, this.layer.shape, sparsity=1 - kept / group)
    for (linear, x), zeroed in zip(projections(this), linears(pruned), strict=True):
        grouped = scores(linear, x).reshape(len(linear.weight), -1, group)
        best = np.argsort(np.argsort(grouped, axis=2), axis=2) >= group - kept
        mask = torch.from_numpy(best.reshape(linear.weight.shape))
        assert torch.equal(zeroed.weight, linear.weight * mask)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_every_network_of_a_mixture_gets_its_zeros(subject, model_type):
    this = subject(model_type, **MIXTURES[model_type])
    pruned = this.prune(ZPruner(mode="unstructured"), this.layer.shape, sparsity=0.5)
    assert isinstance(pruned.ffn, Experts)
    networks: list[FeedForward] = [pruned.ffn.expert(number) for number in range(pruned.ffn.shape.count)]
    networks += [pruned.ffn.shared] if pruned.ffn.shared else []
    for network in networks:
        for linear in (*network.inputs, network.down):
            assert (linear.weight == 0).float().mean() == 0.5
    assert torch.equal(pruned.ffn.router.weight, this.ffn.router.weight)
    assert this.run(pruned).isfinite().all()


def test_without_sparsity_nothing_changes(subject):
    this = subject()
    pruned = this.prune(ZPruner(mode="unstructured", pattern="2:4"), this.layer.shape, sparsity=0.0)
    for before, after in zip(linears(this.layer), linears(pruned), strict=True):
        assert torch.equal(before.weight, after.weight)


# ------------------------------------------------------------------ what is asked for


def test_zeroing_plans_the_dense_shapes_in_every_layout():
    for layout in ("free", "heterogeneous", "stock"):
        target, method = Target(tiny(), 0.5, layout=layout), ZPruner(mode="unstructured")
        method.check_target(target, 8)
        assert method.plan(target, (), 8) == target.dense_shapes


def test_a_pattern_may_come_as_the_number_that_yaml_makes_of_it():
    method = make_method("z-pruner", {"mode": "unstructured", "pattern": 124})
    assert method.pattern == "2:4" and method.kept_of_group == (2, 4)


@pytest.mark.parametrize("pattern", ["4:2", "4:4", "0:4", "half", 3])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(InputError, match=r"option 'pattern' of method z-pruner: .*such as 2:4"):
        make_method("z-pruner", {"mode": "unstructured", "pattern": pattern})


def test_units_have_no_pattern():
    with pytest.raises(InputError, match=r"option 'pattern' of method z-pruner: .*only mode=unstructured"):
        make_method("z-pruner", {"pattern": "2:4"})


def test_a_pattern_is_refused_that_does_not_fit_the_sparsity_or_the_model():
    method = ZPruner(mode="unstructured", pattern="2:4")
    method.check_target(Target(tiny(), 0.5), 8)
    with pytest.raises(InputError, match=r"--sparsity 0\.3: pattern=2:4 zeroes 0\.5 .*Give --sparsity 0\.5"):
        method.check_target(Target(tiny(), 0.3), 8)
    with pytest.raises(InputError, match=r"pattern=2:4: a projection of the model has 42 inputs, no multiple of 4"):
        method.check_target(Target(tiny(intermediate_size=42), 0.5), 8)


def test_a_sparsity_of_the_whole_model_or_of_another_resource_is_refused():
    method = ZPruner(mode="unstructured")
    with pytest.raises(InputError, match=r"--count-embeddings: .*Leave it out"):
        method.check_target(Target(tiny(), 0.5, count_embeddings=True), 8)
    with pytest.raises(InputError, match=r"--target flops: method z-pruner"):
        method.check_target(Target(tiny(), 0.5, resource="flops"), 8)
