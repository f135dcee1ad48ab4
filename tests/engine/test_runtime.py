"""What the pool relies on Ray for."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass, replace

import pytest
import ray

from distprune.config import PruneConfig
from distprune.engine.run.preflight import check_job
from distprune.engine.scheduler.ray_cluster import WorkerPlan
from distprune.engine.scheduler.runtime import RayRuntime
from distprune.engine.worker.host_tensor import whole_of
from distprune.engine.worker.task import Task
from distprune.engine.worker.weights import weight_access


@dataclass(frozen=True)
class Look(Task):
    """Asks for what a worker was given."""


@ray.remote
class Keeper:
    """Keeps what it is given, as a worker does."""

    def __init__(self, number: int, server: ray.actor.ActorHandle, *told: bytes):
        self.server, self.told = server, whole_of(told)

    @ray.method(max_task_retries=-1)
    def run(self, kind: type[Task]) -> tuple[int, int, dict]:
        served = ray.get(self.server.read.remote("model.norm.weight")).array
        return os.getpid(), len(served), self.told


@pytest.mark.slow
def test_a_worker_whose_arguments_are_large_starts_again_when_it_is_lost(
    ray_cluster, dense_path, tmp_path, monkeypatch
):
    """The headers of the largest models may take more room than Ray sends along with a call."""
    monkeypatch.setattr("distprune.engine.scheduler.runtime.Worker", Keeper)
    config, plan = (
        PruneConfig(model=str(dense_path), output=tmp_path / "o", weights="served"),
        WorkerPlan(1, "cpu", 1, 0),
    )
    job = check_job(config)
    [info, *_] = job.checkpoint.tensors.values()
    many = dict(job.checkpoint.tensors) | {os.urandom(50).hex(): info for _ in range(3000)}  # hard to compress
    job = replace(job, model=replace(job.model, checkpoint=replace(job.checkpoint, tensors=many)))
    with weight_access(job, plan) as access:
        runtime = RayRuntime(plan, config, access)
        worker = runtime.start_worker()
        process, *kept = ray.get(runtime.call(worker, Look(), ())[0], timeout=60)
        time.sleep(1)  # for what nobody refers to any more to be deleted
        os.kill(process, signal.SIGKILL)
        again, *kept_again = ray.get(runtime.call(worker, Look(), ())[0], timeout=60)
        ray.kill(worker)
    assert again != process
    assert kept == kept_again
    width, told = kept
    assert width == 64
    assert told["model"] == json.loads(json.dumps(access.to_json()))
    assert told["model"]["model"]["tensors"].keys() == many.keys()
