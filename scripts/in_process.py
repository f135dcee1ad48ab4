"""A pruning run as plain calls of its tasks, in this process: no Ray, no journal, everything in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from distprune.decoder_layer import DecoderLayer
from distprune.determinism import make_cuda_deterministic
from torch import Tensor

from distprune.budgets import target_of
from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.distillation.layerwise import Batch
from distprune.engine.worker.layer_worker import LayerTasks
from distprune.engine.worker.weights import Model
from distprune.families import family_of
from distprune.hardware import AUTO, compute_dtype


@dataclass
class Measured:
    """Seconds of all calls of one task, and the most bytes that torch held on the GPU in any."""

    seconds: float = 0.0
    calls: int = 0
    peak: int = 0


@dataclass
class Result:
    """A pruned model: its layers, its loss in nats a token on the calibration set, and what each task took."""

    layers: list[DecoderLayer]
    loss: float
    tasks: dict[str, Measured] = field(default_factory=dict)


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
        checkpoint = Checkpoint.open(folder)
        family = family_of(checkpoint.config)
        self.model = Model(family, family.dense_config(checkpoint.config), checkpoint)
        if config.dtype == AUTO:
            dtype = compute_dtype(checkpoint.tensors[family.embedding].dtype, device)
            config = config.model_copy(update={"dtype": dtype.name})
        self.config, self.device = config, device
        self.tasks = LayerTasks(config, self.model, device)
        self.measured: dict[str, Measured] = {}

    def prune(self, tokens: np.ndarray) -> Result:
        """The dense pass, the gradient pass where the method has one, the plan, the pruning of all layers, and
        layer-wise distillation where it is asked for.

        Args:
            tokens: of the calibration set, int32 (samples, length).
        """
        method, dense = self.tasks.method, self.model.dense
        layers = range(dense.num_hidden_layers)
        inputs, profiles = self._dense_pass(tokens)
        if method.gradient_moments(dense.layer_shape(0)):
            profiles = self._gradient_pass(tokens, inputs)
        with self.timed("plan"):
            sizes = self.model.family.stored_sizes(self.model.checkpoint.tensors, dense)
            target = target_of(self.config, dense, sizes)
            plan = method.plan(target, profiles, self.config.align)
        states, pruned = inputs[0], []
        for index in layers:
            with self.timed("prune"):
                result = self.tasks.prune(index, states, plan[index], profiles[index], {}, propagate=True)
            states = result.output
            pruned.append(result.layer)
        if self.config.distill:
            pruned = [self._distill(index, layer, inputs) for index, layer in enumerate(pruned)]
        return Result(pruned, self._loss(pruned, inputs[0], tokens), self.measured)

    def _dense_pass(self, tokens: np.ndarray) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The hidden states at every layer's input and at the model's end, and the profiles."""
        with self.timed("embed"):
            inputs = [self.tasks.embed(tokens)]
        profiles = []
        for index in range(self.model.dense.num_hidden_layers):
            with self.timed("read"):
                self.tasks.open_layer(index)
            with self.timed("dense pass"):
                inputs.append(self.tasks.sweep(index, 0, inputs[-1]))
            with self.timed("profile"):
                profiles.append(self.tasks.profile(index, 1)[0])
        return inputs, profiles

    def _gradient_pass(self, tokens: np.ndarray, inputs: list[Tensor]) -> list[dict[str, Tensor]]:
        layers = self.model.dense.num_hidden_layers
        profiles: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        with self.timed("loss's gradient"):
            self.tasks.open_head()
            gradient = self.tasks.loss_gradient(inputs[-1], tokens)
            self.tasks.losses()
        for index in reversed(range(layers)):
            self.tasks.open_backward(index)
            with self.timed("gradient pass"):
                gradient = self.tasks.backward(index, 0, inputs[index], gradient)
            with self.timed("profile"):
                profiles[index] = self.tasks.profile(index, 1)[0]
        return profiles

    def _distill(self, index: int, layer: DecoderLayer, inputs: list[Tensor]) -> DecoderLayer:
        """The layer after learning what the dense one gives, layer by layer."""
        end = self.config.distill.end_of_look_ahead(index, len(inputs) - 1)
        with self.timed("distill"):
            return self.tasks.distill(index, layer, Batch(inputs[index], inputs[index + 1], inputs[end]))[0]

    def _loss(self, layers: list[DecoderLayer], states: Tensor, tokens: np.ndarray) -> float:
        for index, layer in enumerate(layers):
            states = self.tasks.runner.run(layer, index, states)
        self.tasks.open_head()
        self.tasks.loss_gradient(states, tokens)
        samples, length = tokens.shape
        return self.tasks.losses().sum().item() / (samples * (length - 1))

    @contextmanager
    def timed(self, task: str) -> Iterator[None]:
        """Adds what happens inside to the task's seconds and peak, and prints them, in case no more follows."""
        measured = self.measured.setdefault(task, Measured())
        on_gpu = self.device.type == "cuda"
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
        print(f"  {self.tasks.method.name}, {task}: {seconds:.3f} s", flush=True)
