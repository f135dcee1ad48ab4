"""A layer as a value: its shape, its dtypes, its tensors' names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_families import HIDDEN, tiny_model

from distprune.errors import InputError
from distprune.families import family_of
from distprune.layers.architecture import Architecture
from distprune.layers.names import join_heads, origin_of, split_heads, stored_like
from distprune.layers.parts import Attention, DecoderLayer, FeedForward, Linear, LowRank, slice_linear
from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape


def linear(outputs: int, inputs: int, bias: bool = False) -> Linear:
    return Linear(torch.randn(outputs, inputs), torch.randn(outputs) if bias else None)


@pytest.fixture
def layer() -> DecoderLayer:
    attention = Attention(
        4,
        2,
        query=LowRank(torch.randn(3, HIDDEN), torch.randn(24, 3)),
        key=linear(12, HIDDEN),
        value=linear(10, HIDDEN),
        output=linear(HIDDEN, 20, bias=True),
        rotary_pairs=torch.tensor([[0, 1, 2], [1, 2, 3]]),
    )
    branch = LowRank(torch.randn(2, HIDDEN), torch.randn(HIDDEN, 2))
    ffn = FeedForward(linear(9, HIDDEN), linear(9, HIDDEN), linear(HIDDEN, 9), branch)
    return DecoderLayer(attention, ffn, {"input_layernorm.weight": torch.randn(HIDDEN)})


def test_the_shape_follows_from_the_tensors(layer):
    attention = AttentionShape(4, 2, 6, 5, query_rank=3, output_bias=True)
    assert layer.shape == LayerShape(attention, FeedForwardShape(9, branch_rank=2))
    assert replace(layer, attention=None).shape == LayerShape(None, FeedForwardShape(9, branch_rank=2))


def test_shapes_go_through_json(layer):
    assert LayerShape.from_json(layer.shape.to_json()) == layer.shape
    nothing = LayerShape(None, None)
    assert LayerShape.from_json(nothing.to_json()) == nothing


@pytest.mark.parametrize(
    "changes", [{"query_heads": 0}, {"query_heads": 3}, {"value_dim": -1}, {"query_rank": 0}, {"output_bias": 1}]
)
def test_shapes_that_can_not_be_are_refused(changes):
    with pytest.raises(ValueError):
        replace(AttentionShape(4, 2, 6, 5), **changes)


def test_to_casts_every_tensor_but_indices(layer):
    cast = layer.to(torch.bfloat16)
    assert cast.attention.key.weight.dtype == cast.rest["input_layernorm.weight"].dtype == torch.bfloat16
    assert cast.ffn.branch.left.dtype == torch.bfloat16
    assert cast.attention.rotary_pairs.dtype == torch.int64
    assert layer.attention.key.weight.dtype == torch.float32


def test_a_copy_shares_no_tensor_with_the_layer(layer):
    copy = layer.to(torch.float32, copy=True)
    copy.ffn.up.weight.zero_()
    copy.rest["input_layernorm.weight"].zero_()
    assert layer.ffn.up.weight.any() and layer.rest["input_layernorm.weight"].any()


def test_slicing_keeps_rows_with_their_biases_and_columns():
    given = linear(4, 3, bias=True)
    rows, columns = torch.tensor([2, 0]), torch.tensor([1])
    sliced = slice_linear(given, rows=rows, columns=columns)
    assert torch.equal(sliced.weight, given.weight[[2, 0]][:, [1]])
    assert torch.equal(sliced.bias, given.bias[[2, 0]])
    assert slice_linear(linear(4, 3), rows=rows).bias is None


@pytest.mark.parametrize("groups", [None, 2])
def test_joined_projections_come_apart_again(groups):
    pieces = [linear(8, 5, bias=True), linear(4, 5, bias=True), linear(4, 5, bias=True)]
    fused = join_heads(pieces, groups)
    again = split_heads(fused, [8, 4, 4], groups)
    for piece, found in zip(pieces, again, strict=True):
        assert torch.equal(piece.weight, found.weight) and torch.equal(piece.bias, found.bias)


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("self_attn.q_proj.weight", "self_attn.q_proj.weight"),
        ("self_attn.right.q_proj.weight", "self_attn.q_proj.weight"),
        ("self_attn.narrow.v_proj.bias", "self_attn.v_proj.weight"),
        ("self_attn.o_proj.bias", "self_attn.o_proj.weight"),
        ("mlp.left.branch.weight", "mlp.down_proj.weight"),
    ],
)
def test_a_tensor_takes_the_dtype_of_what_it_was_made_from(name, origin):
    originals = {f"self_attn.{own}_proj.weight" for own in "qkvo"} | {"mlp.down_proj.weight"}
    assert origin_of(name, originals, family_of("llama")) == origin


def test_pieces_of_a_fused_projection_take_its_dtype():
    originals = {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight"}
    assert origin_of("self_attn.right.q_proj.weight", originals, family_of("phi3")) == "self_attn.qkv_proj.weight"


def test_a_layer_is_stored_like_the_one_that_it_was_made_from():
    model = tiny_model("llama")
    architecture, prefix = Architecture(model.config), "model.layers.0."
    state = {name.removeprefix(prefix): t for name, t in model.state_dict().items() if name.startswith(prefix)}
    state = {name: t.to(torch.bfloat16 if "mlp" in name else torch.float16) for name, t in state.items()}
    original = architecture.layer_from_state(0, state)
    found = stored_like(original.to(torch.float32), original, architecture.names(0))
    assert {name: t.dtype for name, t in architecture.names(0).state_of(found).items()} == {
        name: t.dtype for name, t in state.items()
    }


# ---------------------------------------------------------------- architectures


def test_layers_that_are_alike_are_of_one_kind():
    architecture = Architecture(tiny_model("gemma3_text", num_hidden_layers=6).config)
    kinds = [architecture.kind(index) for index in range(6)]
    assert len(set(kinds)) == 2 and kinds[0] != kinds[5]
    assert architecture.context(0) == 16 and architecture.context(5) is None


def test_what_is_no_causal_language_model_is_refused():
    from transformers import BertConfig, T5Config

    with pytest.raises(InputError, match="model_type 't5' is no causal language model"):
        Architecture(T5Config())
    with pytest.raises(InputError, match="bert"):
        Architecture(BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16))


def test_a_family_of_other_names_is_refused_with_the_page_that_helps():
    from transformers import GPT2Config

    with pytest.raises(InputError, match=r"model_type 'gpt2': distprune knows no part .*docs/families.md"):
        Architecture(GPT2Config(n_layer=2, n_embd=16, n_head=2))
