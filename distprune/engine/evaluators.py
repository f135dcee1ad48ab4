"""The evaluation of one model, spread over worker actors that each hold it.

A worker is asked for one batch at a time, whichever is next. What a batch comes to depends on nothing but the batch, so
scores are the same bits for any number of workers, and whoever is lost on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from distprune.calibration.whole_model import load_config as load_model_config
from distprune.checkpoint.fingerprint import compute_fingerprint
from distprune.checkpoint.hub import HubModel
from distprune.config import PruneConfig, load_config
from distprune.engine.driver import PATIENCE
from distprune.engine.run.signals import sigterm_interrupts
from distprune.engine.scheduler.nodes import Node, this_node
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.scheduler.ray_cluster import alive_nodes, connected, plan_workers
from distprune.engine.scheduler.run_dtype import settle_dtype
from distprune.engine.scheduler.runtime import NODE_ID, RayRuntime
from distprune.engine.worker.host_tensor import pack_all, unpack_all, whole_of
from distprune.engine.worker.task import Task
from distprune.engine.worker.weights import naming_node
from distprune.errors import InputError, WorkersLost
from distprune.evaluation import Answering, Loading
from distprune.evaluation.scorer import Scorer

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Whereabouts:
    """Where a worker finds the model: the driver's folder, if its node sees it, else the hub."""

    path: str
    fingerprint: str
    hub: dict[str, str] | None = None
    server: None = None  # none serves it, unlike the layers of a run

    @classmethod
    def of(cls, folder: Path) -> Whereabouts:
        """What workers are told of a checkpoint's folder, which may lie in the hub's cache."""
        return cls(str(folder.absolute()), fingerprint_of(folder), cached_from(folder.absolute()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def folder(self) -> Path:
        """The model's folder on this node.

        Raises:
            InputError: the node neither sees it nor can fetch it.
        """
        path = Path(self.path)
        try:
            if fingerprint_of(path) == self.fingerprint:
                return path
            problem = "holds another model than it does on the driver's node"
        except (OSError, ValueError) as error:
            problem = f"can't be read ({error})"
        if self.hub:
            return HubModel(**self.hub, folder=path).fetch_all()
        raise InputError(f"{self.path} {problem}. Let every node see the driver's folder under that path.")


def fingerprint_of(folder: Path) -> str:
    """The checkpoint's identity."""
    return compute_fingerprint(folder, folder.glob("*.safetensors"))


def cached_from(folder: Path) -> dict[str, str] | None:
    """The repository and commit of a snapshot in the hub's cache: models--OWNER--NAME/snapshots/COMMIT."""
    repository, snapshots = folder.parent.parent.name, folder.parent.name
    if not (repository.startswith("models--") and snapshots == "snapshots"):
        return None
    return {"repository": "/".join(repository.split("--", 2)[1:]), "commit": folder.name}


# ---------------------------------------------------------------- the driver's side


def workers_asked_for(
    loading: Loading,
    workers: int | str,
    address: str | None,
    threads_per_worker: int = 1,
    gpus_per_worker: float | None = None,
) -> PruneConfig:
    """The workers of an evaluation, which are asked for as those of a run are, without its model and output.

    Raises:
        InputError: an option is out of range.
    """
    asked = {
        "model": "none",
        "output": "none",
        "device": loading.device,
        "dtype": loading.dtype,
        "micro_batch": loading.batch_size,
        "workers": workers,
        "threads_per_worker": threads_per_worker,
        "gpus_per_worker": gpus_per_worker,
        "address": address,
        "trust_remote_code": loading.trust_remote_code,
    }
    return load_config(None, asked)


@contextmanager
def spread(config: PruneConfig) -> Iterator[Any]:
    """Inside, Ray is up; gives what opens a model on workers, for :func:`distprune.evaluation.evaluate_models`.

    Args:
        config: its workers, what each asks for, and the cluster to join.
    """
    with sigterm_interrupts(), connected(config):
        yield partial(scored_by_workers, config)


@contextmanager
def scored_by_workers(config: PruneConfig, folder: Path, loading: Loading) -> Iterator[Answering]:
    """A model on workers of its own.

    Raises:
        InputError: no worker fits on any node.
    """
    least, most = config.worker_range()
    workers = plan_workers(config, alive_nodes(), most or least)
    if (stored := load_model_config(folder, loading.trust_remote_code).dtype) is not None:
        config = config.model_copy(update={"dtype": settle_dtype(config, stored, workers).name})
    pool = WorkerPool(EvaluationRuntime(workers, config, Whereabouts.of(folder)), workers.count)
    try:
        if not pool.are_up(least, PATIENCE):
            _LOGGER.warning(
                "Waiting until the Ray cluster has %g CPUs and %g GPUs free ...", workers.cpus, workers.gpus
            )
        yield Workers(pool)
    finally:
        pool.shutdown()


class Workers:
    """A model that is asked by way of a pool of workers."""

    def __init__(self, pool: WorkerPool):
        self._pool = pool

    def dtype(self) -> str:
        """The dtype that the workers compute in."""
        return self.ask("dtype", [None])[0]

    def ask(self, question: str, batches: Sequence[Any]) -> list[Any]:
        """The answers to one of :data:`QUESTIONS`, in the order of the batches.

        Raises:
            InputError: a worker found bad input.
            WorkersLost: a batch lost worker after worker.
        """
        answers: list[Any] = [None] * len(batches)
        for index, batch in enumerate(batches):
            self._pool.submit(QUESTIONS[question](pack_all(batch)), partial(answers.__setitem__, index))
        try:
            self._pool.run()
        except WorkersLost as error:
            raise WorkersLost(
                f"{len(batches)} batches of '{question}' were asked for, and one of them lost worker after worker, "
                "most likely for lack of memory. Take fewer --workers or a smaller --batch-size."
            ) from error
        return answers


# ---------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class Dtype(Task):
    """The dtype that the model is in."""

    nothing: None

    def run(self, scorer: Scorer) -> str:
        return scorer.dtype()


@dataclass(frozen=True)
class Loss(Task):
    """The loss of some windows of token ids, summed up."""

    windows: Tensor

    def run(self, scorer: Scorer) -> float:
        return scorer.loss(self.windows)


@dataclass(frozen=True)
class LogLikelihoods(Task):
    """Log-likelihoods of continuations, and whether each is what the model would have said."""

    requests: list[tuple]

    def run(self, scorer: Scorer) -> list[tuple[float, bool]]:
        return scorer.log_likelihoods(self.requests)


@dataclass(frozen=True)
class Generations(Task):
    """What the model says after some texts."""

    requests: list[tuple[str, dict]]

    def run(self, scorer: Scorer) -> list[str]:
        return scorer.generations(self.requests)


QUESTIONS: dict[str, type[Task]] = {
    "dtype": Dtype,
    "loss": Loss,
    "log_likelihoods": LogLikelihoods,
    "generations": Generations,
}


class EvaluationRuntime(RayRuntime):
    """Evaluators in place of pruning workers."""

    def start_worker(self, number: int = 0, avoided: Collection[str] = ()) -> Any:
        """A new evaluator, which Ray starts where and when there is room, and again when it is lost."""
        place = {"label_selector": {NODE_ID: f"!in({','.join(sorted(avoided))})"}} if avoided else {}
        return Evaluator.options(**self._options, **place).remote(number, *self._told)


# ---------------------------------------------------------------- the worker's side


@ray.remote
class Evaluator:
    """One device and the whole model on it."""

    def __init__(self, number: int, server: None, *told: bytes):
        said = whole_of(told)
        config, self._device = PruneConfig.model_validate(said["config"]), said["device"]
        torch.set_num_threads(config.threads_per_worker)
        self._whereabouts = Whereabouts(**said["model"])
        self._loading = Loading(self._device, config.dtype, config.micro_batch, config.trust_remote_code)
        self._scorer: Scorer | None = None

    @property
    def scorer(self) -> Scorer:
        # Opened at the first call, not in __init__, so that bad input is an ordinary error and not a dead actor.
        if self._scorer is None:
            with naming_node():
                self._scorer = Scorer(self._whereabouts.folder(), self._loading)
        return self._scorer

    @ray.method(max_task_retries=-1)
    def ready(self) -> Node:
        """The model is loaded. Asked again after every restart.

        Raises:
            InputError: it can't be, on this node.
        """
        with naming_node():
            _ = self.scorer.model
        return this_node(self._device)

    def run(self, kind: type[Task], *values: Any) -> Any:
        """Run the task of a kind that has these values in its fields."""
        return pack_all(kind(*map(unpack_all, values)).run(self.scorer))
