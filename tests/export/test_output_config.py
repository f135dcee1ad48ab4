"""Layouts: what config.json says, which one can say what, and pruning what was pruned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layer_edits import (
    Edit,
    factored,
    fewer_groups,
    fewer_neurons,
    fewer_pairs,
    in_turn,
    narrower_values,
    without_attention,
    without_ffn,
)
from pruned_checkpoints import write_pruned
from small_models import small_model
from transformers import AutoConfig, AutoModelForCausalLM

from distprune.export.output_config import modeling_files, output_config, plainest_layout
from distprune.layers.architecture import Architecture
from distprune.layers.module import said_shape
from distprune.modeling import load

BOTH = in_turn(fewer_groups(2), fewer_neurons(40))
PLAINEST: dict[str, tuple[str, dict[int, Edit]]] = {
    "nothing gone": ("stock", {}),
    "the same from every layer": ("stock", dict.fromkeys(range(4), BOTH)),
    "heads and neurons": ("heterogeneous", {1: BOTH, 2: fewer_neurons(33)}),
    "factors": ("free", {1: factored(query=9)}),
    "narrower values": ("free", {1: narrower_values(5)}),
    "fewer rotary pairs": ("free", {1: fewer_pairs(2)}),
    "no attention": ("free", {1: without_attention}),
    "no feed-forward network": ("free", {1: without_ffn}),
}
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "opt", "cohere2", "olmo2", "starcoder2", "nemotron"]


def said_of(edits: dict[int, Edit]) -> tuple[Architecture, list]:
    model = small_model()
    architecture, state = Architecture(model.config), model.state_dict()
    said = []
    for index in range(architecture.num_layers):
        prefix = architecture.layer_prefix(index)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        layer = architecture.layer_from_state(index, own)
        said.append(said_shape(architecture, index, edits.get(index, lambda layer: (layer, layer))(layer)[0]))
    return architecture, said


@pytest.mark.parametrize("case", PLAINEST)
def test_the_plainest_layout_that_can_say_it(case):
    layout, edits = PLAINEST[case]
    architecture, said = said_of(edits)
    assert plainest_layout(architecture, said) == layout
    plainer = {"stock": [], "heterogeneous": ["stock"], "free": ["stock", "heterogeneous"]}[layout]
    for other in plainer:
        with pytest.raises(ValueError, match=f"the layout {other} can't say"):
            output_config(architecture, architecture.config, said, other)


def config_of(edits: dict[int, Edit], layout: str) -> dict:
    architecture, said = said_of(edits)
    return output_config(architecture, architecture.config, said, layout)


def test_stock_is_the_bases_configuration_with_other_sizes():
    plain = config_of({}, "stock")
    assert plain == json.loads(small_model().config.to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
    pruned = config_of(dict.fromkeys(range(4), BOTH), "stock")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
    assert pruned == plain | sizes
    assert modeling_files("stock") == {}


def test_heterogeneous_says_what_layers_have_of_their_own():
    config = config_of({1: BOTH, 2: fewer_neurons(33)}, "heterogeneous")
    assert config["model_type"] == "llama"
    assert config["per_layer_config"] == {
        "1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40},
        "2": {"intermediate_size": 33},
    }
    assert config["head_dim"] == 8
    assert config["hidden_act"] == "silu"
    assert config["auto_map"] == {
        "AutoModel": "modeling_pruned.PrunedLlamaModel",
        "AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM",
    }
    assert not [name for name in config if name.startswith("pruned_")]


def test_free_says_the_shapes_of_what_no_configuration_can():
    config = config_of({1: in_turn(fewer_pairs(2), fewer_neurons(33)), 2: without_ffn}, "free")
    assert config["per_layer_config"] == {"1": {"intermediate_size": 33}}
    [attention] = config["pruned_layers"]["1"].values()
    assert len(attention.pop("rotary_pairs")) == 4
    assert attention == {"query_heads": 8, "kv_heads": 4, "query_key_dim": 4, "value_dim": 8}
    assert config["pruned_layers"]["2"] == {"ffn": None}
    assert config["pruned_hidden_act"] == "silu"
    assert "trust_remote_code" in config["hidden_act"]


def test_what_the_base_says_of_its_own_files_is_not_said_again():
    architecture, said = said_of({})
    config = architecture.config
    config.quantization_config = {"quant_method": "fp8"}
    config.auto_map = {"AutoModel": "modeling_theirs.Model"}
    assert not {"quantization_config", "auto_map"} & output_config(architecture, config, said, "stock").keys()


# ---------------------------------------------------------------- families, and pruning again


def edits_for(model, layout: str) -> dict[int, Edit]:
    removable = Architecture(model.config).removable(1)
    heads = [fewer_groups(2)] if removable.heads else []
    if layout == "heterogeneous":
        return {1: in_turn(*heads, fewer_neurons(40)), 2: fewer_neurons(33)}
    pairs = [fewer_pairs(2)] if removable.pairs else []
    values = [narrower_values(5)] if removable.values else []
    return {0: in_turn(*pairs, *values, fewer_neurons(33)), 1: factored(query=9, output=11), 3: in_turn(*values)}


def open_without_trust(folder: Path):
    model = load(folder)
    assert type(model).__name__.startswith("Pruned")
    return model


@pytest.mark.parametrize("layout", ["heterogeneous", "free"])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_every_family_opens_in_every_layout(tmp_path, model_type, layout):
    model = small_model(model_type)
    pruned = write_pruned(model, edits_for(model, layout), tmp_path)
    assert pruned.layout == layout
    tokens = torch.randint(3, 128, (2, 20))
    expected = pruned.oracle(tokens).logits
    for loaded in (
        open_without_trust(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-4, rtol=1e-4)


FIRST = {
    "stock": dict.fromkeys(range(4), BOTH),
    "heterogeneous": {1: BOTH, 2: fewer_neurons(60)},
    "free": {0: without_attention, 1: in_turn(fewer_pairs(2), narrower_values(5)), 3: without_ffn},
}
SECOND = {0: fewer_neurons(30), 1: in_turn(narrower_values(4), fewer_neurons(35)), 2: fewer_groups(1)}


@pytest.mark.parametrize("layout", FIRST)
@torch.no_grad()
def test_a_pruned_model_is_pruned_again(tmp_path, layout):
    once = write_pruned(small_model(), FIRST[layout], tmp_path / "once")
    assert once.layout == layout
    model = load(once.folder)
    config = AutoConfig.from_pretrained(once.folder)
    architecture = Architecture(config)
    assert architecture.config.hidden_act == "silu"
    same = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for index in range(4):
        prefix = architecture.layer_prefix(index)
        own = {name.removeprefix(prefix): dims for name, dims in same.items() if name.startswith(prefix)}
        assert architecture.layer_tensors(index, architecture.dense_shape(index)) == own
    twice = write_pruned(model, SECOND, tmp_path / "twice")
    tokens = torch.randint(3, 128, (2, 20))
    # The model that was pruned once, with zeros, is the oracle of what is pruned twice.
    torch.testing.assert_close(load(twice.folder)(tokens).logits, twice.oracle(tokens).logits, atol=1e-4, rtol=1e-4)
    again = Architecture(AutoConfig.from_pretrained(twice.folder))
    assert again.dense_shape(0).ffn.width == 30
    assert (again.dense_shape(0).attention is None) == (layout == "free")
    assert (again.dense_shape(3).ffn is None) == (layout == "free")
