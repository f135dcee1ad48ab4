"""What of a run becomes which figure; that they can be scraped is tested where a whole cluster is up."""

from __future__ import annotations

import gc
import time

import pytest

from distprune.engine.telemetry import harmless
from distprune.engine.telemetry import metrics
from distprune.engine.telemetry.metrics import MemoryMetrics, RunMetrics
from distprune.engine.telemetry.progress import Assignment, Progress, WorkerName

A, B, PRUNE = WorkerName(0, "node"), WorkerName(1, "node"), Assignment("prune", 3)


@pytest.fixture
def figures(monkeypatch) -> dict[tuple, float | list[float]]:
    """By name and tags, what Ray would be told: the last value, the sum, or every observation."""
    found: dict[tuple, float | list[float]] = {}

    class Figure:
        def __init__(self, name, description, *rest):
            self.name = name

        def key(self, tags):
            return self.name, *tags.values()

        def set(self, value, tags):
            found[self.key(tags)] = value

        def inc(self, value, tags):
            assert value > 0  # as Ray does
            found[self.key(tags)] = found.get(self.key(tags), 0) + value

        def observe(self, value, tags):
            found.setdefault(self.key(tags), []).append(value)

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Figure)
    return found


def test_steps_calls_workers_and_bytes_are_counted(figures):
    with RunMetrics("out") as run:
        run.stage("Pruning", 80, 10)
        for worker in (A, B):
            run.joining(WorkerName(worker.number))
            run.joined(worker)
            run.began(worker, PRUNE)
        run.moved(100)
        run.ended(A, PRUNE, 2.5)
        run.advance()
        run.moved(20)
        run.lost(B, PRUNE)
        run.lost(A, None)
        run.joined(A)
        assert figures["distprune_workers", "out"] == 1
        run.ended(A, Assignment("prune", 4), 0.0)
    assert figures["distprune_stage_steps", "out", "Pruning"] == 80
    assert figures["distprune_stage_steps_done", "out", "Pruning"] == 11
    assert 0 < figures["distprune_stage_seconds", "out", "Pruning"] < 60
    assert figures["distprune_call_seconds", "out", "prune"] == [2.5, 0.0]
    assert figures["distprune_busy_seconds", "out", "prune"] == 2.5
    assert figures["distprune_calls_lost", "out", "prune"] == 1
    assert figures["distprune_object_store_bytes", "out"] == 120
    assert figures["distprune_workers", "out"] == 0


@pytest.mark.parametrize("name", ["größe-出力", "b\udcff"])
def test_ray_takes_the_figures_of_a_run_whatever_its_name(name, caplog):
    with RunMetrics(name) as run:
        run.stage("Pruning", 80, 10)
        run.joined(A)
        run.ended(A, PRUNE, 2.5)
        run.lost(A, PRUNE)
        run.moved(3)


def test_figures_that_fail_neither_end_a_run_nor_are_told_of_twice(prune_here, tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no agent")

    monkeypatch.setattr(harmless, "_told", set())
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(getattr(metrics, kind), "_record", broken, raising=False)
        monkeypatch.setattr(getattr(metrics, kind), "set", broken, raising=False)
    prune_here(tmp_path / "größe-出力", distill=None)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["metrics can't be told of the run, which continues (RuntimeError: no agent)"]


def test_figures_that_can_not_be_made_do_not_end_a_run(prune_here, tmp_path, monkeypatch):
    def broken(*_):
        raise ImportError("no metrics here")

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, broken)
    prune_here(tmp_path / "pruned", distill=None)


def test_an_interruption_is_no_failure_of_a_display():
    class Stops(Progress):
        def advance(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), harmless.Unfailing("the display", Stops) as display:
        display.advance()


def test_a_worker_tells_its_memory_for_as_long_as_it_is_there(figures, monkeypatch):
    monkeypatch.setattr(metrics, "LOOK_EVERY", 0.01)

    class Worker:
        pass

    worker = Worker()
    thread = MemoryMetrics(worker, "out", 3)
    thread.start()
    deadline = time.monotonic() + 10
    while ("distprune_worker_device_bytes", "out", "3") not in figures and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 50 * 2**20 < figures["distprune_worker_resident_bytes", "out", "3"] < 2**36
    assert figures["distprune_worker_device_bytes", "out", "3"] == 0
    del worker
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
