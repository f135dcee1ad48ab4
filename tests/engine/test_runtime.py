"""What the pool relies on Ray for."""

from __future__ import annotations

import os
import signal
import time

import ray

from distprune.config import PruneConfig
from distprune.engine.cluster import WorkerPlan
from distprune.engine.runtime import RayRuntime
from distprune.engine.transport import whole_of


@ray.remote
class Keeper:
    """Keeps what it is given, as a worker does."""

    def __init__(self, number: int, *told: bytes):
        _, self.model, _ = whole_of(told)

    @ray.method(max_task_retries=-1)
    def look(self) -> tuple[int, bytes]:
        return os.getpid(), self.model


def test_a_worker_whose_arguments_are_large_starts_again_when_it_is_lost(ray_cluster, monkeypatch):
    """The headers of the largest models may take more room than Ray sends along with a call."""
    monkeypatch.setattr("distprune.engine.runtime.Worker", Keeper)
    model = os.urandom(200_000)  # compression does not help
    runtime = RayRuntime(WorkerPlan(1, "cpu", 1, 0), PruneConfig(model="m", output="o"), model)
    worker = runtime.start_worker()
    process, kept = ray.get(runtime.call(worker, "look")[0], timeout=60)
    time.sleep(1)  # for what nobody refers to any more to be deleted
    os.kill(process, signal.SIGKILL)
    again, kept_again = ray.get(runtime.call(worker, "look")[0], timeout=60)
    assert again != process
    assert kept == kept_again == model
    ray.kill(worker)
