"""REAP and the router's mean weight: whole experts, scored on what transformers' own modules make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mixture_layers import EXPERTS, MIXTURES, WIDTH, eager_experts, output_of, routed
from tiny_architectures import tiny

from distprune.budgets import Target, layout_of
from distprune.errors import InputError
from distprune.layers.module import build_module
from distprune.layers.parts import Experts
from distprune.methods import METHODS

WHOLE = ("mean-router-weight", "reap")


@pytest.fixture(params=MIXTURES)
def mixture(request, subject):
    return subject(request.param, **MIXTURES[request.param])


def scores_of(name: str, this) -> np.ndarray:
    """By numpy, from what reaches the experts and what transformers' eager code makes of it."""
    seen, scores = routed(this.model, this.layer, this.hidden_states), []
    with eager_experts(this.model, this.layer) as experts:
        for expert in range(EXPERTS):
            x, weight = seen.to(expert)
            weights = weight[:, 0].double().numpy()
            norms = np.linalg.norm(output_of(experts, expert, x).double().numpy(), axis=1)
            scores.append((weights * norms).mean() if name == "reap" else weights.sum() / len(seen.hidden_states))
    return np.array(scores)


def best_of_groups(scores: np.ndarray, kept: int, groups: int) -> list[int]:
    size = len(scores) // groups
    best = [np.argsort(scores[g * size : (g + 1) * size])[size - kept // groups :] + g * size for g in range(groups)]
    return sorted(np.concatenate(best).tolist())


@pytest.mark.parametrize("name", WHOLE)
def test_scores_are_those_of_numpy_on_transformers_own_experts(mixture, name):
    method = METHODS[name]()
    found = method.score_experts(mixture.ffn, mixture.statistics(method.moments(mixture.ffn.shape)))
    expected = scores_of(name, mixture)
    found = found.double().numpy()
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-4)
    if name == "reap":
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("count", [4, 6])
def test_the_best_experts_stay_as_they_are_and_the_router_chooses_among_them(mixture, name, count):
    planned = mixture.layer.shape.with_ffn(count=count)
    pruned = mixture.prune(METHODS[name](), planned)
    groups = mixture.layer.shape.ffn.groups
    assert groups == (2 if mixture.model.config.model_type == "deepseek_v3" else 1)
    kept = best_of_groups(scores_of(name, mixture), count, groups)
    for place, number in enumerate(kept):
        assert torch.equal(pruned.ffn.inputs[place], mixture.ffn.inputs[number])
        assert torch.equal(pruned.ffn.down[place], mixture.ffn.down[number])
        assert torch.equal(pruned.ffn.router.weight[place], mixture.ffn.router.weight[number])
    if silent := without(mixture, kept):  # the dense layer does the same where its router can't choose the others
        torch.testing.assert_close(mixture.run(pruned), mixture.run_with(ffn=silent), rtol=1e-4, atol=1e-4)


def without(this, kept: list[int]) -> Experts | None:
    """The dense mixture with a router that never chooses the other experts; None where it has no biases to say so."""
    gone = torch.tensor([number for number in range(EXPERTS) if number not in kept])
    ffn, router = this.ffn, this.ffn.router
    if ffn.correction is not None:
        return replace(ffn, correction=ffn.correction.index_fill(0, gone, -10.0))
    if router.bias is not None:
        return replace(ffn, router=replace(router, bias=router.bias.index_fill(0, gone, -1e4)))
    return None


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_that_no_token_was_routed_to_go_and_nothing_changes(subject, model_type, name):
    # A router whose weights don't sum to one gives those that stay what the others had of its softmax.
    sums_to_one = {"norm_topk_prob": True} if model_type == "qwen2_moe" else {}
    this = subject(model_type, **MIXTURES[model_type] | sums_to_one)
    hidden_states = this.hidden_states.clone()
    hidden_states[..., 0] = 6.0
    unused = torch.tensor([0, 3, 6])
    row = torch.zeros(this.model.hidden_size)
    row[0] = -100 * this.layer.rest["post_attention_layernorm.weight"][0].sign()
    weight = this.ffn.router.weight.index_copy(0, unused, row.expand(3, -1))
    ffn = replace(this.ffn, router=replace(this.ffn.router, weight=weight))
    this = replace(this.changed(ffn=ffn), hidden_states=hidden_states)
    used = routed(this.model, this.layer, hidden_states).chosen.unique()
    assert 2 < len(used) <= EXPERTS - 3 and not np.isin(used, unused).any()
    pruned = this.prune(METHODS[name](), this.layer.shape.with_ffn(count=len(used)))
    assert torch.equal(pruned.ffn.router.weight, ffn.router.weight[used])
    torch.testing.assert_close(this.run(pruned), this.run(this.layer), rtol=1e-4, atol=1e-4)


def test_a_pruned_mixture_is_of_the_familys_own_class_with_a_smaller_configuration(mixture):
    pruned = mixture.prune(METHODS["reap"](), mixture.layer.shape.with_ffn(count=4))
    module = build_module(mixture.model, 0, pruned, torch.float32)
    assert type(module).__module__.startswith("transformers.")
    assert module.mlp.experts.num_experts == 4


# ------------------------------------------------------------------ plans


def model_of(model_type: str, **changes):
    """A model of four layers, of which DeepSeek's and Qwen's first one has no experts."""
    options = {name: value for name, value in MIXTURES[model_type].items() if name not in ("width", "kv_heads")}
    if model_type == "deepseek_v3":
        options |= {"first_k_dense_replace": 1, "num_key_value_heads": 4}
    if model_type == "qwen2_moe":
        options |= {"mlp_only_layers": (0,)}
    sizes = {"num_hidden_layers": 4, "intermediate_size": WIDTH if "width" in MIXTURES[model_type] else 96}
    return tiny(model_type, **options | sizes | changes)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2, 0.3])
def test_every_mixture_keeps_as_many_and_the_whole_is_nearest_to_the_target(model_type, name, sparsity):
    model = model_of(model_type)
    method, dense = METHODS[name](), model.dense_shapes
    for layout in method.layouts:
        target = Target(model, sparsity, layout=layout)
        method.check_target(target, 8)
        plan = method.plan(target, (), 8)
        counts = {shape.ffn.count for shape in plan if hasattr(shape.ffn, "count")}
        assert len(counts) == 1
        [count] = counts
        groups = 2 if model_type == "deepseek_v3" else 1
        assert count % groups == 0
        fewest = 4 if groups == 2 else 2
        assert fewest <= count <= EXPERTS
        for before, after in zip(dense, plan, strict=True):
            assert after == (before.with_ffn(count=count) if hasattr(before.ffn, "count") else before)
        assert layout_of(model, plan) == "stock"
        errors = {
            other: abs(target.amount([s.with_ffn(count=other) if hasattr(s.ffn, "count") else s for s in dense])
                       - target.remaining)
            for other in range(fewest, EXPERTS + 1, groups)
        }  # fmt: skip
        assert errors[count] == min(errors.values())


@pytest.mark.parametrize("name", WHOLE)
def test_fewer_experts_than_the_router_must_choose_from_are_refused(name):
    with pytest.raises(InputError, match=r"can't be reached by .*\(4\), it removes 3\d.*lower --sparsity.*curvature"):
        METHODS[name]().check_target(Target(model_of("deepseek_v3"), 0.6), 8)


@pytest.mark.parametrize("name", [*WHOLE, "heapr"])
def test_a_model_without_experts_is_refused(name):
    with pytest.raises(
        InputError, match=rf"method {name} removes experts, and none of these can go from a llama model"
    ):
        METHODS[name]().check_target(Target(tiny(), 0.2), 8)
