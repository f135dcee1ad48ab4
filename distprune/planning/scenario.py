"""A run that has not been asked for yet: everything that its plan is computed from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from distprune.budgets import StoredSizes, Target, layer_amount, target_of
from distprune.calibration import open_calibration
from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.engine.run.preflight import dense_model, learns_gates, needs_gradients, stored_dtype, stored_sizes
from distprune.engine.stages.context import layers_aiming
from distprune.engine.worker.dense_model import DenseModel
from distprune.errors import InputError
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import LayerShape
from distprune.methods import Method, make_method
from distprune.methods.gated import GatedMethod
from distprune.planning.cluster import Cluster, Placement, place_workers
from distprune.planning.rates import Rates, rates_of
from distprune.planning.rehearsal import Rehearsal
from distprune.planning.timing import CACHED, Clock


@dataclass(frozen=True)
class TokenSet:
    """A calibration set, known by its size alone."""

    samples: int
    length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length


@dataclass(frozen=True)
class Scenario:
    """A configuration, on a checkpoint known by its headers, on a cluster that is only described."""

    config: PruneConfig
    model: DenseModel
    cluster: Cluster
    hardware: str
    rate_overrides: Mapping[str, float]
    method: Method
    target: Target
    sizes: StoredSizes
    shapes: tuple[LayerShape, ...]
    calibration: TokenSet
    distilled_on: TokenSet | None  # what distillation learns from
    #: Rehearsals of this run and of those that differ in what no task sees, such as the number of workers.
    rehearsals: dict[Hashable, Rehearsal] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    @property
    def layers(self) -> int:
        return self.architecture.num_layers

    @property
    def block_length(self) -> int:
        return self.config.block_length(self.layers)

    @property
    def blocks(self) -> int:
        return -(-self.layers // self.block_length)

    @cached_property
    def placement(self) -> Placement:
        return place_workers(self.config, self.cluster, self.layers)

    @property
    def on_gpu(self) -> bool:
        """Whether layers run on GPUs."""
        return self.placement.device == "cuda"

    # ---------------------------------------------------------------- time

    @cached_property
    def rates(self) -> Rates:
        return rates_of(self.hardware, self.config.threads_per_worker, self.rate_overrides)

    @cached_property
    def clock(self) -> Clock:
        """What tells how long a worker's tasks take."""
        host = rates_of("cpu", self.config.threads_per_worker, {}) if self.on_gpu else self.rates
        memory = self.cluster.host_memory
        # What has been checked is read again from where the file system holds it, if there is room.
        is_held = memory is None or self.bytes_before + self.outer_bytes < memory / 2
        reading = max(self.rates.read, CACHED) if is_held and "read" not in self.rate_overrides else self.rates.read
        return Clock(self.rates, host, reading, self.placement.slowdown)

    # ---------------------------------------------------------------- what tasks take

    @property
    def batch(self) -> int:
        """Samples of a micro-batch."""
        return min(self.config.micro_batch, self.calibration.samples)

    @property
    def rehearsal(self) -> Rehearsal:
        """The run's tasks, on tensors without values."""
        config, device = self.config, self.placement.device
        run = device, config.dtype, config.offload and device == "cuda", self.block_length
        if (key := (*run, self.batch)) in self.rehearsals:
            return self.rehearsals[key]
        if base := next((known for other, known in self.rehearsals.items() if other[:-1] == run), None):
            self.rehearsals[key] = base.with_batch(self.batch)
        else:
            self.rehearsals[key] = Rehearsal(
                config.model_copy(update={"micro_batch": self.batch, "device": device}),
                self.model,
                self.shapes,
                device,
                self.batch,
                self.calibration.length,
                self.distilled_on and self.distilled_on.length,
            )
        return self.rehearsals[key]

    @cached_property
    def aiming(self) -> list[int]:
        """The layers that are pruned towards the dense model's hidden states."""
        in_chunks = self.config.experts_at_once is not None
        return layers_aiming(self.method, self.architecture.dense_shapes, in_chunks)

    @property
    def needs_gradients(self) -> bool:
        """Whether there is a gradient pass."""
        return needs_gradients(self.method, self.architecture)

    @property
    def learns_gates(self) -> bool:
        """Whether there is a stage in which gates learn."""
        return learns_gates(self.method, self.config)

    @property
    def step_of_gates(self) -> int:
        """Samples of a step in which gates learn."""
        assert isinstance(self.method, GatedMethod)
        return min(self.method.batch, self.calibration.samples)

    @property
    def is_end_to_end(self) -> bool:
        return self.config.distill is not None and self.config.distill.objective == "logits"

    # ---------------------------------------------------------------- bytes

    @property
    def dtype(self) -> torch.dtype:
        """Of forward passes."""
        return getattr(torch, self.config.dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of gradients, and of the forward passes that they need."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    def hidden_states(self, texts: TokenSet) -> int:
        """Bytes of the hidden states between two layers."""
        return texts.tokens * self.architecture.hidden_size * self.dtype.itemsize

    @property
    def gradients(self) -> int:
        """Bytes of the gradients between two layers."""
        return self.calibration.tokens * self.architecture.hidden_size * self.gradient_dtype.itemsize

    @cached_property
    def stored_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer in the checkpoint."""
        tensors = self.model.checkpoint.tensors
        layers = map(self.model.stored_dims, range(self.layers))
        return tuple(sum(tensors[stored].nbytes for stored in layer) for layer in layers)

    @cached_property
    def pruned_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer in the result."""
        shapes = enumerate(self.shapes)
        return tuple(
            layer_amount("bytes", self.architecture, index, shape, self.sizes.layers[index]) for index, shape in shapes
        )

    @property
    def outer_bytes(self) -> int:
        """Of embedding, final norm and head."""
        return self.sizes.outer

    @property
    def bytes_before(self) -> int:
        """Of all decoder layers in the checkpoint."""
        return sum(self.stored_bytes)

    @property
    def bytes_after(self) -> int:
        """Of all decoder layers in the result."""
        return sum(self.pruned_bytes)

    def begins_block(self, index: int) -> bool:
        return index % self.block_length == 0


def make_scenario(
    config: PruneConfig, checkpoint: Checkpoint, cluster: Cluster, hardware: str, rate_overrides: Mapping[str, float]
) -> Scenario:
    """A run to plan for.

    Args:
        config: with its dtype settled.
        checkpoint: its headers.
        cluster: what the run would be on.
        hardware: a key of :data:`distprune.planning.RATES`.
        rate_overrides: rates by name that replace those.

    Raises:
        InputError: the checkpoint can't be pruned, or not so far, or a calibration set doesn't fit it.
    """
    method, model = make_method(config.method, config.options), dense_model(checkpoint)
    sizes = stored_sizes(model)
    target = target_of(config, model.architecture, sizes)
    method.check_target(target, config.align)
    shapes = target.dense_shapes if target.sparsity == 0 else method.even_shapes(target, config.align)
    own = TokenSet(config.samples, config.sequence_length)
    calibration = _token_set(config.calibration, model.architecture) or own
    distilled_on = None
    if config.distill:
        distilled_on = _token_set(config.distill.calibration, model.architecture) or calibration
    _check_length(calibration, model.architecture)
    place_workers(config, cluster, model.architecture.num_layers)
    rates_of(hardware, config.threads_per_worker, rate_overrides)
    return Scenario(
        config=config,
        model=model,
        cluster=cluster,
        hardware=hardware,
        rate_overrides=rate_overrides,
        method=method,
        target=target,
        sizes=sizes,
        shapes=tuple(shapes),
        calibration=calibration,
        distilled_on=distilled_on,
    )


def settled_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of a checkpoint's weights."""
    return stored_dtype(dense_model(checkpoint))


def _token_set(path: Path | None, architecture: Architecture) -> TokenSet | None:
    if path is None:
        return None
    texts = TokenSet(*open_calibration(path).tokens.shape)
    _check_length(texts, architecture)
    return texts


def _check_length(texts: TokenSet, architecture: Architecture) -> None:
    if texts.length > architecture.max_length:
        raise InputError(
            f"windows of {texts.length} tokens exceed the model's context of {architecture.max_length}. "
            "Give a shorter --sequence-length."
        )
