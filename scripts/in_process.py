"""A pruning run as plain calls of its tasks, in this process: no Ray, no journal, everything in memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distprune.budgets import Target, target_of
from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.engine.run.preflight import dense_model, learns_gates, stored_dtype, stored_sizes
from distprune.engine.worker.distill_task import Distill
from distprune.engine.worker.end_to_end_tasks import CloseEnd, Diverge, OpenEnd
from distprune.engine.worker.gate_tasks import CloseGated, OpenGated, OpenGatedBackward, gated_method
from distprune.engine.worker.layer_worker import Finished, LayerWorker
from distprune.engine.worker.pass_tasks import (
    Backward,
    CloseLayer,
    CloseLoss,
    Embed,
    LossGradient,
    OpenBackward,
    OpenForward,
    OpenLoss,
    Sweep,
)
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.task import Task
from distprune.gates import Gates
from distprune.hardware import AUTO, compute_dtype
from distprune.layers.determinism import make_cuda_deterministic
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape
from distprune.methods import Profile
from distprune.planning.rehearsal import CloseAfterForward


@dataclass
class Measured:
    """Seconds of all tasks of one class, and the most bytes that torch held on the GPU in any."""

    seconds: float = 0.0
    calls: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Result:
    """A pruned model: its layers, its loss in nats a token on the calibration set, and what the tasks took, by their
    classes."""

    layers: list[DecoderLayer]
    loss: float
    tasks: dict[type[Task], Measured]


@dataclass(frozen=True)
class DensePass:
    """What the dense pass leaves: the hidden states at every layer's input and at the model's end, and of every layer
    its profile and what is carried to its pruning."""

    states: list[Tensor]
    profiles: list[Profile]
    carried: list[dict[str, Tensor]]


class InProcess:
    """The tasks of one run on one device.

    Args:
        config: of the run; its output, workers and address don't matter.
        folder: of the model.
        device: where layers run.
    """

    def __init__(self, config: PruneConfig, folder: Path, device: torch.device):
        if device.type == "cuda":
            make_cuda_deterministic()
        self.model = dense_model(Checkpoint.open(folder))
        if config.dtype == AUTO:
            config = config.model_copy(update={"dtype": compute_dtype(stored_dtype(self.model), device).name})
        self.config, self.device = config, device
        self.worker = LayerWorker(config, self.model, device)
        self.layers = range(self.model.architecture.num_layers)
        self.measured: dict[type[Task], Measured] = defaultdict(Measured)

    def prune(self, tokens: np.ndarray) -> Result:
        """The dense pass, the gradient pass and the learning of gates where the method has them, the plan, the pruning
        of all layers, and layer-wise distillation where it is asked for.

        Args:
            tokens: of the calibration set, int32 (samples, length).
        """
        ids = torch.tensor(tokens)
        dense = self._dense_pass(ids)
        profiles = self._gradient_pass(ids, dense.states) if self.worker.has_gradient_pass else dense.profiles
        target = target_of(self.config, self.model.architecture, stored_sizes(self.model))
        if learns_gates(self.worker.method, self.config):
            profiles = self._learn_gates(target, ids, profiles, dense.states[-1])
        plan = self.worker.method.plan(target, profiles, self.config.align)
        pruned = self._pruning_pass(plan, profiles, dense)
        if self.config.distill:
            pruned = [self._distill(index, layer, dense.states) for index, layer in enumerate(pruned)]
        return Result(pruned, self._loss(pruned, dense.states[0], ids), self.measured)

    def _dense_pass(self, ids: Tensor) -> DensePass:
        passed = DensePass([self._run(Embed(ids))], [], [])
        for index in self.layers:
            self._run(OpenForward(index))
            passed.states.append(self._run(Sweep(index, 0, passed.states[-1])))
            closing = CloseAfterForward if self.worker.has_gradient_pass else CloseLayer
            profile, carried = self._run(closing(index, 1))
            passed.profiles.append(profile)
            passed.carried.append(carried)
        return passed

    def _gradient_pass(self, ids: Tensor, states: list[Tensor]) -> list[Profile]:
        profiles: list[Profile] = [{} for _ in self.layers]
        gradient, _ = self._loss_gradient(states[-1], ids)
        for index in reversed(self.layers):
            self._run(OpenBackward(index))
            gradient = self._run(Backward(index, 0, states[index], gradient))
            profiles[index], _ = self._run(CloseLayer(index, 1))
        return profiles

    def _learn_gates(self, target: Target, ids: Tensor, profiles: list[Profile], end: Tensor) -> list[Profile]:
        method = gated_method(self.worker)
        learner = method.learner(target, profiles)
        for samples in method.batches(len(ids)):
            gates = learner.gates()
            gradients = self._gradients_in_gates(ids[samples], profiles, gates, end[samples])
            learner.learn(gradients, tokens=ids[samples].numel())
        return [{**profile, **learnt} for profile, learnt in zip(profiles, learner.log_alpha, strict=True)]

    def _gradients_in_gates(self, ids: Tensor, profiles: list[Profile], gates: list[Gates], end: Tensor) -> list[Gates]:
        """The gradients of one step: forward through the gated layers, and back."""
        states, gradients = [self._run(Embed(ids))], list(gates)
        for index in self.layers:
            self._run(OpenGated(index, profiles[index], gates[index]))
            states.append(self._run(Sweep(index, 0, states[-1])))
        self._run(OpenEnd())
        gradient, _ = self._run(Diverge(states[-1], end)), self._run(CloseEnd())
        for index in reversed(self.layers):
            self._run(OpenGatedBackward(index, profiles[index], gates[index]))
            gradient = self._run(Backward(index, 0, states[index], gradient))
            gradients[index] = self._run(CloseGated(index, 1))
        return gradients

    def _pruning_pass(self, plan: list[LayerShape], profiles: list[Profile], dense: DensePass) -> list[DecoderLayer]:
        """Blocks begin on the dense model's hidden states, as in a run."""
        pruned, states, block = [], dense.states[0], self.config.block_length(len(self.layers))
        for index in self.layers:
            begins = index % block == 0
            states, carried = (dense.states[index], dense.carried[index]) if begins else (states, {})
            aims = self.worker.method.aims_at_dense(self.model.architecture.dense_shape(index))
            around = {"dense_input": dense.states[index], "dense_output": dense.states[index + 1]} if aims else {}
            task = Prune(index, states, plan[index], profiles[index], carried, propagates=block > 1, **around)
            finished, states, _ = self._run(task)
            pruned.append(self._layer_of(index, finished, plan[index]))
        return pruned

    def _distill(self, index: int, layer: DecoderLayer, states: list[Tensor]) -> DecoderLayer:
        """The layer after learning what the dense one gives, layer by layer."""
        end = self.config.distill.end_of_look_ahead(index, len(self.layers))
        finished, _ = self._run(Distill(index, layer, states[index], states[index + 1], states[end]))
        return self._layer_of(index, finished, layer.shape)

    def _layer_of(self, index: int, finished: Finished, shape: LayerShape) -> DecoderLayer:
        return self.model.from_disk(index, finished.written, shape, finished.rotary_pairs)

    def _loss(self, layers: list[DecoderLayer], states: Tensor, ids: Tensor) -> float:
        for index, layer in enumerate(layers):
            states = self.worker.runner.run(layer, index, states)
        _, losses = self._loss_gradient(states, ids)
        samples, length = ids.shape
        return losses.sum().item() / (samples * (length - 1))

    def _loss_gradient(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The loss's gradient at the model's end, and each sample's loss."""
        self._run(OpenLoss())
        return self._run(LossGradient(states, ids)), self._run(CloseLoss())

    def _run(self, task: Task) -> Any:
        with self._measured(type(task)):
            return task.run(self.worker)

    @contextmanager
    def _measured(self, kind: type[Task]) -> Iterator[None]:
        """Adds what happens inside to the seconds and peak of a class of tasks, and prints it, in case no more
        follows."""
        measured, on_gpu = self.measured[kind], self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
            measured.peak = max(measured.peak, torch.cuda.max_memory_allocated())
        seconds = time.perf_counter() - start
        measured.seconds += seconds
        measured.calls += 1
        print(f"  {self.worker.method.name}, {kind.kind()}: {seconds:.3f} s", flush=True)
