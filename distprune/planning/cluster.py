"""The machines that are to be asked for, and how a run's workers would lie on them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from distprune.config import PruneConfig
from distprune.errors import InputError

UNITS = {"": 1, **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}}
UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """Bytes from ``80GB`` (10⁹), ``80GiB`` (2³⁰) or a plain number.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS:
        raise InputError(f"'{text}' is no amount of memory; write it as in 80GB or 512GiB.")
    return round(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class Cluster:
    """What is to be asked for.

    Attributes:
        gpus: in all; 0 is a run on CPUs.
        nodes: machines that the GPUs are spread over.
        gpu_memory: bytes of one GPU.
        host_memory: bytes of one node; None where it is not known, and then not checked.
        cpus: cores of one node, where there are no GPUs.
    """

    gpus: int = 0
    nodes: int = 1
    gpu_memory: int = 80 * 10**9
    host_memory: int | None = None
    cpus: int = os.cpu_count() or 1

    def __post_init__(self):
        if self.nodes < 1 or self.gpus < 0:
            raise InputError(f"{self.nodes} nodes with {self.gpus} GPUs are no cluster. Give --nodes 1 or more.")
        if 0 < self.gpus < self.nodes:
            raise InputError(
                f"{self.gpus} GPUs can't be spread over {self.nodes} nodes. --gpus is their number in all."
            )


def describe_cluster(
    gpus: int = 0, nodes: int = 1, gpu_memory: str | int | None = None, host_memory: str | int | None = None
) -> Cluster:
    """A cluster from what users write; a single node without GPUs and of no given memory is this machine.

    Raises:
        InputError: one of them makes no sense.
    """
    given = {"gpu_memory": gpu_memory, "host_memory": host_memory}
    sizes = {name: parse_bytes(str(size)) for name, size in given.items() if size is not None}
    if not gpus and nodes == 1:
        sizes.setdefault("host_memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Cluster(gpus, nodes, **sizes)


@dataclass(frozen=True)
class Placement:
    """Where workers lie; those of a node or of a GPU are of the fullest one."""

    device: str
    workers: int
    workers_per_node: int
    workers_per_gpu: int
    slowdown: float  # of each, where workers have more threads than the node has cores


def place_workers(config: PruneConfig, cluster: Cluster, layers: int) -> Placement:
    """The workers that a run would have: one a GPU, or one a share of a node's cores, and no more than layers.

    Raises:
        InputError: the configuration asks for GPUs and the cluster has none.
    """
    device = config.device if config.device != "auto" else "cuda" if cluster.gpus else "cpu"
    if device == "cpu":
        fitting = cluster.nodes * max(1, cluster.cpus // config.threads_per_worker)
        workers = min(config.worker_range()[1] or fitting, layers)
        per_node = -(-workers // cluster.nodes)
        return Placement(device, workers, per_node, 0, max(1.0, per_node * config.threads_per_worker / cluster.cpus))
    if not cluster.gpus:
        raise InputError("device cuda needs GPUs to plan for. Give --gpus, or --device cpu.")
    per_gpu = _workers_per_gpu(config.gpus_per_worker)
    fitting = cluster.gpus * per_gpu if per_gpu else int(cluster.gpus // config.gpus_per_worker)
    if not fitting:
        raise InputError(f"a worker asks for {config.gpus_per_worker:g} GPUs, and there are {cluster.gpus}.")
    workers = min(config.worker_range()[1] or fitting, layers)
    return Placement(device, workers, -(-workers // cluster.nodes), -(-workers // cluster.gpus), 1.0)


def _workers_per_gpu(share: float | None) -> int:
    """How many workers share a GPU; 0 where one takes several."""
    if share is None or share == 0:
        return 1
    return int(1 / share + 1e-6)
