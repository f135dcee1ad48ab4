"""The engine's scheduler on a simulated cluster: who works when, and that nothing is lost or done twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from distprune.engine.scheduler import pool
from distprune.engine.scheduler.relay import split
from distprune.engine.scheduler.simulation import Costs, Machines, Pass, SimulatedRuntime, simulate

COSTS = Costs(
    start=10, check=5, read=3, forward=60, dense_statistics=12, profile=15, statistics=20, carried=False, solve=200,
    states=10**8, pruned=10**9,
)  # fmt: skip
ALL_AT_ONCE = Pass(layers=126, block_length=1, samples=256, micro_batch=4)
STEADY = Machines(workers=1, transfer=1e15, disk=1e15)


def busy(run: Pass) -> float:
    """What one worker has to do, from the costs alone."""
    propagated = run.layers - -(-run.layers // run.block_length)
    pruning = COSTS.read + COSTS.forward + COSTS.statistics + COSTS.solve
    dense = COSTS.read + COSTS.forward + COSTS.dense_statistics + COSTS.profile
    return run.layers * (COSTS.check + dense + pruning) + COSTS.check + propagated * COSTS.forward


@pytest.mark.parametrize("block_length", [1, 4, 126])
def test_one_worker_takes_as_long_as_all_calls_together(block_length):
    run = replace(ALL_AT_ONCE, block_length=block_length)
    outcome = simulate(COSTS, STEADY, run)
    assert outcome.busy == pytest.approx(busy(run))
    assert outcome.seconds == pytest.approx(COSTS.start + busy(run), rel=1e-6)


def test_the_first_layers_of_blocks_are_not_run_twice_where_moments_are_carried():
    def spared(block_length: int) -> float:
        run = replace(ALL_AT_ONCE, block_length=block_length)
        return busy(run) - simulate(replace(COSTS, carried=True), STEADY, run).busy

    assert [spared(length) / COSTS.forward for length in (1, 4, 126)] == pytest.approx([126, 32, 1], rel=1e-4)


def test_a_relay_is_no_faster_by_many_workers_and_blocks_are():
    def seconds(block_length: int) -> float:
        return simulate(COSTS, replace(STEADY, workers=32), replace(ALL_AT_ONCE, block_length=block_length)).seconds

    layer = COSTS.read + 2 * COSTS.forward + COSTS.statistics + COSTS.solve
    assert seconds(126) > 126 * layer - COSTS.forward
    assert seconds(1) < seconds(4) < 6 * layer


def test_thirty_two_workers_are_busy_nine_tenths_of_the_time():
    alone, many = (simulate(COSTS, replace(STEADY, workers=workers), ALL_AT_ONCE).seconds for workers in (1, 32))
    assert alone / (32 * many) > 0.9


def test_in_the_dense_pass_all_workers_work_at_once():
    free = replace(COSTS, check=0, statistics=0, solve=0, forward=64, dense_statistics=0, read=8, profile=8, start=0)
    run = Pass(layers=64, block_length=1, samples=64, micro_batch=1)
    pruning = 64 / 8 * (free.read + free.forward)
    dense = simulate(free, replace(STEADY, workers=8), run).seconds - pruning
    ideal = 64 / 8 * (free.read + free.forward + free.profile)
    assert dense < 1.2 * ideal


class Noting(SimulatedRuntime):
    """Notes every call whose results were fetched, with its method and layer."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.fetched = Counter()
        self.made = {}

    def ready(self, worker):
        result = super().ready(worker)
        self.made[result] = ("ready",)
        return result

    def call(self, worker, task, values):
        results = super().call(worker, task, values)
        self.made[results[0]] = (task.kind(), *[value for value in values[:2] if isinstance(value, int)])
        return results

    def fetch(self, results):
        values = super().fetch(results)
        self.fetched[self.made[results[0]]] += 1
        return values


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("workers", [2, 5, 16])
def test_runs_end_however_many_workers_are_lost(workers, seed, monkeypatch):
    made = []
    monkeypatch.setattr(
        "distprune.engine.scheduler.simulation.SimulatedRuntime", lambda *args: made.append(Noting(*args)) or made[-1]
    )
    run = Pass(layers=24, block_length=2, samples=16, micro_batch=1)
    monkeypatch.setattr(pool, "LOSSES", 9)  # at such a rate a call may lose five workers by chance
    outcome = simulate(COSTS, Machines(workers, losses=3.0, replaced=60), run, seed)
    assert outcome.losses > 3
    fetched, pieces = made[0].fetched, min(16, 4 * workers)
    for index in range(24):
        assert fetched["prune", index] >= 1
        assert fetched["close_layer", index, pieces] >= 1
        assert all(fetched["sweep", index, piece] >= 1 for piece in range(pieces))


def test_a_piece_is_prefetched_while_the_one_before_it_is_at_work(monkeypatch):
    """So that its worker need not wait for it to come."""
    begun, ended = {}, {}

    class Timed(SimulatedRuntime):
        def call(self, worker, task, values):
            [result, *_] = results = super().call(worker, task, values)
            if task.kind() == "sweep":
                index, piece, _ = values
                begun[index, piece], ended[index, piece] = self.clock, result.at
            return results

    monkeypatch.setattr("distprune.engine.scheduler.simulation.SimulatedRuntime", Timed)
    simulate(COSTS, replace(STEADY, workers=2), Pass(layers=4, block_length=1, samples=16, micro_batch=2))
    # All of the first layer's pieces are known from the start; one at most waits behind another.
    for piece in range(1, 8):
        assert begun[0, piece] < ended[0, piece - 1]
    for piece in range(2, 8):
        assert begun[0, piece] >= ended[0, piece - 2]


@pytest.mark.parametrize(
    ("samples", "micro_batch", "most", "lengths"),
    [(10, 3, 1, [10]), (10, 3, 2, [6, 4]), (10, 3, 9, [3, 3, 3, 1]), (2, 16, 8, [2]), (64, 4, 8, [8] * 8)],
)
def test_samples_are_split_between_micro_batches(samples, micro_batch, most, lengths):
    pieces = split(samples, micro_batch, most)
    assert [piece.stop - piece.start for piece in pieces] == lengths
    assert [piece.start for piece in pieces] == [sum(lengths[:number]) for number in range(len(lengths))]
    assert all(piece.start % micro_batch == 0 for piece in pieces)
