"""What can go wrong from outside while a run is under way. Every fault tells whether it hit something alive."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import psutil
from chaos_cluster import Cluster
from chaos_driver import Driver


@dataclass
class Scene:
    """Where faults happen, and what follows of them a while later."""

    cluster: Cluster
    random: Random
    driver: Driver | None = None
    _later: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def do_what_is_due(self) -> None:
        due = [entry for entry in self._later if entry[0] <= time.monotonic()]
        for entry in due:
            self._later.remove(entry)
            entry[1]()

    def calm(self) -> None:
        """Do at once what was to follow, and repair the cluster."""
        for _, action in self._later:
            action()
        self._later.clear()
        self.cluster.empty_stores()
        self.cluster.restore()


def kill_worker(scene: Scene) -> bool:
    return kill_one_of(scene.cluster.workers(), scene.random)


def kill_weight_server(scene: Scene) -> bool:
    return kill_one_of(scene.cluster.weight_servers(), scene.random)


def kill_one_of(processes: list[psutil.Process], random: Random) -> bool:
    if not processes:
        return False
    with suppress(psutil.NoSuchProcess):
        random.choice(processes).kill()
        return True
    return False


def freeze_worker(scene: Scene) -> bool:
    """A worker hangs, as on a stalling file system, longer than its call usually takes."""
    workers = scene.cluster.workers()
    if not workers:
        return False
    worker = scene.random.choice(workers)

    def thaw() -> None:
        with suppress(psutil.NoSuchProcess):
            worker.resume()

    with suppress(psutil.NoSuchProcess):
        worker.suspend()
        scene.later(scene.random.uniform(4, 10), thaw)
        return True
    return False


def lose_node(scene: Scene) -> bool:
    """It may be replaced at once, after a while or not before the run has ended, unless it was the last one."""
    if not scene.cluster.lose_node():
        return False
    if not scene.cluster.nodes or scene.random.random() < 0.5:
        scene.later(scene.random.uniform(0, 8), scene.cluster.add_node)
    return True


def add_node(scene: Scene) -> bool:
    return scene.cluster.add_node()


def fill_stores(scene: Scene) -> bool:
    scene.cluster.fill_stores(scene.random.uniform(2, 6))
    return scene.driver.is_alive


def kill_driver(scene: Scene) -> bool:
    return scene.driver.send(signal.SIGKILL)


def terminate_driver(scene: Scene) -> bool:
    return scene.driver.send(signal.SIGTERM)


def interrupt_driver(scene: Scene) -> bool:
    return scene.driver.send(signal.SIGINT)


FAULTS: dict[str, Callable[[Scene], bool]] = {
    "worker killed (SIGKILL)": kill_worker,
    "weight server killed (SIGKILL)": kill_weight_server,
    "worker frozen for 4 to 10 s": freeze_worker,
    "node lost": lose_node,
    "node added": add_node,
    "object stores filled": fill_stores,
    "driver killed (SIGKILL)": kill_driver,
    "driver terminated (SIGTERM)": terminate_driver,
    "driver interrupted (SIGINT)": interrupt_driver,
}
