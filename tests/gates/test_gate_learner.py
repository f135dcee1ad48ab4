"""Gates learn which of them a loss needs, and keep as many as the target says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distprune.gates import GateLearner, GateSchedule, open_probability

SCHEDULE = GateSchedule(steps=300, rate=0.1, multiplier_rate=0.5, ramp=200, seed=3)
#: What the loss falls by where a gate is open, for two layers.
WORTH = [{"a": torch.linspace(0.0, 1.0, 20)}, {"a": torch.linspace(0.0, 1.0, 20), "b": torch.full((2, 3), 2.0)}]


def learner(schedule: GateSchedule = SCHEDULE) -> GateLearner:
    start = [{name: torch.full(worth.shape, 2.0) for name, worth in layer.items()} for layer in WORTH]
    shares = [{name: torch.tensor(0.02) for name in layer} for layer in WORTH]
    return GateLearner(start, shares, target=0.7, schedule=schedule)


def take(learning: GateLearner, steps: int) -> list[dict[str, Tensor]]:
    """Steps on the loss -Σ worth · z / 10, given as if of ten tokens. Returns the gates of the last."""
    gates = []
    for _ in range(steps):
        gates = learning.gates()
        learning.learn([{name: -worth for name, worth in layer.items()} for layer in WORTH], tokens=10)
    return gates


def test_the_gates_that_are_worth_least_close_and_as_many_stay_as_the_target_says():
    learning = learner()
    assert learning.size > 0.98
    take(learning, SCHEDULE.steps)
    assert learning.size == pytest.approx(0.7, abs=0.05)
    first, second = learning.log_alpha
    for layer in (first, second):
        opened = open_probability(layer["a"])
        assert opened[:4].max() < 0.1 and opened[-4:].min() > 0.9
    assert open_probability(second["b"]).min() > 0.9


def test_gates_are_the_same_when_asked_again_and_others_in_the_next_step():
    learning = learner()
    before, again = learning.gates(), learning.gates()
    take(learning, 1)
    after = learning.gates()
    assert torch.equal(before[1]["b"], again[1]["b"]) and before[1]["b"].shape == (2, 3)
    assert not torch.equal(before[0]["a"], after[0]["a"])
    assert not torch.equal(learner(GateSchedule(300, 0.1, 0.5, 200, seed=4)).gates()[0]["a"], before[0]["a"])


def test_learning_goes_on_from_a_state_as_if_it_had_never_stopped():
    whole, first = learner(), learner()
    take(whole, 7)
    take(first, 4)
    second = learner()
    second.take_up({name: tensor.clone() for name, tensor in first.state().items()})
    take(second, 3)
    assert whole.steps == second.steps == 7
    for own, other in zip(whole.log_alpha, second.log_alpha, strict=True):
        assert all(torch.equal(own[name], other[name]) for name in own)


def test_the_number_of_threads_changes_nothing():
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            start = [{"a": torch.full((100_000,), 2.0)}]
            learning = GateLearner(start, [{"a": torch.tensor(1e-5)}], 0.5, SCHEDULE)
            learning.learn([{"a": torch.randn(100_000, generator=torch.Generator().manual_seed(0))}], tokens=1)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        found.append(learning.log_alpha[0]["a"])
    assert torch.equal(*found)


@torch.no_grad()
def test_it_learns_where_gradients_are_switched_off():
    learning = learner()
    before = learning.log_alpha[0]["a"].clone()
    take(learning, 1)
    assert not torch.equal(learning.log_alpha[0]["a"], before)
