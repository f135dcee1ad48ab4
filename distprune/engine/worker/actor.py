"""The worker actor: tasks on one device, their input and output through the object store."""

from __future__ import annotations

import platform
from typing import Any

import ray
import torch
from pydantic import TypeAdapter
from ray.actor import ActorHandle

from distprune.checkpoint import PartFolder
from distprune.config import PruneConfig
from distprune.engine.scheduler.nodes import Node, this_node
from distprune.engine.telemetry.metrics import MemoryMetrics
from distprune.engine.telemetry.process_memory import keep_freed_memory
from distprune.engine.worker.host_tensor import pack_all, unpack_all, whole_of
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.task import Task
from distprune.engine.worker.weights import WeightAccess, naming_node
from distprune.errors import InputError
from distprune.layers.determinism import make_cuda_deterministic

PART_FOLDER = TypeAdapter(PartFolder | None)


@ray.remote
class Worker:
    """One device and the tasks that run on it. What a restarted worker would miss is its open layer."""

    def __init__(self, number: int, weight_server: ActorHandle | None, *told: bytes):
        said = whole_of(told)
        config, device = PruneConfig.model_validate(said["config"]), said["device"]
        # Threads are set, not taken from the machine: results may change in the last bit with their number.
        torch.set_num_threads(config.threads_per_worker)
        keep_freed_memory()
        if device == "cuda":
            make_cuda_deterministic()
        self.config = config
        self.model = WeightAccess.from_json(said["model"], weight_server)
        self.device: str = device
        self._parts = PART_FOLDER.validate_python(said["parts"])
        self._opened: LayerWorker | None = None
        MemoryMetrics(self, str(config.output), number).start()

    @property
    def layer_worker(self) -> LayerWorker:
        """What tasks run on."""
        # Opened at the first call, not in __init__, so that bad input is an ordinary error and not a dead actor.
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> LayerWorker:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"device cuda: PyTorch finds no usable GPU on node {platform.node()}. "
                "Install a CUDA build of torch there, or give --device cpu."
            )
        parts = self._parts if self._parts is not None and self._parts.is_seen() else None
        # The driver could open the model, so a problem is about this node.
        with naming_node():
            return LayerWorker(self.config, self.model.open(), torch.device(self.device), parts, self.model)

    @ray.method(max_task_retries=-1)
    def ready(self) -> Node:
        """Device and checkpoint are open. Asked again after every restart.

        Returns:
            Where that is.

        Raises:
            InputError: one of them can't be opened on this node.
        """
        _ = self.layer_worker
        return this_node(self.device)

    def run(self, kind: type[Task], *values: Any) -> Any:
        """Run the task of a kind that has these values in its fields."""
        return pack_all(kind(*map(unpack_all, values)).run(self.layer_worker))
