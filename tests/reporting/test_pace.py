"""The time that a stage still takes, against stages whose end is known."""

from __future__ import annotations

import heapq

import pytest

from distprune.reporting.pace import Pace


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def estimates(chains: list[list[float]], workers: int) -> list[tuple[float, float | None]]:
    """Blocks of layers in parallel, by a greedy schedule: when, and how long it was said to take, at every end."""
    clock = Clock()
    pace, total = Pace(clock), sum(map(len, chains))
    pace.stage(total, 0)
    queue, idle = [(number, 0) for number in range(len(chains))], list(range(workers))
    running: list[tuple[float, int, int, int]] = []
    told = []

    def dispatch() -> None:
        while queue and idle:
            worker, (chain, layer) = idle.pop(0), queue.pop(0)
            pace.began(worker, 100 * chain + layer)
            heapq.heappush(running, (clock.now + chains[chain][layer], worker, chain, layer))

    dispatch()
    while running:
        clock.now, worker, chain, layer = heapq.heappop(running)
        pace.ended(worker)
        idle.append(worker)
        pace.advance()
        if layer + 1 < len(chains[chain]):
            queue.append((chain, layer + 1))
        dispatch()
        told.append((clock.now, pace.time_left()))
    return told


@pytest.mark.parametrize(
    ("chains", "layers", "workers"),
    [(1, 12, 4), (12, 1, 4), (20, 4, 8), (3, 8, 8), (4, 6, 1), (9, 1, 8)],
)
def test_the_time_left_is_that_of_the_schedule(chains, layers, workers):
    """A relay, all layers at once, more blocks than workers and fewer, one worker, and a last layer alone."""
    told = estimates([[10.0] * layers] * chains, workers)
    end = told[-1][0]
    # Of layers that end at the same moment, the first are told before the workers have what they do next.
    settled = [pair for pair, after in zip(told, [*told[1:], (end + 1, 0.0)], strict=True) if pair[0] < after[0]]
    assert len(settled) == end / 10
    for now, left in settled:
        assert left == pytest.approx(end - now, abs=1e-9)


def test_unequal_layers_are_estimated_within_a_third():
    chains = [[8.0 + (7 * number + 3 * layer) % 9 for layer in range(4)] for number in range(20)]
    told = estimates(chains, 8)
    end = told[-1][0]
    for now, left in told[4:-8]:
        assert left == pytest.approx(end - now, rel=1 / 3)


def test_between_two_ends_the_time_goes_down():
    clock = Clock()
    pace = Pace(clock)
    pace.stage(10, 4)
    pace.began("a", 4)
    assert pace.time_left() is None
    clock.now = 10
    pace.ended("a")
    pace.advance()
    pace.began("a", 5)
    assert pace.time_left() == 50
    clock.now = 17
    assert pace.time_left() == 43


def test_what_a_worker_does_for_one_layer_is_one_step():
    """As in the dense pass: reading, running and solving; the time until the next layer is not its own."""
    clock = Clock()
    pace = Pace(clock)
    pace.stage(3, 0)
    for layer in range(2):
        for seconds in (1, 6, 3):
            pace.began("a", layer)
            clock.now += seconds
            pace.ended("a")
        pace.advance()
        clock.now += 100
    pace.began("a", 2)
    clock.now += 4
    assert pace.time_left() == pytest.approx(6)


def test_a_lost_worker_no_longer_counts():
    clock = Clock()
    pace = Pace(clock)
    pace.stage(9, 0)
    for worker in "ab":
        pace.began(worker, 0)
    clock.now = 10
    pace.ended("a")
    pace.advance()
    pace.began("a", 1)
    assert pace.time_left() == 40  # of the eight left, b's is due and each takes as many as the other
    pace.gone("b")
    assert pace.time_left() == 80


def test_a_stage_that_is_done_takes_no_more_time():
    pace = Pace(Clock())
    pace.stage(2, 2)
    assert pace.time_left() == 0
