"""What one worker needs is what the plan of a whole run says of each."""

from __future__ import annotations

import pytest

from distprune.config import PruneConfig
from distprune.planning import Cluster, worker_needs
from distprune.planning.memory import CUDA_CONTEXT, FRAGMENTATION
from distprune.planning.model_from_headers import open_headers


def needs(model, device: str, **options) -> tuple[int, int]:
    config = PruneConfig(model=str(model), output="pruned", dtype="bfloat16", **options)
    return worker_needs(config, open_headers(config.model), device)


def test_a_gpu_must_hold_what_the_plan_gives_to_one_worker(plan, headers_70b):
    planned = plan(headers_70b, Cluster(gpus=8), method="slimgpt").memory
    device, resident = needs(headers_70b, "cuda", method="slimgpt", workers=3, gpus_per_worker=0.25)
    assert device == planned.gpu == pytest.approx(FRAGMENTATION * planned.worker_device + CUDA_CONTEXT)
    assert resident == planned.worker_resident - planned.store


def test_on_the_cpu_a_worker_needs_no_gpu_and_the_whole_model_at_no_time(plan, small, monkeypatch):
    monkeypatch.setattr("distprune.planning.needs.LITTLE", 1e12)  # as if the host were small
    planned = plan(small, Cluster(cpus=1)).memory
    device, resident = needs(small, "cpu")
    assert device == 0
    assert 0 < resident < planned.worker_resident


def test_a_model_that_the_host_holds_many_times_over_is_not_rehearsed(small, monkeypatch):
    monkeypatch.setattr("distprune.planning.needs.make_scenario", None)
    assert needs(small, "cpu") == (0, 0)
