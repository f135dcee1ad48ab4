"""Runs of the whole engine but Ray: one worker's calls are made in this process, and hundreds of runs take seconds."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest

from distprune.engine import driver
from distprune.engine.scheduler import run_dtype
from distprune.engine.scheduler.runtime import RayRuntime
from distprune.engine.worker import weights
from distprune.engine.worker.actor import Worker


class InlineRuntime(RayRuntime):
    """Makes calls in this process, at once."""

    def start_worker(self, number, avoided=()):
        return Worker.__ray_actor_class__(number, *self._told)

    def ready(self, worker):
        return Here(worker.ready())

    def call(self, worker, task, values):
        given = worker.run(type(task), *values)
        return [Here(value) for value in given] if task.results > 1 else [Here(given)]

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


def do_without_ray(patch: pytest.MonkeyPatch) -> None:
    """From now on, runs make their calls in this process."""
    patch.setattr(os, "fsync", lambda _: None)  # the machine does not fail, and disks may be slow
    patch.setattr(driver, "RayRuntime", InlineRuntime)
    patch.setattr(driver, "connected", nullcontext)
    for module in (driver, weights):
        patch.setattr(module, "alive_nodes", lambda: [{"CPU": 1.0}])
    patch.setattr(run_dtype, "nodes_with_room", lambda _: [])
