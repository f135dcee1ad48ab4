"""The configuration: defaults, JSON round trip, refusals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from transformers import AutoConfig, LlamaConfig

from distprune.modeling import LayerShape, PrunedConfig, layer_tensor_shapes

DENSE = LayerShape(query_heads=4, kv_heads=2, query_key_dim=16, value_dim=16, ffn_width=96)
NO_ATTENTION = {"query_heads": 0, "kv_heads": 0, "query_key_dim": 0, "value_dim": 0}


def test_layer_shapes_default_to_the_dense_model(tiny):
    config = PrunedConfig(**tiny)
    assert config.dense_shape() == DENSE
    assert [config.layer_shape(index) for index in range(3)] == [DENSE] * 3


@pytest.mark.parametrize(("sliding_window", "layer_type"), [(None, "full_attention"), (8, "sliding_attention")])
def test_layers_slide_by_default_only_with_a_window(tiny, sliding_window, layer_type):
    assert PrunedConfig(**tiny, sliding_window=sliding_window).layer_types == [layer_type] * 3


def test_json_round_trip_keeps_every_field(pruned_config, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    config = pruned_config(
        base_model_type="qwen3",
        query_key_norm=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters=rope,
        eos_token_id=[2, 3],
    )
    config.save_pretrained(tmp_path)
    reread = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(reread, PrunedConfig)
    given_by_loading = {"auto_map": None, "_name_or_path": None}
    assert reread.to_dict() | given_by_loading == config.to_dict() | given_by_loading
    assert reread.layer_shape(0) == config.layer_shape(0)
    assert reread.layer_shape(0).calibration_rank == 5
    assert [reread.layer_shape(index).output_bias for index in range(3)] == [False, True, True]
    assert [reread.layer_shape(index).down_bias for index in range(3)] == [False, False, True]


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_a_layer_has_the_biases_of_the_model_and_its_own(tiny, output_bias, mlp_bias):
    own = [DENSE, replace(DENSE, output_bias=True), replace(DENSE, down_bias=True)]
    flags = {"attention_output_bias": output_bias, "mlp_bias": mlp_bias}
    config = PrunedConfig(**tiny, **flags, layer_shapes=[asdict(shape) for shape in own])
    assert config.dense_shape() == replace(DENSE, output_bias=output_bias, down_bias=mlp_bias)
    for index, shape in enumerate(own):
        found = config.layer_shape(index)
        assert found.output_bias == (shape.output_bias or output_bias)
        assert found.down_bias == (shape.down_bias or mlp_bias)
        assert set(layer_tensor_shapes(config, index, shape)) == set(layer_tensor_shapes(config, index, found))
        names = layer_tensor_shapes(config, index, shape)
        assert ("self_attn.o_proj.bias" in names) == found.output_bias
        assert ("mlp.down_proj.bias" in names) == found.down_bias
        assert ("mlp.up_proj.bias" in names) == ("mlp.gate_proj.bias" in names) == mlp_bias


@pytest.mark.parametrize("biases", [False, True])
def test_layer_shapes_written_without_biases_are_read(tiny, biases):
    written = {name: value for name, value in asdict(DENSE).items() if not name.endswith("_bias")}
    config = PrunedConfig(**tiny, attention_output_bias=biases, mlp_bias=biases, layer_shapes=[written] * 3)
    assert config.layer_shape(2) == config.dense_shape()


def test_wrong_number_of_layer_shapes_is_refused(tiny):
    with pytest.raises(ValueError, match="layer_shapes has 2 entries, but num_hidden_layers is 3"):
        PrunedConfig(**tiny, layer_shapes=[asdict(DENSE)] * 2)


def test_unknown_field_in_a_layer_shape_is_refused(tiny):
    with pytest.raises(ValueError, match=r"layer_shapes\[0\].*width"):
        PrunedConfig(**tiny, layer_shapes=[{"width": 3}] * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_heads": 3}, r"query_heads \(3\) must be a multiple of kv_heads \(2\)"),
        ({"ffn_width": -1}, "ffn_width must be a positive integer, or 0 in a layer without this part, got -1"),
        (
            {"ffn_width": 0, "down_bias": True},
            "ffn_width is 0, as in a layer without a feed-forward .* down_bias is True",
        ),
        ({"ffn_width": 0, "calibration_rank": 3}, "ffn_width is 0.*calibration_rank is 3"),
        ({"query_heads": 0}, "query_heads is 0, as in a layer without attention, but kv_heads is 2"),
        ({"query_key_dim": 0}, "query_key_dim is 0.*query_heads is 4"),
        (NO_ATTENTION | {"query_rank": 3}, "query_heads is 0.*query_rank is 3"),
        (NO_ATTENTION | {"output_bias": True}, "query_heads is 0.*output_bias is True"),
        ({"query_rank": 0}, "query_rank must be a positive integer, got 0"),
        ({"output_bias": 1}, "output_bias must be true or false, got 1"),
        ({"down_bias": None}, "down_bias must be true or false, got None"),
        ({"query_key_dim": 18}, r"query_key_dim \(18\) must be even and not exceed head_dim \(16\)"),
        ({"query_key_dim": 7}, r"query_key_dim \(7\) must be even and not exceed head_dim \(16\)"),
        ({"value_dim": 17}, r"value_dim \(17\) must not exceed head_dim \(16\)"),
    ],
)
def test_impossible_layer_shape_is_refused_by_layer_and_field(tiny, changes, message):
    shapes = [asdict(DENSE), asdict(DENSE) | changes, asdict(DENSE)]
    with pytest.raises(ValueError, match=r"layer_shapes\[1\]: " + message):
        PrunedConfig(**tiny, layer_shapes=shapes)


def test_rotary_pairs_stay_where_queries_and_keys_are_normed(tiny):
    config = PrunedConfig(**tiny, layer_shapes=[asdict(DENSE) | {"query_key_dim": 8}] * 3)
    assert config.layer_shape(1).query_key_dim == 8
    absent = asdict(DENSE) | NO_ATTENTION
    assert (
        not PrunedConfig(**tiny, query_key_norm=True, layer_shapes=[absent, asdict(DENSE), absent])
        .layer_shape(0)
        .has_attention
    )
    with pytest.raises(ValueError, match=r"layer_shapes\[0\]: query_key_dim \(8\) .* query_key_norm"):
        PrunedConfig(**tiny, query_key_norm=True, layer_shapes=config.layer_shapes)


def test_a_model_keeps_attention_somewhere(tiny):
    with pytest.raises(ValueError, match="no layer with attention"):
        PrunedConfig(**tiny, layer_shapes=[asdict(DENSE) | NO_ATTENTION] * 3)


def test_biases_of_the_model_are_not_of_parts_that_a_layer_lacks(tiny):
    shapes = [asdict(DENSE) | NO_ATTENTION, asdict(DENSE) | {"ffn_width": 0}, asdict(DENSE)]
    config = PrunedConfig(**tiny, attention_output_bias=True, mlp_bias=True, layer_shapes=shapes)
    assert [config.layer_shape(index).output_bias for index in range(3)] == [False, True, True]
    assert [config.layer_shape(index).down_bias for index in range(3)] == [True, False, True]


def test_caches_are_made_for_the_layers_with_attention(tiny):
    absent = asdict(DENSE) | NO_ATTENTION
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    shapes = [absent, asdict(DENSE), asdict(DENSE)]
    config = PrunedConfig(**tiny, sliding_window=6, layer_types=types, layer_shapes=shapes)
    cached = config.get_text_config(decoder=True)
    assert cached.get_text_config(decoder=True).layer_types == types[1:]
    assert cached.num_hidden_layers == 2
    assert config.get_text_config() is config
    assert config.to_dict()["layer_types"] == types
    dense = PrunedConfig(**tiny)
    assert dense.get_text_config(decoder=True) is dense


def test_layer_shape_checks_itself():
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        replace(DENSE, kv_heads=3)


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        (["linear_attention"] * 3, "linear_attention"),
        (["sliding_attention"] * 3, "sliding_window must be given"),
    ],
)
def test_layer_types_the_model_cannot_run_are_refused(tiny, layer_types, message):
    with pytest.raises(ValueError, match=message):
        PrunedConfig(**tiny, layer_types=layer_types)


def described(config: PrunedConfig) -> dict:
    """All that it says, but where it lies and what code belongs to it."""
    return config.to_dict() | {"_name_or_path": None, "auto_map": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_type": "mistral", "sliding_window": 16, "hidden_act": "gelu"},
        {
            "base_model_type": "qwen2",
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        {"base_model_type": "qwen3", "query_key_norm": True, "tie_word_embeddings": True},
    ],
    ids=lambda changes: changes["base_model_type"],
)
def test_what_is_written_is_of_the_base_models_type_and_is_read_back_as_it_was(tiny, changes, tmp_path):
    config = PrunedConfig(**tiny | changes)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == changes["base_model_type"]
    for opened in (PrunedConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(opened) is PrunedConfig
        assert described(opened) == described(config)
    opened, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, use_cache=False, other=1)
    assert (opened.use_cache, unused) == (False, {"other": 1})


def test_a_configuration_that_says_distprune_itself_still_opens(tiny, tmp_path):
    """As checkpoints of earlier versions do."""
    config = PrunedConfig(**tiny)
    (tmp_path / "config.json").write_text(config.to_json_string())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "distprune"
    assert described(AutoConfig.from_pretrained(tmp_path)) == described(config)


def test_other_models_open_as_they_did(tmp_path):
    LlamaConfig(hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaConfig
