"""What the pool relies on Ray for."""

from __future__ import annotations

import os
import signal
import time

import ray

from distprune.config import PruneConfig
from distprune.engine.cluster import WorkerPlan
from distprune.engine.runtime import RayRuntime
from distprune.engine.transport import Compact


@ray.remote
class Keeper:
    """Keeps what it is given, as a worker does."""

    def __init__(self, config: PruneConfig, model: Compact, device: str, number: int):
        self.model = model.value

    @ray.method(max_task_retries=-1)
    def size(self) -> tuple[int, int]:
        return os.getpid(), len(self.model)


def test_a_worker_whose_arguments_are_large_starts_again_when_it_is_lost(ray_cluster, monkeypatch):
    """The headers of the largest models take more room than Ray sends along with a call."""
    monkeypatch.setattr("distprune.engine.runtime.Worker", Keeper)
    runtime = RayRuntime(WorkerPlan(1, "cpu", 1, 0), PruneConfig(model="m", output="o"), bytes(2**20))
    worker = runtime.start_worker()
    process, size = ray.get(runtime.call(worker, "size")[0], timeout=60)
    time.sleep(1)  # for what nobody refers to any more to be deleted
    os.kill(process, signal.SIGKILL)
    again, size_again = ray.get(runtime.call(worker, "size")[0], timeout=60)
    assert again != process
    assert size == size_again == 2**20
    ray.kill(worker)
