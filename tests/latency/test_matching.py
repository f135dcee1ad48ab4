"""Tables and targets that don't go together are refused before a run begins."""

from __future__ import annotations

import pytest
from latency_tables import made_up_table
from tiny_architectures import tiny

from distprune.config import PruneConfig
from distprune.errors import InputError
from distprune.latency import latency_table_for

MODEL = tiny()


def found(model=MODEL, **options):
    return latency_table_for(PruneConfig(model="m", output="o", **options), model)


@pytest.fixture
def table(tmp_path):
    def write(model=MODEL, **changes):
        file = tmp_path / "table.json"
        file.write_text(made_up_table(model, **changes).model_dump_json())
        return file

    return write


def test_the_table_of_the_model_is_found_and_other_targets_need_none(table):
    assert found(target="latency", latency_table=table()) == made_up_table(MODEL)
    assert found(target="flops") is None


def test_where_it_was_measured_does_not_matter(table):
    file = table(device="NVIDIA H100 80GB HBM3", dtype="bfloat16", threads=64)
    assert found(target="latency", latency_table=file).conditions == "NVIDIA H100 80GB HBM3, bfloat16, 64 threads"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"hidden_size": 32}, "its hidden size is 32, and that of the model to prune is 24"),
        ({"num_hidden_layers": 4}, "its layers is 4"),
        ({"model_type": "qwen3"}, "its model_type is qwen3"),
        ({"intermediate_size": 88}, "its layer 0 has the shape .*88"),
        ({"num_key_value_heads": 4}, "its layer 0 has the shape "),
    ],
)
def test_another_models_table_is_refused(table, changes, difference):
    file = table(tiny(**changes))
    with pytest.raises(InputError, match=rf"table\.json: was measured for another model: {difference}.*Measure again"):
        found(target="latency", latency_table=file)


def test_a_target_without_a_table_and_a_table_without_the_target_are_refused(table):
    with pytest.raises(InputError, match=r"--target latency: needs --latency-table.*measure-latency"):
        found(target="latency")
    with pytest.raises(InputError, match=r"--latency-table .*table\.json: belongs to --target latency"):
        found(target="flops", latency_table=table())


def test_embeddings_that_were_not_measured_are_refused(table):
    with pytest.raises(InputError, match="--count-embeddings: a latency table says nothing"):
        found(target="latency", latency_table=table(), count_embeddings=True)


def test_mixtures_of_experts_are_refused(table):
    with pytest.raises(InputError, match=r"--target latency: the latency of mixtures .*active-parameters"):
        found(tiny("mixtral"), target="latency", latency_table=table())
