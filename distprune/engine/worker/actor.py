"""The worker actor: layer tasks on one device, their inputs and outputs through the object store."""

from __future__ import annotations

import platform

import numpy as np
import ray
import torch
from pydantic import TypeAdapter
from ray.actor import ActorHandle

from distprune.calibration import CalibrationMetadata
from distprune.checkpoint import PartFolder, WrittenFile
from distprune.config import PruneConfig
from distprune.decoder_layer import DecoderLayer, LayerShape, layer_from_state, state_of
from distprune.determinism import make_cuda_deterministic
from distprune.distillation.layerwise import Batch, DistillationReport
from distprune.engine.worker.student_tasks import Lessons
from distprune.engine.telemetry.process_memory import PeakMemory, keep_freed_memory, peak_memory
from distprune.engine.telemetry.metrics import MemoryMetrics
from distprune.engine.worker.report import Report
from distprune.engine.scheduler.nodes import Node, this_node
from distprune.engine.worker.layer_worker import LayerTasks
from distprune.engine.worker.host_tensor import HostTensor, pack, pack_all, unpack, unpack_all, whole_of
from distprune.engine.worker.weights import WeightAccess, naming_node
from distprune.errors import InputError

HostTensors = dict[str, HostTensor]
#: A finished layer's tensors, or the file that a worker has written them to.
Finished = HostTensors | WrittenFile
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
        self._tasks: LayerTasks | None = None
        self._lessons: Lessons | None = None
        MemoryMetrics(self, str(config.output), number).start()

    @property
    def tasks(self) -> LayerTasks:
        # Opened at the first call, not in __init__, so that bad input is an ordinary error and not a dead actor.
        if self._tasks is None:
            self._tasks = self._open()
        return self._tasks

    def _open(self) -> LayerTasks:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"device cuda: PyTorch finds no usable GPU on node {platform.node()}. "
                "Install a CUDA build of torch there, or give --device cpu."
            )
        # The driver could open the model, so a problem is about this node.
        with naming_node():
            tasks = LayerTasks(self.config, self.model.open(), torch.device(self.device))
        if self._parts is not None and not self._parts.is_seen():
            self._parts = None
        return tasks

    @ray.method(max_task_retries=-1)
    def ready(self) -> Node:
        """Device and checkpoint are open. Asked again after every restart.

        Returns:
            Where that is.

        Raises:
            InputError: one of them can't be opened on this node.
        """
        _ = self.tasks
        return this_node(self.device)

    def check_layer(self, index: int) -> None:
        self.tasks.check_layer(index)

    def check_outer(self) -> None:
        self.tasks.check_outer()

    @ray.method(num_returns=2)
    def own_samples(self) -> tuple[np.ndarray, CalibrationMetadata]:
        with self.model.whole_folder() as folder:
            return self.tasks.own_samples(folder)

    def embed(self, tokens: np.ndarray) -> HostTensor:
        return pack(self.tasks.embed(tokens))

    def open_layer(self, index: int) -> None:
        self.tasks.open_layer(index)

    def sweep(self, index: int, piece: int, hidden_states: HostTensor) -> HostTensor:
        return pack(self.tasks.sweep(index, piece, unpack(hidden_states)))

    @ray.method(num_returns=2)
    def profile(self, index: int, pieces: int) -> tuple[HostTensors, HostTensors]:
        profile, carried = self.tasks.profile(index, pieces)
        return pack_all(profile), pack_all(carried)

    def open_head(self) -> None:
        self.tasks.open_head()

    def loss_gradient(self, hidden_states: HostTensor, tokens: HostTensor) -> HostTensor:
        return pack(self.tasks.loss_gradient(unpack(hidden_states), tokens.array))

    def losses(self) -> HostTensor:
        return pack(self.tasks.losses())

    def open_backward(self, index: int) -> None:
        self.tasks.open_backward(index)

    def backward(self, index: int, piece: int, hidden_states: HostTensor, gradient: HostTensor) -> HostTensor:
        return pack(self.tasks.backward(index, piece, unpack(hidden_states), unpack(gradient)))

    @ray.method(num_returns=3)
    def prune(
        self,
        index: int,
        hidden_states: HostTensor,
        planned: LayerShape,
        profile: HostTensors,
        carried: HostTensors,
        propagate: bool,
    ) -> tuple[Finished, HostTensor | None, Report]:
        known = unpack_all(profile), unpack_all(carried)
        result = self.tasks.prune(index, unpack(hidden_states), planned, *known, propagate=propagate)
        output = None if result.output is None else pack(result.output)
        return self._finished(index, result.layer), output, result.report

    def _finished(self, index: int, layer: DecoderLayer) -> Finished:
        """Write a layer to the folder of parts, where this node sees it; the driver writes what it gets otherwise."""
        if self._parts is None:
            return pack_all(state_of(layer))
        return self._parts.write(self.tasks.family.layer_to_checkpoint(layer, index))

    def copy_outer(self, name: str) -> HostTensor | WrittenFile:
        """Copy a tensor outside the decoder layers, as it is stored, to the folder of parts or to the driver."""
        tensors = self.tasks.checkpoint.read([name])
        return pack(tensors[name]) if self._parts is None else self._parts.write(tensors)

    def merge(self, parts: tuple[str, ...]) -> WrittenFile | None:
        """Merge the files of parts into that of a shard. None: they are not seen here, or are no longer there."""
        if self._parts is None:
            return None
        try:
            return self._parts.merge(parts)
        except FileNotFoundError:  # another worker has done the same meanwhile
            return None

    def advance(self, index: int, hidden_states: HostTensor) -> HostTensor:
        return pack(self.tasks.advance(index, unpack(hidden_states)))

    @ray.method(num_returns=2)
    def distill(
        self, index: int, shape: LayerShape, tensors: HostTensors, inputs: HostTensor, outputs: HostTensor, ahead: HostTensor
    ) -> tuple[Finished, DistillationReport]:
        layer = layer_from_state(unpack_all(tensors), shape)
        exercise = Batch(unpack(inputs), unpack(outputs), unpack(ahead))
        learnt, lesson = self.tasks.distill(index, layer, exercise)
        return self._finished(index, learnt), lesson

    @property
    def lessons(self) -> Lessons:
        if self._lessons is None:
            self._lessons = Lessons(self.tasks)
        return self._lessons

    def open_dense(self, index: int) -> None:
        self.lessons.open_dense(index)

    def open_pupil(self, index: int, shape: LayerShape, tensors: HostTensors, learnt: HostTensors) -> None:
        self.lessons.open_pupil(index, layer_from_state(unpack_all(tensors), shape), unpack_all(learnt))

    def listen(self, index: int, piece: int, hidden_states: HostTensor) -> HostTensor:
        return pack(self.lessons.listen(index, piece, unpack(hidden_states)))

    def leave(self, index: int, pieces: int) -> None:
        self.lessons.leave(index, pieces)

    def open_end(self) -> None:
        self.lessons.open_end()

    def diverge(self, hidden_states: HostTensor, dense: HostTensor) -> HostTensor:
        return pack(self.lessons.diverge(unpack(hidden_states), unpack(dense)))

    def divergences(self) -> HostTensor:
        return pack(self.lessons.divergences())

    def learn(self, index: int, piece: int, hidden_states: HostTensor, gradient: HostTensor) -> HostTensor:
        return pack(self.lessons.learn(index, piece, unpack(hidden_states), unpack(gradient)))

    def step(self, index: int, pieces: int, rate: float) -> HostTensors:
        return pack_all(self.lessons.step(index, pieces, rate))

    def graduate(self, index: int, shape: LayerShape, tensors: HostTensors, learnt: HostTensors) -> Finished:
        layer = layer_from_state(unpack_all(tensors), shape)
        return self._finished(index, self.lessons.graduate(index, layer, unpack_all(learnt)))

    def peak_memory(self) -> PeakMemory:
        return peak_memory()
