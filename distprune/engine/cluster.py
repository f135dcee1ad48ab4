"""Joining or starting Ray, and how many workers of which kind a run gets there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from distprune.config import PruneConfig
from distprune.errors import InputError


@contextmanager
def connected(config: PruneConfig) -> Iterator[None]:
    """Inside, Ray is up: the one already joined, the cluster at the address, or one started here for this run."""
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address == "local":
            # A laptop may be asked for more workers than it has cores.
            cpus = max(os.cpu_count() or 1, (config.workers or 1) * config.threads_per_worker)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}. Check --address and RAY_ADDRESS.") from None
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers a run has and what each asks Ray for."""

    count: int
    device: str
    cpus: float
    gpus: float


def plan_workers(config: PruneConfig, resources: dict[str, float], layers: int) -> WorkerPlan:
    """Workers for a cluster with the given total ``resources`` (as ``ray.cluster_resources()`` gives them).

    Raises:
        InputError: not even one worker fits the cluster.
    """
    cluster_cpus, cluster_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    device = config.device if config.device != "auto" else "cuda" if cluster_gpus else "cpu"
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(device == "cuda")
    cpus = config.threads_per_worker

    fitting = int(cluster_cpus // cpus)
    if gpus:
        fitting = min(fitting, int(cluster_gpus // gpus))
    if fitting < 1:
        raise InputError(
            f"no worker fits the Ray cluster: each asks for {cpus} CPUs and {gpus:g} GPUs, the cluster has "
            f"{cluster_cpus:g} and {cluster_gpus:g}. Lower --threads-per-worker, or give --device cpu."
        )
    return WorkerPlan(min(config.workers or fitting, layers), device, cpus, gpus)
