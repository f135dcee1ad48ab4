"""A Ray cluster on one machine, whose nodes and workers can be lost."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster as RayCluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MIB = 2**20
STORE = 80 * MIB  # about the least that Ray accepts
# A node that is gone is known to be within a second.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}


class Cluster:
    """A head without CPUs, where drivers join, and two to four nodes for workers, which come and go."""

    FEWEST, MOST = 2, 4

    def __init__(self, random: Random):
        self._random = random
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": HEALTH}
        self._ray = RayCluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        self._hogs: list[Any] = []
        self.refill()

    @property
    def address(self) -> str:
        return self._ray.address

    @property
    def nodes(self) -> list[Any]:
        """Those for workers, in an order that does not depend on chance."""
        return sorted(self._ray.worker_nodes, key=lambda node: node.unique_id)

    def refill(self) -> None:
        """See that there are as many nodes as at the beginning."""
        while len(self.nodes) < self.FEWEST:
            self.add_node()

    def add_node(self) -> bool:
        if len(self.nodes) == self.MOST:
            return False
        self._ray.add_node(num_cpus=self._random.choice((1, 1, 2)), object_store_memory=STORE)
        return True

    def lose_node(self) -> bool:
        """Every process of a node vanishes, as when a machine loses its power."""
        at_work = [node for node in self.nodes if workers_on(node)]
        if not at_work:
            return False
        self._ray.remove_node(self._random.choice(at_work), allow_graceful=False)
        return True

    def workers(self) -> list[psutil.Process]:
        """The processes of the run's workers."""
        return [worker for node in self.nodes for worker in workers_on(node)]

    def fill_stores(self, seconds: float) -> None:
        """For a while, objects of three times each store's size push those of the run out to the disk."""

        @ray.remote(num_cpus=0, max_retries=0)
        def fill_store() -> None:
            held = [ray.put(np.ones(STORE // 8, np.uint8)) for _ in range(3 * 8)]
            time.sleep(seconds)
            del held

        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                self._hogs.append(fill_store.options(scheduling_strategy=there).remote())

    def empty_stores(self) -> None:
        """Wait until nothing fills them any more."""
        if self._hogs:
            ray.wait(self._hogs, num_returns=len(self._hogs), timeout=60)
        self._hogs.clear()

    def close(self) -> None:
        ray.shutdown()
        self._ray.shutdown()


def workers_on(node: Any) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [child for child in raylet.children(recursive=True) if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::Worker")
    except (psutil.Error, IndexError):  # it has ended
        return False
