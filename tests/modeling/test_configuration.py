"""The configuration: defaults, JSON round trip, refusals."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from transformers import AutoConfig

from distprune.modeling import LayerShape, PrunedConfig, layer_tensor_shapes

DENSE = LayerShape(query_heads=4, kv_heads=2, query_key_dim=16, value_dim=16, ffn_width=96)


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
        ({"ffn_width": 0}, "ffn_width must be a positive integer, got 0"),
        ({"query_rank": 0}, "query_rank must be a positive integer, got 0"),
        ({"output_bias": 1}, "output_bias must be true or false, got 1"),
        ({"down_bias": None}, "down_bias must be true or false, got None"),
        ({"query_key_dim": 8}, r"query_key_dim \(8\) must equal head_dim \(16\)"),
        ({"value_dim": 17}, r"value_dim \(17\) must not exceed head_dim \(16\)"),
    ],
)
def test_impossible_layer_shape_is_refused_by_layer_and_field(tiny, changes, message):
    shapes = [asdict(DENSE), asdict(DENSE) | changes, asdict(DENSE)]
    with pytest.raises(ValueError, match=r"layer_shapes\[1\]: " + message):
        PrunedConfig(**tiny, layer_shapes=shapes)


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
