"""What solves are said to take, against counts written out by hand, and for every shape that there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_architectures import tiny

from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape
from distprune.layers.sites import ATTENDED, NEURONS
from distprune.methods import METHODS
from distprune.methods.work import Problem, SolveWork, inverses, matrix_parameters
from distprune.statistics import Gram

ATTENTION, FFN = AttentionShape(8, 4, 16, 16), FeedForwardShape(256)
DENSE = LayerShape(ATTENTION, FFN)


def test_weights_are_those_of_the_models_matrices():
    for shape in (DENSE, DENSE.with_ffn(is_gated=False), DENSE.with_attention(query_rank=5, output_rank=7)):
        hidden = 64
        attention = shape.attention
        queries = 128 * hidden if attention.query_rank is None else 5 * (128 + hidden)
        output = 128 * hidden if attention.output_rank is None else 7 * (128 + hidden)
        ffn = (3 if shape.ffn.is_gated else 2) * 256 * hidden
        assert matrix_parameters(hidden, shape) == queries + 2 * 64 * hidden + output + ffn
    model = tiny()
    matrices = sum(a * b for a, *rest in model.layer_tensors(0, model.dense_shape(0)).values() for b in rest)
    assert matrix_parameters(model.hidden_size, model.dense_shape(0)) == matrices


def test_a_method_that_does_not_say_inverts_its_gram_matrices():
    problem = Problem(64, DENSE, None, [Gram(ATTENDED), Gram(NEURONS)])
    assert inverses(problem).float64 == 128**3 + 4 * 128**2 * 64 + 256**3 + 4 * 256**2 * 64
    assert inverses(problem).workspace == 16 * 256**2 + 16 * 256 * 64


def test_work_adds_up_and_the_greater_workspace_counts():
    first, second = SolveWork(1, 2, 3, 4, 100), SolveWork(10, 20, 30, 40, 50, ((DENSE, []),))
    assert first + second == SolveWork(11, 22, 33, 44, 100, ((DENSE, []),))
    assert first.beside(5).workspace == 105 and SolveWork().beside(5) == SolveWork()


def narrower(shape: LayerShape) -> LayerShape:
    """About half of each part, as a method of units would have it."""
    if shape.attention:
        shape = shape.with_attention(query_heads=4, kv_heads=2)
    return shape.with_ffn(width=128) if shape.ffn else shape


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "dense",
    [DENSE, replace(DENSE, attention=None), replace(DENSE, ffn=None), DENSE.with_ffn(is_gated=False)],
    ids=["both", "no attention", "no ffn", "no gate"],
)
def test_every_method_says_what_every_layer_takes(name, dense):
    method = METHODS[name]()
    planned = narrower(dense)
    if name == "olica" and dense.attention:
        planned = dense.with_attention(value_dim=8, query_rank=8, key_rank=8)
    profiling = method.solve_work(
        Problem(64, dense, None, [*method.dense_moments(dense), *method.gradient_moments(dense)])
    )
    pruning = method.solve_work(Problem(64, dense, planned, method.pruning_moments(dense, planned)))
    for work in (profiling, pruning):
        numbers = work.float32, work.float64, work.eigen, work.passed, work.workspace
        assert all(0 <= number < 1e12 for number in numbers)
    assert pruning.passed > 0
    assert all(shape.attention or not dense.attention for shape, _ in pruning.observations)
