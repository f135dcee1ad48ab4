"""The gate: which numbers keep a model from shipping."""

from __future__ import annotations

import pytest

from distprune import InputError
from distprune.pipeline.gate import Miss, check_metrics, judge
from distprune.pipeline.measuring import Measured
from distprune.pipeline.settings import GateConfig

DENSE = Measured(10.0, {"arc": {"acc": 0.6, "acc_norm": 0.5}})


def gate(**bounds) -> GateConfig:
    return GateConfig.model_validate(bounds)


@pytest.mark.parametrize(
    ("bound", "perplexity", "limit"),
    [
        ({"at_most": 12}, 12.5, 12),
        ({"at_most_times_dense": 1.3}, 13.5, 13),
        ({"at_least": 14}, 13, 14),
        ({"at_least_times_dense": 0.9}, 8.5, 9),
    ],
)
def test_a_number_is_held_to_its_bound_and_told_against_it(bound, perplexity, limit):
    (name,) = bound
    (miss,) = judge(gate(perplexity=bound), DENSE, Measured(perplexity))
    assert miss == Miss("perplexity", perplexity, name, pytest.approx(limit))
    assert str(miss) == f"perplexity {perplexity:g} is {'above' if 'most' in name else 'below'} {limit} ({name})"
    assert judge(gate(perplexity=bound), DENSE, Measured(limit)) == []


def test_every_bound_that_is_broken_is_told():
    asked = gate(
        perplexity={"at_most": 12, "at_most_times_dense": 1.1},
        tasks={"arc": {"acc": {"at_least": 0.5, "at_least_times_dense": 0.95}, "acc_norm": {"at_least": 0.4}}},
    )
    pruned = Measured(11.5, {"arc": {"acc": 0.55, "acc_norm": 0.45}})
    assert [(miss.metric, miss.bound) for miss in judge(asked, DENSE, pruned)] == [
        ("perplexity", "at_most_times_dense"),
        ("arc acc", "at_least_times_dense"),
    ]
    assert judge(gate(), DENSE, pruned) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bounds", [{}, {"perplexity": {"at_least": 0.0}}, {"perplexity": {"at_most": 1e9}}])
def test_what_is_not_finite_never_ships(value, bounds):
    (miss,) = judge(gate(**bounds), DENSE, Measured(value))
    assert (miss.metric, miss.bound) == ("perplexity", "finite")
    assert str(miss) == f"perplexity is {value}, which is no number to ship"


def test_no_number_passes_a_bound_that_is_relative_to_a_broken_dense_model():
    bound = gate(perplexity={"at_most_times_dense": 1.5})
    assert judge(bound, Measured(float("nan")), Measured(9.0))


def test_a_metric_that_a_task_does_not_give_is_named_with_those_it_gives():
    check_metrics(gate(tasks={"arc": {"acc": {"at_least": 1}}}), DENSE)
    with pytest.raises(InputError, match=r"gate\.tasks\.arc\.f1: arc gives no 'f1', but acc, acc_norm\."):
        check_metrics(gate(tasks={"arc": {"f1": {"at_least": 1}}}), DENSE)
    with pytest.raises(InputError, match=r"gate\.tasks\.boolq\.acc: boolq gives no scores, but arc do\."):
        check_metrics(gate(tasks={"boolq": {"acc": {"at_least": 1}}}), DENSE)
