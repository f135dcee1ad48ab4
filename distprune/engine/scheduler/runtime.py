"""What the pool asks of Ray, in one place: actors started and stopped, calls made, waited for and fetched.

The scheduler knows nothing else of Ray, so that the simulation of large clusters can give it a clock of its own.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from math import inf
from typing import Any

import ray
from ray import ObjectRef
from ray._private.state import state
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
from ray.util.client import ray as client

from distprune.checkpoint import PartFolder
from distprune.config import PruneConfig
from distprune.engine.run.write_behind import Add, write_behind
from distprune.engine.scheduler.nodes import Node
from distprune.engine.scheduler.ray_cluster import WorkerPlan, count_fitting
from distprune.engine.worker.actor import PART_FOLDER, Worker
from distprune.engine.worker.host_tensor import fetch, in_pieces, put
from distprune.engine.worker.layer_worker import ForgottenError
from distprune.engine.worker.task import Task
from distprune.engine.worker.weights import WeightAccess

# Ray's label of every node.
NODE_ID = "ray.io/node-id"
LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError, ForgottenError)


class RayRuntime:
    """Worker actors of one run."""

    #: What fetching raises where the worker, and not what it did, is at fault.
    lost: tuple[type[Exception], ...] = LOST

    def __init__(self, plan: WorkerPlan, config: PruneConfig, model: WeightAccess, parts: PartFolder | None = None):
        self._options = {"num_cpus": plan.cpus, "num_gpus": plan.gpus, "max_restarts": -1}
        told = {"config": config.model_dump(mode="json"), "model": model.to_json(), "device": plan.device}
        told["parts"] = PART_FOLDER.dump_python(parts, mode="json")
        self._told = (model.server, *in_pieces(told))
        self._asked, self._grows = {"CPU": plan.cpus, "GPU": plan.gpus}, isinstance(config.workers, str)

    def start_worker(self, number: int = 0, avoided: Collection[str] = ()) -> Any:
        """A new worker of that number, which Ray starts where and when there is room, and again when it is lost.

        The nodes whose ids are to be avoided are never the place.
        """
        place = {"label_selector": {NODE_ID: f"!in({','.join(sorted(avoided))})"}} if avoided else {}
        return Worker.options(**self._options, **place).remote(number, *self._told)

    def room(self, avoided: Collection[str]) -> float:
        """How many workers the other nodes can hold; any number where the cluster is expected to grow."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in avoided]
        return inf if self._grows else sum(count_fitting(self._asked, node) for node in nodes)

    def draining(self) -> Mapping[str, float]:
        """The nodes that Ray was told will go, by id, each with the seconds that it has left; infinite if not told.

        Ray's client, as of an address that begins with ray://, does not hear of any.
        """
        if client.is_connected():
            return {}
        # The only way that Ray offers; its own libraries take it too. The times are milliseconds, and 0 is none.
        ends = state.get_draining_nodes()
        return {node: end / 1000 - time.time() if end else inf for node, end in ends.items()}

    def ready(self, worker: Any) -> ObjectRef:
        """The node that a worker is up on, to be."""
        return worker.ready.remote()

    def call(self, worker: Any, task: Task, values: Sequence[Any]) -> list[ObjectRef]:
        """A worker begins a task when it is free and the values of the task's fields are there; its results to be."""
        results = worker.run.options(num_returns=task.results).remote(type(task), *values)
        return results if isinstance(results, list) else [results]

    def wait(self, results: Sequence[ObjectRef], count: int = 1, timeout: float | None = None) -> list[ObjectRef]:
        """Those of the results that are there as soon as ``count`` are, or after ``timeout`` seconds."""
        return ray.wait(list(results), num_returns=count, timeout=timeout, fetch_local=False)[0]

    def holds_results_of(self, site: Node) -> bool:
        """Whether what a worker there gives lies on this node from the first, and stays when the worker is lost."""
        return site.node_id == ray.get_runtime_context().get_node_id()

    def fetch(self, results: Sequence[ObjectRef]) -> list[Any]:
        """The values of a call's results.

        Raises:
            InputError: what the worker raised.
            Exception: one of :attr:`lost`, or any other failure.
        """
        return fetch(list(results))

    def put(self, value: Any) -> ObjectRef:
        """A value where every worker can get it, until nothing here refers to it any more."""
        return put(value)

    def get(self, put: Sequence[ObjectRef]) -> list[Any]:
        """Values that were put."""
        return ray.get(list(put))

    def stop(self, workers: Sequence[Any], starting: Sequence[ObjectRef]) -> None:
        for ready in starting:
            ray.cancel(ready)
        for worker in workers:
            ray.kill(worker)

    def write_behind(self) -> AbstractContextManager[Add]:
        """Files are written in a thread of their own."""
        return write_behind()

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""
        return time.monotonic()
