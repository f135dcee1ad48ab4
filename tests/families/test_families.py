"""What the families say of a checkpoint, against transformers' own models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from distprune.decoder_layer import LayerShape
from distprune.errors import InputError
from distprune.families import FAMILIES, family_of
from distprune.modeling import PrunedForCausalLM, layer_tensor_shapes

TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))


def test_names_and_shapes_are_those_of_the_file_that_transformers_saves(stock_config, stock_model, tmp_path):
    stock_model(stock_config).save_pretrained(tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    family = family_of(stock_config)
    dense = family.dense_config(stock_config)
    told = [family.outer_shapes(dense)] + [family.layer_shapes(dense, i) for i in range(dense.num_hidden_layers)]
    assert {name: shape for part in told for name, shape in part.items()} == saved
    assert sum(map(len, told)) == len(saved)


@torch.no_grad()
def test_the_dense_configuration_computes_the_original_models_logits(stock_config, stock_model):
    stock = stock_model(stock_config)
    ours = PrunedForCausalLM(family_of(stock_config).dense_config(stock_config)).eval()
    ours.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(ours(TOKENS).logits, stock(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_the_dense_configuration_keeps_what_generation_and_saving_need(stock_config):
    stock_config.update({"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6, "dtype": torch.bfloat16})
    dense = family_of(stock_config).dense_config(stock_config)
    for name in (
        "vocab_size",
        "max_position_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "use_cache",
        "dtype",
    ):
        assert getattr(dense, name) == getattr(stock_config, name), name
    assert dense.base_model_type == stock_config.model_type


def test_the_dense_configuration_shares_no_rope_parameters_with_the_original(stock_config):
    dense = family_of(stock_config).dense_config(stock_config)
    dense.rope_parameters["rope_theta"] = 1.0
    assert stock_config.rope_parameters["rope_theta"] != 1.0


def test_a_layer_goes_from_checkpoint_to_checkpoint_unchanged(stock_config, stock_model):
    family = family_of(stock_config)
    dense, state = family.dense_config(stock_config), stock_model(stock_config).state_dict()
    tensors = {name: state[name] for name in family.layer_shapes(dense, 2)}
    layer = family.layer_from_checkpoint(tensors, dense, 2)
    assert layer.shape == dense.layer_shape(2)
    written = family.layer_to_checkpoint(layer, 2)
    assert written.keys() == tensors.keys()
    assert all(written[name] is tensor for name, tensor in tensors.items())


def test_a_models_own_tensors_are_known(stock_config, stock_model):
    family = family_of(stock_config)
    names = [*stock_model(stock_config).state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "lm_head.weight" in names  # transformers' state holds a tied head too
    assert family.unknown_tensors(names, family.dense_config(stock_config)) == []


def test_tensors_that_have_no_place_are_unknown(stock_config):
    family = family_of(stock_config)
    foreign = ["model.layers.3.mlp.up_proj.weight", "model.layers.0.mlp.experts.weight", "model.norm.bias", "score"]
    assert family.unknown_tensors(foreign, family.dense_config(stock_config)) == foreign


def test_biases_and_norms_that_the_configuration_denies_are_unknown():
    config = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=8)
    family = family_of(config)
    dense = family.dense_config(config)
    foreign = ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"]
    assert family.unknown_tensors(foreign, dense) == foreign


def test_an_unknown_architecture_is_refused_and_the_known_ones_named():
    with pytest.raises(InputError, match="'gpt2' is not supported") as refusal:
        family_of(GPT2Config())
    assert all(name in str(refusal.value) for name in FAMILIES)


@pytest.mark.parametrize("heads", [(4, 2), (2, 1), (2, 2)], ids=["all heads", "one KV group", "every other head"])
@torch.no_grad()
def test_a_stock_configuration_of_smaller_widths_opens_in_transformers(stock_config, tmp_path, heads):
    family = family_of(stock_config)
    dense = family.dense_config(stock_config)
    shape = LayerShape(*heads, dense.head_dim, dense.head_dim, ffn_width=20)
    family.stock_config(stock_config, shape).save_pretrained(tmp_path)

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    assert type(model) is type(AutoModelForCausalLM.from_config(stock_config))
    for index, layer in enumerate(model.model.layers):
        sizes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        assert sizes == layer_tensor_shapes(dense, index, shape)
    assert model(TOKENS).logits.isfinite().all()


@torch.no_grad()
def test_a_pruned_layer_computes_the_same_under_the_stock_configuration_and_ours(stock_config, stock_model):
    """One KV group and some neurons are cut from every layer; attention's scaling and window must survive."""
    family = family_of(stock_config)
    dense = family.dense_config(stock_config)
    shape = LayerShape(2, 1, dense.head_dim, dense.head_dim, ffn_width=20)
    stock = stock_model(family.stock_config(stock_config, shape))
    config = type(dense)(**{**dense.to_dict(), "layer_shapes": [vars(shape)] * dense.num_hidden_layers})
    ours = PrunedForCausalLM(config).eval()
    ours.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(ours(TOKENS).logits, stock(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_a_stock_configuration_is_transformers_own_whatever_code_came_with_the_model(tmp_path):
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    pass\n"
    )
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    LlamaConfig(hidden_size=32, num_attention_heads=4, architectures=["OwnForCausalLM"]).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"auto_map": auto_map}))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(config).__name__ == "OwnConfig"

    family_of(config).stock_config(config, LayerShape(4, 4, 8, 8, ffn_width=20)).save_pretrained(tmp_path / "stock")
    assert [file.name for file in (tmp_path / "stock").iterdir()] == ["config.json"]
    stock = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert "auto_map" not in stock
    assert stock["architectures"] == ["LlamaForCausalLM"]
    assert stock["intermediate_size"] == 20


def test_making_a_stock_configuration_leaves_the_original_as_it_was(stock_config):
    before = stock_config.to_dict()
    shape = LayerShape(2, 1, 8, 8, ffn_width=20)
    family_of(stock_config).stock_config(stock_config, shape)
    assert stock_config.to_dict() == before
