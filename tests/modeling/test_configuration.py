"""The configuration: defaults, JSON round trip, refusals."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from transformers import AutoConfig

from distprune.modeling import LayerShape, PrunedConfig

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
