"""Latency tables: as files, and as seconds of shapes between those that were measured."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from latency_tables import PER_PARAMETER, PER_PRODUCT, by_parameters, made_up_table
from tiny_architectures import tiny

from distprune.budgets import Target, layer_parameters
from distprune.errors import InputError
from distprune.latency import Grid, LatencyTable, predict

MODEL = tiny(hidden_size=64, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4, head_dim=16)


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = made_up_table(MODEL)
    file = tmp_path / "table.json"
    file.write_text(table.model_dump_json(indent=1))
    assert LatencyTable.read(file) == table
    assert LatencyTable.read(file).fingerprint == table.fingerprint
    slower = made_up_table(MODEL, lambda *layer: 2 * by_parameters(*layer))
    assert slower.fingerprint != table.fingerprint


def broken(**changes) -> str:
    return json.dumps(made_up_table(MODEL).model_dump(mode="json") | changes)


def with_grid(**changes) -> str:
    said = made_up_table(MODEL).model_dump(mode="json")
    said["kinds"][0]["ffn"] |= changes
    return json.dumps(said)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such latency table. Make it with `distprune measure-latency`"),
        ("{", "is not valid JSON"),
        ("[]", "is no latency table: the file: "),
        ("{}", "is no latency table: model_type: Field required. Measure again"),
        (broken(version=2), "is no latency table: version: "),
        (broken(more=1), "is no latency table: more: "),
        (broken(layers=[0, 0, 1]), "layers must be numbers of the 1 kinds"),
        (broken(workloads=[]), "workloads: "),
        (with_grid(axes={"width": [8, 8, 16]}), r"kinds\.0\.ffn: .*the values of width must ascend"),
        (with_grid(axes={"width": [8, 16]}), r"kinds\.0\.ffn: .*do not fit the axes width"),
        (with_grid(seconds=[[1, 2], [3]]), r"kinds\.0\.ffn: .*must be numbers"),
        (with_grid(seconds=[[float("inf"), 1.0]] * 2, axes={"width": [1, 2]}), r"kinds\.0\.ffn: .*must be finite"),
        (with_grid(seconds=[[1.0]] * 3, axes={"width": [8]}), "needs the seconds of 2 workloads"),
    ],
)
def test_what_is_no_table_is_refused_with_the_files_name(tmp_path, content, message):
    file = tmp_path / "table.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=rf"table\.json: .*{message}"):
        LatencyTable.read(file)


def test_seconds_are_linear_between_points_and_constant_beyond_the_last():
    grid = Grid.of({"kv_heads": [1, 3], "width": [10, 20, 40]}, np.array([[[1.0, 2, 6], [3, 4, 8]]]))
    expected = {(1, 10): 1, (3, 40): 8, (2, 10): 2, (1, 15): 1.5, (1, 30): 4, (2, 30): 5, (1, 5): 1, (9, 99): 8}
    for (heads, width), seconds in expected.items():
        assert grid.at({"kv_heads": heads, "width": width}).tolist() == [pytest.approx(seconds)]


def test_narrower_values_are_on_no_line_with_the_whole_ones():
    grid = Grid.of({"value_dim": [8, 24, 32]}, np.array([[5.0, 7, 3]]))
    found = [grid.at({"value_dim": width}).item() for width in (8, 16, 24, 30, 32)]
    assert found == pytest.approx([5, 6, 7, 7, 3])


def test_a_shape_takes_the_seconds_that_it_was_measured_to_take():
    """Ranks and widths add up as they do in the made-up machine, between the points too."""
    table, dense = made_up_table(MODEL), MODEL.dense_shape(0)
    narrow = replace(dense.attention, value_dim=2, query_rank=8, output_rank=8)
    shapes = {
        dense: 0,
        dense.with_ffn(width=100): 0,
        dense.with_ffn(width=100, branch_rank=20): 1,
        dense.with_attention(kv_heads=3, query_heads=6): 0,
        dense.with_attention(query_rank=20, key_rank=12): 2,
        dense.with_attention(value_dim=8, query_key_dim=8): 2,
        replace(dense, attention=narrow): 3,
        replace(dense, attention=None): 0,
        replace(dense, ffn=None): 0,
    }
    for shape, products in shapes.items():
        expected = PER_PARAMETER * layer_parameters(MODEL, 1, shape) + PER_PRODUCT * products
        assert table.layer_seconds(1, shape) == pytest.approx(expected, rel=1e-9), shape


def test_a_budget_counts_nanoseconds_of_the_weighted_workloads():
    table, shape = made_up_table(MODEL), MODEL.dense_shape(0)
    target = Target(MODEL, 0.3, resource="latency", latencies=table)
    prefill, decode = by_parameters(MODEL, 0, shape)
    assert target.layer_amount(0, shape) == pytest.approx(1e9 * (prefill + 10 * decode), abs=2)
    assert target.dense == 3 * target.layer_amount(0, shape)
    assert target.remaining == target.dense - round(0.3 * target.dense)


def test_no_wider_network_takes_less_of_a_budget():
    rng = np.random.default_rng(0)
    target = Target(MODEL, 0.3, resource="latency", latencies=made_up_table(MODEL, lambda *_: rng.random(2) * 1e-3))
    amounts = [target.ffn_amount(0, replace(MODEL.dense_shape(0).ffn, width=width)) for width in range(1, 193)]
    assert amounts == sorted(amounts)


def test_a_prediction_says_what_each_workload_takes():
    plan = [shape.with_ffn(width=96) for shape in MODEL.dense_shapes]
    prefill, decode = predict(made_up_table(MODEL), plan).workloads
    dense, left = (sum(layer_parameters(MODEL, 0, shapes[0]) for _ in shapes) for shapes in (MODEL.dense_shapes, plan))
    assert (prefill.dense, prefill.planned) == pytest.approx((100e-9 * dense, 100e-9 * left))
    assert decode.milliseconds_per_token == pytest.approx((1e-6 * dense, 1e-6 * left))
    assert prefill.milliseconds_per_token == pytest.approx((1e-4 * dense / 128, 1e-4 * left / 128))
    assert prefill.saved == pytest.approx(1 - left / dense)
    assert str(decode) == "decode, batch 1, 144 tokens before the new one"


def test_noise_in_what_a_rank_is_added_to_is_not_taken_for_what_the_rank_costs():
    """The dense attention's own measurement, out of all, is too short, so that the regression corrects it."""
    dense = MODEL.dense_shape(0)

    def with_an_outlier(model, index, shape):
        return by_parameters(model, index, shape) * (0.3 if shape == replace(dense, ffn=None) else 1)

    table, calm = made_up_table(MODEL, with_an_outlier), made_up_table(MODEL)
    assert (table.layer_seconds(0, dense) != calm.layer_seconds(0, dense)).all()
    factored = dense.with_attention(query_rank=8)
    assert table.layer_seconds(0, factored) == pytest.approx(calm.layer_seconds(0, factored))
