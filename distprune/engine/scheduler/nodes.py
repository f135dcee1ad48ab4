"""Where workers are, and whether their device holds what a worker needs."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import ray
import torch

from distprune.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Requirements:
    """Bytes that a worker needs: its GPU must have so many, and of its node's memory it takes so many for itself."""

    device: int = 0
    resident: int = 0


@dataclass(frozen=True)
class Node:
    """A worker's node, by name and by Ray's id, and its device. Memory is in bytes; None where there is no GPU."""

    node: str
    node_id: str
    device: str
    device_memory: int | None
    host_memory: int


def this_node(device: str) -> Node:
    """Where the worker is that asks."""
    name, memory = "CPU", None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Where Ray is not up, asking it would join whichever Ray is found.
    node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return Node(platform.node(), node_id, name, memory, host_memory)


class Nodes:
    """The nodes of a run's workers, of which each needs so much.

    Ray places workers by the number of GPUs, not by their size. So a worker tells its GPU's size when it is up; where
    that is too small, the worker goes, and its node is avoided when Ray is asked for another.
    """

    def __init__(self, requirements: Requirements):
        self._requirements = requirements
        self._refused: dict[str, Node] = {}
        self._workers: Counter[str] = Counter()

    @property
    def refused(self) -> Collection[str]:
        """Ray's ids of nodes whose GPUs are too small."""
        return self._refused.keys()

    def suits(self, node: Node) -> bool:
        """Whether a worker can work there; if not, the node is refused from now on."""
        if node.device_memory is None or node.device_memory >= self._requirements.device:
            return True
        self._refused[node.node_id] = node
        return False

    def refusal(self, node: Node) -> str:
        return f"{node.node} is passed over: {describe(node)}, and a worker needs {gib(self._requirements.device)}"

    def nowhere(self) -> InputError:
        """What to raise where no node is left."""
        found = "; ".join(f"{node.node}: {describe(node)}" for node in self._refused.values())
        return InputError(
            f"no GPU of the Ray cluster has the {gib(self._requirements.device)} that the workers on it need: {found}. "
            "Give a smaller --micro-batch, a larger --gpus-per-worker where workers share a GPU, or --workers "
            "MIN:MAX where larger GPUs are to join; distprune plan tells what fits."
        )

    def crowding(self, node: Node) -> str | None:
        """Note that a worker is at a node. Returns a warning when the node's memory begins to be too small for all."""
        before, count = self._workers[node.node_id], self._workers[node.node_id] + 1
        self._workers[node.node_id] = count
        if not before * self._requirements.resident <= node.host_memory < count * self._requirements.resident:
            return None
        return (
            f"{node.node}: {count} workers may need {gib(count * self._requirements.resident)} of memory, and it has "
            f"{gib(node.host_memory)}. Take fewer --workers if some are lost."
        )


def describe(node: Node) -> str:
    return f"{node.device} of {gib(node.device_memory or 0)}"


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
