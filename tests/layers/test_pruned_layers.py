"""A pruned layer against the original class whose weights were zeroed, or multiplied out, where the layer has lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layer_edits import silent
from mixture_edits import add_to_router, narrower_experts
from mixture_edits import fewer_experts as without_experts
from tiny_families import (
    CARRIED,
    CHOSEN,
    EXPERT_NEURONS,
    EXPERTS,
    FAMILIES,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    MIXTURES,
    NEURONS,
    tiny_model,
)
from torch import Tensor

from distprune.layers.architecture import Architecture
from distprune.layers.parts import Attention, DecoderLayer, Experts, FeedForward, Linear, LowRank, slice_linear
from distprune.layers.runner import LayerRunner
from distprune.layers.shapes import Removable

#: A pruned layer and the layer of full size that computes the same.
Pair = tuple[DecoderLayer, DecoderLayer]
GENERATOR = torch.Generator().manual_seed(2)
INDEX = 3  # the last layer, which has attention in every family


def without_columns(linear: Linear, columns: Tensor) -> Linear:
    return replace(linear, weight=linear.weight.index_fill(1, columns, 0.0))


def without_rows(linear: Linear, rows: Tensor) -> Linear:
    bias = None if linear.bias is None else linear.bias.index_fill(0, rows, 0.0)
    return Linear(linear.weight.index_fill(0, rows, 0.0), bias)


def places(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def others(kept: Tensor, count: int) -> Tensor:
    return torch.tensor([place for place in range(count) if place not in kept.tolist()])


def change_attention(layer: DecoderLayer, **changes) -> DecoderLayer:
    return replace(layer, attention=replace(layer.attention, **changes))


def change_ffn(layer: DecoderLayer, **changes) -> DecoderLayer:
    return replace(layer, ffn=replace(layer.ffn, **changes))


# ---------------------------------------------------------------- what may go


def fewer_groups(layer: DecoderLayer) -> Pair:
    attention = layer.attention
    kept = torch.tensor([0, 2])
    heads = places(kept, HEADS // GROUPS)
    query_width = len(attention.query.weight) // HEADS
    attended = places(heads, HEAD_DIM)
    pruned = Attention(
        len(heads),
        len(kept),
        query=slice_linear(attention.query, rows=places(heads, query_width)),
        key=slice_linear(attention.key, rows=places(kept, HEAD_DIM)),
        value=slice_linear(attention.value, rows=places(kept, HEAD_DIM)),
        output=slice_linear(attention.output, columns=attended),
    )
    zeroed = without_columns(attention.output, others(attended, HEADS * HEAD_DIM))
    return replace(layer, attention=pruned), change_attention(layer, output=zeroed)


def narrower_values(layer: DecoderLayer) -> Pair:
    attention, kept = layer.attention, 5
    groups, heads = attention.kv_heads, attention.query_heads
    rows = (torch.arange(groups)[:, None] * HEAD_DIM + torch.arange(kept)).flatten()
    columns = (torch.arange(heads)[:, None] * HEAD_DIM + torch.arange(kept)).flatten()
    pruned = change_attention(
        layer,
        value=slice_linear(attention.value, rows=rows),
        output=slice_linear(attention.output, columns=columns),
    )
    zeroed = without_columns(attention.output, others(columns, heads * HEAD_DIM))
    return pruned, change_attention(layer, output=zeroed)


def fewer_pairs(layer: DecoderLayer) -> Pair:
    attention = layer.attention
    pairs = torch.tensor([[0, 1, 3], [0, 2, 3], [1, 2, 3], [0, 1, 2]])
    columns = torch.cat([pairs, pairs + HEAD_DIM // 2], dim=1)
    keys = (torch.arange(GROUPS)[:, None] * HEAD_DIM + columns).flatten()
    queries = (torch.arange(HEADS)[:, None] * HEAD_DIM + columns.repeat_interleave(HEADS // GROUPS, dim=0)).flatten()
    pruned = change_attention(
        layer,
        query=slice_linear(attention.query, rows=queries),
        key=slice_linear(attention.key, rows=keys),
        rotary_pairs=pairs,
    )
    zeroed = change_attention(
        layer,
        query=without_rows(attention.query, others(queries, HEADS * HEAD_DIM)),
        key=without_rows(attention.key, others(keys, GROUPS * HEAD_DIM)),
    )
    return pruned, zeroed


def factor(linear: Linear, rank: int) -> tuple[LowRank, Linear]:
    left, right = (
        torch.randn(*size, generator=GENERATOR) / 4
        for size in ((len(linear.weight), rank), (rank, linear.weight.shape[1]))
    )
    return LowRank(right, left, linear.bias), Linear(left @ right, linear.bias)


def factors(layer: DecoderLayer) -> Pair:
    both = {name: factor(getattr(layer.attention, name), 6) for name in ("query", "key", "output")}
    pruned, multiplied = (
        change_attention(layer, **{name: pair[which] for name, pair in both.items()}) for which in (0, 1)
    )
    return pruned, multiplied


def factors_and_narrow_values(layer: DecoderLayer) -> Pair:
    pruned, zeroed = narrower_values(layer)
    low_rank, product = factor(pruned.attention.output, 6)
    whole = torch.zeros(HIDDEN, layer.attention.query_heads, HEAD_DIM)
    whole[..., :5] = product.weight.unflatten(1, (-1, 5))
    return change_attention(pruned, output=low_rank), change_attention(
        zeroed, output=Linear(whole.flatten(1), product.bias)
    )


def added_bias(layer: DecoderLayer) -> Pair:
    """The pruned layer alone has a bias that its class doesn't; the other gets what it gives by its down projection."""
    bias = torch.randn(HIDDEN, generator=GENERATOR)
    output, down = layer.attention.output, layer.ffn.down
    if output.bias is not None or down.bias is not None:
        pytest.skip("the family's own projections have biases")
    return change_ffn(change_attention(layer, output=replace(output, bias=bias)), down=replace(down, bias=bias)), layer


