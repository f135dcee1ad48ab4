"""A Ray cluster on one machine, whose nodes and workers can be lost."""

from __future__ import annotations

import os
import time
from random import Random
from typing import Any

import numpy as np
import psutil
import ray
from chaos_driver import FORK, write_output_to
from ray.cluster_utils import Cluster as RayCluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MIB = 2**20
PATIENCE = 60  # seconds
STORE = 80 * MIB  # about the least that Ray accepts
SETTINGS = {
    # A node that is gone is known to be within a second.
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_failure_threshold": 3,
    # Small values go through the object store, as a large model's do.
    "max_direct_call_object_size": 1000,
}


class Cluster:
    """A head without CPUs, where drivers join, and two to four nodes for workers, which come and go."""

    FEWEST, MOST = 2, 4

    def __init__(self, random: Random):
        self._random = random
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": SETTINGS}
        self._ray = RayCluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []  # those for workers
        self._hogs: list[Any] = []
        self.restore()

    @property
    def address(self) -> str:
        return self._ray.address

    def restore(self) -> None:
        """See that there are as many nodes as at the beginning."""
        while len(self.nodes) > self.FEWEST:
            self._ray.remove_node(self.nodes.pop())
        while len(self.nodes) < self.FEWEST:
            self.add_node()

    def add_node(self) -> bool:
        if len(self.nodes) == self.MOST:
            return False
        self.nodes.append(self._ray.add_node(num_cpus=self._random.choice((1, 1, 2)), object_store_memory=STORE))
        return True

    def lose_node(self) -> bool:
        """Every process of a node vanishes, as when a machine loses its power."""
        at_work = [node for node in self.nodes if actors_on(node, "Worker")]
        if not at_work:
            return False
        lost = self._random.choice(at_work)
        self.nodes.remove(lost)
        self._ray.remove_node(lost, allow_graceful=False)
        return True

    def workers(self) -> list[psutil.Process]:
        """The processes of the run's workers."""
        return [worker for node in self.nodes for worker in actors_on(node, "Worker")]

    def weight_servers(self) -> list[psutil.Process]:
        """The processes that serve weights from the driver's node."""
        return actors_on(self._ray.head_node, "WeightServer")

    def fill_stores(self, seconds: float) -> None:
        """For a while, objects of three times each store's size push those of the run out to the disk."""
        self._hogs.append(FORK.Process(target=fill_stores, args=(self.address, seconds)))
        self._hogs[-1].start()

    def empty_stores(self) -> None:
        """Wait until nothing fills them any more."""
        for hog in self._hogs:
            hog.join(PATIENCE)
            hog.kill()
        self._hogs.clear()

    def close(self) -> None:
        self._ray.shutdown()


def fill_stores(address: str, seconds: float) -> None:
    """A driver of its own, as another user's job would be; its nodes may vanish under it."""
    write_output_to(os.devnull)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")

    @ray.remote(num_cpus=0, max_retries=0)
    def fill_store() -> None:
        held = [ray.put(np.ones(STORE // 8, np.uint8)) for _ in range(3 * 8)]
        time.sleep(seconds)
        del held

    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
    filling = [fill_store.options(scheduling_strategy=node).remote() for node in nodes]
    ray.wait(filling, num_returns=len(filling), timeout=PATIENCE)


def actors_on(node: Any, name: str) -> list[psutil.Process]:
    """The processes of the actors of a class on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [child for child in raylet.children(recursive=True) if is_actor(child, name)]


def is_actor(process: psutil.Process, name: str) -> bool:
    try:
        # A call that it is at work on is named after a dot.
        return process.cmdline()[0].split(".")[0] == f"ray::{name}"
    except (psutil.Error, IndexError):  # it has ended
        return False
