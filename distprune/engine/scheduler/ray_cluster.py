"""Joining or starting Ray, and how many workers of which kind a run gets there."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import ray
from ray.exceptions import AuthenticationError

from distprune.config import PruneConfig
from distprune.engine.run.signals import interruptions_held_back, sigterm_as_it_was
from distprune.engine.scheduler.local_ray import start_local_ray
from distprune.engine.scheduler.nodes import Requirements
from distprune.errors import InputError

# Ray itself takes minutes to give up on an address where nothing listens.
CONNECT_SECONDS = 10


@contextmanager
def connected(config: PruneConfig) -> Iterator[None]:
    """Inside, Ray is up: the one already joined, the cluster at the address, or one started here for this run.

    Raises:
        InputError: no cluster answers at the address, or none can be started here.
        KeyboardInterrupt: a signal came while Ray was starting or shutting down.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        with sigterm_as_it_was():
            if address == "local":
                start_local_ray(config, **quiet)
            else:
                check_listens(address)
                ray.init(address=address, **quiet)
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {reason_of(error)}") from None
    except SystemExit:  # what Ray makes of SIGTERM while it starts
        raise KeyboardInterrupt from None
    try:
        yield
    finally:
        shut_down()


def shut_down() -> None:
    """``ray.shutdown()``, for which interruptions wait.

    Broken off halfway, Ray takes the next object reference that dies to a worker that is gone, and ends the process
    with status 1 and without a word. And it resets SIGTERM's handler, unseen by Python, to the one that ends the
    process: so it runs in a thread of its own, while this one sees to it that signals still wait.
    """
    with interruptions_held_back() as wait_again, ThreadPoolExecutor(1) as thread:
        leaving = thread.submit(ray.shutdown)
        while not leaving.done():
            wait([leaving], timeout=0.001)
            wait_again()
        leaving.result()


def reason_of(error: BaseException) -> str:
    """Why a cluster can't be joined, and the fix."""
    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    if any(isinstance(cause, AuthenticationError) for cause in causes):
        return "it asks for a token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN where the token is not in ~/.ray."
    return str(error).strip().rstrip(".") + ". Check --address and RAY_ADDRESS."


def check_listens(address: str) -> None:
    """See that something listens at a HOST:PORT; other forms of address are left to Ray.

    Raises:
        OSError: nothing does.
    """
    if match := re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address):
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers a run may have, what each asks Ray for and needs, and how many must be up before it starts.

    Those for which there is no room wait, and Ray's autoscaler sees what they wait for.
    """

    count: int
    device: str
    cpus: float
    gpus: float
    least: int = 1
    requirements: Requirements = field(default_factory=Requirements)

    def requiring(self, requirements: Requirements) -> WorkerPlan:
        """The same for workers with such requirements, of which several may share a GPU."""
        share = min(self.gpus, 1.0) or 1.0
        return replace(self, requirements=replace(requirements, device=round(requirements.device / share)))


def plan_workers(config: PruneConfig, nodes: Sequence[Mapping[str, float]], layers: int) -> WorkerPlan:
    """Workers for a cluster whose nodes have the given resources, each as ``{"CPU": 16.0, "GPU": 8.0}``.

    Raises:
        InputError: not even one worker fits on any node.
    """
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    device = config.device if config.device != "auto" else "cuda" if has_gpus else "cpu"
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(device == "cuda")
    asked = {"CPU": float(config.threads_per_worker), "GPU": gpus}

    fitting, (least, most) = sum(count_fitting(asked, node) for node in nodes), config.worker_range()
    # Where a range is given, the cluster is expected to grow.
    if fitting < 1 and not isinstance(config.workers, str):
        found = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise InputError(
            f"no worker fits on any node of the Ray cluster: each asks for {asked['CPU']:g} CPUs and {gpus:g} GPUs, "
            f"and the nodes have {found or 'not been found'}. Lower --threads-per-worker or --gpus-per-worker, or give "
            "--device cpu; or give --workers MIN:MAX where the cluster is to grow."
        )
    count = min(most or fitting, layers)
    return WorkerPlan(count, device, asked["CPU"], gpus, min(least, count))


def count_fitting(asked: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many workers a node can hold."""
    # Ray counts in ten-thousandths; as floats, ten tenths of a GPU would not fit on one.
    return min(round(node.get(name, 0) * 10_000) // round(amount * 10_000) for name, amount in asked.items() if amount)


def nodes_with_room(workers: WorkerPlan) -> list[str]:
    """Ray's ids of the nodes alive that such a worker fits on, in a fixed order."""
    asked = {"CPU": workers.cpus, "GPU": workers.gpus}
    alive = (node for node in ray.nodes() if node["Alive"])
    return sorted(node["NodeID"] for node in alive if count_fitting(asked, node["Resources"]))


def alive_nodes() -> list[dict[str, float]]:
    """The resources of every node of the cluster that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