def fewer_neurons(layer: DecoderLayer) -> Pair:
    ffn = layer.ffn
    if isinstance(ffn, Experts):
        return narrower_experts(EXPERT_NEURONS // 2, shared_width=30)(layer)
    kept = torch.randperm(NEURONS, generator=GENERATOR)[:40].sort().values
    gate = None if ffn.gate is None else slice_linear(ffn.gate, rows=kept)
    pruned = FeedForward(gate, slice_linear(ffn.up, rows=kept), slice_linear(ffn.down, columns=kept))
    return replace(layer, ffn=pruned), change_ffn(layer, down=without_columns(ffn.down, others(kept, NEURONS)))


def no_attention(layer: DecoderLayer) -> Pair:
    output = layer.attention.output
    zeroed = Linear(torch.zeros_like(output.weight), None if output.bias is None else torch.zeros_like(output.bias))
    return replace(layer, attention=None), change_attention(layer, output=zeroed)


def no_ffn(layer: DecoderLayer) -> Pair:
    return replace(layer, ffn=None), replace(layer, ffn=silent(layer.ffn))


def fewer_experts(layer: DecoderLayer) -> Pair:
    """As many from each of two groups, of which families that choose groups first have no more."""
    return without_experts(EXPERTS - CHOSEN, groups=2)(layer)


CHANGES: dict[str, Callable[[DecoderLayer], Pair]] = {
    "heads": fewer_groups,
    "values": narrower_values,
    "pairs": fewer_pairs,
    "factors": factors,
    "neurons": fewer_neurons,
    "experts": fewer_experts,
    "attention": no_attention,
    "ffn": no_ffn,
}


class Subject:
    def __init__(self, model_type: str, **changes):
        self.model = tiny_model(model_type, **changes)
        self.architecture = Architecture(self.model.config)
        self.runner = LayerRunner(self.architecture, torch.device("cpu"), torch.float32, micro_batch=2)
        prefix = self.architecture.layer_prefix(INDEX)
        state = self.model.state_dict()
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        self.layer = self.architecture.layer_from_state(INDEX, own)
        self.states = torch.randn(3, 20, HIDDEN, generator=GENERATOR)

    @property
    def removable(self) -> Removable:
        return self.architecture.removable(INDEX)

    def run(self, layer: DecoderLayer) -> Tensor:
        return self.runner.run(layer, INDEX, self.states)

    @torch.no_grad()
    def run_whole(self, layer: DecoderLayer) -> Tensor:
        """The same of a layer of full size, whose router may have a bias that its class doesn't know."""
        if not isinstance(layer.ffn, Experts):
            return self.run(layer)
        router, bias = layer.ffn.router, self.layer.ffn.router.bias
        plain = layer if bias is not None else change_ffn(layer, router=Linear(router.weight))
        module = self.runner.build(plain, INDEX, torch.float32)
        if bias is None and router.bias is not None:
            names = self.architecture.names(INDEX)
            mixture = module.get_submodule(names.family.ffn)
            add_to_router(mixture.get_submodule(names.experts.router), router.bias)
        return torch.cat([self.runner.forward(module, INDEX, batch) for batch in self.states.split(2)])


ANY_FAMILY = pytest.mark.parametrize("model_type", [*FAMILIES, *MIXTURES, *CARRIED])


@pytest.mark.parametrize("change", CHANGES)
@ANY_FAMILY
def test_pruned_is_the_class_with_zeroed_or_multiplied_weights(model_type, change):
    subject = Subject(model_type)
    if not getattr(subject.removable, change):
        pytest.skip(f"{change} can't go in {model_type}")
    pruned, whole = CHANGES[change](subject.layer)
    torch.testing.assert_close(subject.run(pruned), subject.run_whole(whole), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(subject.run(pruned), subject.run(subject.layer), atol=1e-2), "the test sees no change"


@ANY_FAMILY
def test_a_narrow_output_may_be_factored(model_type):
    subject = Subject(model_type)
    if not subject.removable.values:
        pytest.skip(f"values can't go in {model_type}")
    pruned, whole = factors_and_narrow_values(subject.layer)
    torch.testing.assert_close(subject.run(pruned), subject.run_whole(whole), rtol=1e-4, atol=1e-4)


@ANY_FAMILY
def test_a_branch_adds_a_linear_map_of_the_input(model_type):
    subject = Subject(model_type)
    if not subject.removable.branch:
        pytest.skip(f"no branch beside the feed-forward network of {model_type}")
    branch, product = factor(Linear(torch.zeros(HIDDEN, HIDDEN)), 4)
    module = subject.runner.build(subject.layer, INDEX, torch.float32)
    ffn = getattr(module, subject.architecture.family.ffn)
    ffn.register_forward_hook(lambda _, given, output: output + F.linear(given[0], product.weight))
    expected = torch.cat([subject.runner.forward(module, INDEX, batch) for batch in subject.states.split(2)])
    output = subject.run(change_ffn(subject.layer, branch=branch))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_added_biases(model_type):
    subject = Subject(model_type, **({"attention_bias": False, "mlp_bias": False} if model_type == "llama" else {}))
    bias = torch.randn(HIDDEN, generator=GENERATOR)
    layer = change_attention(subject.layer, output=replace(subject.layer.attention.output, bias=bias))
    module = subject.runner.build(subject.layer, INDEX, torch.float32)
    module.self_attn.o_proj.register_forward_hook(lambda _, __, output: output + bias)
    expected = torch.cat([subject.runner.forward(module, INDEX, batch) for batch in subject.states.split(2)])
    torch.testing.assert_close(subject.run(layer), expected, rtol=1e-4, atol=1e-4)


@ANY_FAMILY
def test_state_and_parts_are_inverse(model_type):
    """Whatever a layer was changed to, its names lead back to the same parts."""
    subject = Subject(model_type)
    names = subject.architecture.names(INDEX)
    for name, change in CHANGES.items():
        if getattr(subject.removable, name):
            pruned, _ = change(subject.layer)
            pairs = pruned.attention and pruned.attention.rotary_pairs
            state = names.state_of(pruned)
            again = names.layer_from_state(state, pruned.shape, pairs)
            assert again.shape == pruned.shape
            assert all(torch.equal(tensor, names.state_of(again)[key]) for key, tensor in state.items())
            dims = subject.architecture.layer_tensors(INDEX, pruned.shape)
            assert dims == {key: tuple(tensor.shape) for key, tensor in state.items()}
