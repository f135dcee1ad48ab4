"""What pruning buys in speed and memory."""

from __future__ import annotations

import os

import pytest
from transformers import AutoConfig

from distprune import api
from distprune.calibration.whole_model import load_model
from distprune.errors import InputError
from distprune.evaluation import SpeedOptions
from distprune.evaluation.speed import Measurement, batch_speed, measure, sizes_of
from distprune.layers.architecture import Architecture
from distprune.resident import peak_resident

MIB = 2**20

SMALL = SpeedOptions(batches=(1, 2), prompt=4, new=2, rounds=2)


def test_cache_and_parameters_are_those_of_the_layers_shapes(pruned):
    folder, record = pruned
    model = load_model(folder, "cpu", "float32")
    found, sizes = measure(model, batch=2, prompt=5, new=3), sizes_of(model)

    shapes = [shape.attention for shape in Architecture(AutoConfig.from_pretrained(folder)).dense_shapes]
    assert found.cache == 4 * sum(shape.kv_heads * (shape.query_key_dim + shape.value_dim) for shape in shapes)
    assert found.prefill > 0 and found.decode > 0
    assert sizes.parameters == 4 * record.total_parameters_after
    assert sizes.peak > sizes.parameters


def test_ratios_are_medians_of_those_within_a_round():
    def made(*speeds: float) -> list[Measurement]:
        return [Measurement(speed, 2 * speed, 1.0) for speed in speeds]

    rounds = [made(10, 20), made(1, 3), made(10, 40)]  # the machine was slow in the second
    found = batch_speed(4, rounds, 1)
    assert (found.batch, found.prefill, found.decode) == (4, 20, 40)
    assert found.prefill_ratio == found.decode_ratio == 3


def test_dense_and_pruned_are_timed_in_processes_of_their_own(dense_path, pruned):
    folder, record = pruned
    before, ballast = dict(os.environ), bytearray(400 * MIB)
    dense, other = api.evaluate([str(dense_path), str(folder)], speed=SMALL, device="cpu", dtype="float32")
    assert os.environ == before
    assert (dense.perplexity, dense.tasks) == (None, {})
    assert dense.speed.parameter_bytes == 4 * record.total_parameters_before
    assert other.speed.parameter_bytes == 4 * record.total_parameters_after
    assert [made.batch for made in other.speed.batches] == [1, 2]
    assert all(made.prefill_ratio == made.decode_ratio == 1 for made in dense.speed.batches)
    assert all(made.prefill_ratio > 0 and made.decode_ratio > 0 for made in other.speed.batches)
    assert other.speed.cache_bytes_per_token == measure(load_model(folder, "cpu"), 1, 4, 2).cache
    assert other.speed.parameter_bytes < other.speed.peak_bytes < peak_resident()  # of its own process alone
    del ballast


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (1, 0)}, "--speed-batches 0: at least 1"),
        ({"batches": ()}, "--speed-batches 0: at least 1"),
        ({"new": 0}, "--speed-new 0: at least 1"),
        ({"threads": 0}, "--speed-threads 0: at least 1"),
        ({"prompt": 60, "new": 5}, "--speed-prompt 60 and --speed-new 5: .* at most 64 tokens"),
    ],
)
def test_what_cannot_be_timed_is_refused(dense_path, changes, message):
    with pytest.raises(InputError, match=message):
        api.evaluate(str(dense_path), speed=SpeedOptions(**changes))
