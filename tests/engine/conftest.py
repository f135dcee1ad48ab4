"""Runs of the whole engine but Ray: one worker's calls are made in this process, and hundreds of runs take seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from distprune import prune
from distprune.engine import RunRecord, driver, pool, run_dtype, weights
from distprune.engine.scheduler.runtime import RayRuntime
from distprune.engine.worker.actor import Worker

OPTIONS = {
    "method": "olica",
    "sparsity": 0.3,
    "max_shard_size": 160_000,
    "propagation": 2,
    "distill": {"learning_rate": 1e-3, "batch": 2},
}


class InlineRuntime(RayRuntime):
    """Makes calls in this process, at once."""

    def start_worker(self, number, avoided=()):
        return Worker.__ray_actor_class__(number, *self._told)

    def call(self, worker, method, arguments=()):
        values = getattr(worker, method)(*arguments)
        return [Here(value) for value in values] if isinstance(values, tuple) else [Here(values)]

    def wait(self, results, count=1, timeout=None):
        return list(results)[:count]

    def draining(self):
        return {}

    def holds_results_of(self, site):
        return False

    def fetch(self, results):
        return [result.value for result in results]

    def put(self, value):
        return value

    def get(self, put):
        return put

    def stop(self, workers, starting):
        pass


class Here:
    """A result that is there; unlike its value, it can be a key."""

    def __init__(self, value):
        self.value = value


@pytest.fixture
def prune_here(monkeypatch, save_model, calibrate) -> Callable[..., RunRecord]:
    """Prunes a Llama of three layers, or another model, into a folder, with every stage there is, in this process."""
    monkeypatch.setattr(driver, "RayRuntime", InlineRuntime)
    monkeypatch.setattr(driver, "connected", nullcontext)
    for module in (driver, weights):
        monkeypatch.setattr(module, "alive_nodes", lambda: [{"CPU": 1.0}])
    monkeypatch.setattr(run_dtype, "nodes_with_room", lambda _: [])
    llama = save_model(num_hidden_layers=3)

    def prune_one(output: Path, model: Path = llama, **changes) -> RunRecord:
        options = {"device": "cpu", "workers": 1, "micro_batch": 3, **OPTIONS} | changes
        if "calibration" not in options:
            options["calibration"] = calibrate(model)
        return prune(str(model), output, **options)

    return prune_one


@pytest.fixture
def lose(new_workers, calls, monkeypatch):
    """Lets the worker that is given one of the chosen calls die before it gets to it. Gives the calls."""
    lost = []

    def choose(is_chosen) -> list[pool.Call]:
        hand = pool.WorkerPool._hand

        def kill_and_hand(self, share):
            if is_chosen(share):
                share.worker.__ray_call__.remote(lambda _: os.kill(os.getpid(), signal.SIGKILL))
                lost.append(share.call)
            return hand(self, share)

        monkeypatch.setattr(pool.WorkerPool, "_hand", kill_and_hand)
        return lost

    return choose
