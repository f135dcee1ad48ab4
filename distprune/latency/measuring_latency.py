"""Measuring a model's latency table on this machine: real modules with random weights, at a grid of shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from distprune.errors import InputError
from distprune.hardware import name_of
from distprune.latency.device_names import device_name
from distprune.latency.latency_table import KindLatencies, LatencyTable, Workload
from distprune.latency.matching import refuse_mixtures
from distprune.latency.measured_shapes import filled_grids, measured_grids
from distprune.latency.random_layers import random_layer
from distprune.latency.timing_layers import Timer
from distprune.layers.architecture import Architecture
from distprune.layers.determinism import threads

#: Told how many of how many rounds are done.
OnRound = Callable[[int, int], None]


@dataclass(frozen=True)
class LatencyOptions:
    """What the model will have to do: requests, each of them a prompt that is read and new tokens that are made.

    The seconds that are budgeted are those of one request, as a mean over the batch sizes.

    Attributes:
        batches: requests at a time.
        prompt: tokens of each prompt.
        new: tokens that are made after it; none leaves decoding out.
        prefill_weight: how often the sum has the reading of the prompt; 0 leaves it out.
        rounds: times that each shape is measured.
        threads: of the CPU.
    """

    batches: tuple[int, ...] = (1,)
    prompt: int = 128
    new: int = 32
    prefill_weight: float = 1.0
    rounds: int = 40
    threads: int = 1

    def workloads(self) -> list[Workload]:
        """What is measured, decoding half-way through the new tokens."""
        found = []
        for batch in self.batches:
            share = 1 / (batch * len(self.batches))
            middle = self.prompt + self.new // 2
            found += [
                Workload(kind="prefill", batch=batch, tokens=self.prompt, weight=self.prefill_weight * share),
                Workload(kind="decode", batch=batch, tokens=middle, weight=self.new * share),
            ]
        return [workload for workload in found if workload.weight]


def check_options(options: LatencyOptions, model: Architecture) -> None:
    """See that a model can be measured so.

    Raises:
        InputError: it can't.
    """
    counts = {"prompt": options.prompt, "rounds": options.rounds, "threads": options.threads}
    for name, count in {"batch": min(options.batches, default=0), **counts}.items():
        if count < 1:
            raise InputError(f"--{name} {count}: at least 1 is needed.")
    if options.new < 0 or not 0 <= options.prefill_weight < float("inf"):
        raise InputError(f"--new {options.new} and --prefill-weight {options.prefill_weight:g}: must be 0 or more.")
    if not options.workloads():
        raise InputError("--new 0 and --prefill-weight 0: leave nothing to measure. Give one of them above 0.")
    if (tokens := options.prompt + options.new) > model.max_length:
        raise InputError(
            f"--prompt {options.prompt} and --new {options.new}: are {tokens} tokens together, and the model takes "
            f"{model.max_length} (max_position_embeddings). Give fewer."
        )


def measure(
    model: Architecture,
    options: LatencyOptions,
    device: torch.device,
    dtype: torch.dtype,
    on_round: OnRound = lambda done, of: None,
) -> LatencyTable:
    """Time all parts of the model's layers on a device of this machine, at a grid of shapes.

    Raises:
        InputError: an option can't be met, or the model has mixtures of experts.
    """
    refuse_mixtures(model, "measure-latency")
    check_options(options, model)
    workloads, (first, layers) = options.workloads(), kinds_of_layers(model)
    total, done = len(first) * len(workloads) * (1 + options.rounds), 0

    def advance() -> None:
        nonlocal done
        done += 1
        on_round(done, total)

    with threads(options.threads):
        kinds = [
            measure_kind(model, workloads, Timer(model, index, device, dtype, options.rounds, advance))
            for index in first
        ]
    return LatencyTable(
        model_type=model.config.model_type,
        hidden_size=model.hidden_size,
        device=device_name(device),
        dtype=name_of(dtype),
        threads=options.threads,
        torch=torch.__version__,
        workloads=workloads,
        layers=layers,
        kinds=kinds,
    )


def measure_kind(model: Architecture, workloads: list[Workload], timer: Timer) -> KindLatencies:
    """The latencies of layers of one kind."""
    grids = measured_grids(model, timer.index)
    shapes = dict.fromkeys(shape for grid in grids for shape in (*grid.shapes, *grid.less) if shape is not None)
    modules = {shape: random_layer(model, timer.index, shape, timer.device, timer.dtype) for shape in shapes}
    return filled_grids(model.dense_shape(timer.index), grids, timer.seconds(modules, workloads))


def kinds_of_layers(model: Architecture) -> tuple[list[int], list[int]]:
    """The first layer of each kind, and of each layer the number of its kind."""
    first: dict[Hashable, int] = {}
    numbers: dict[Hashable, int] = {}
    for index in range(model.num_layers):
        first.setdefault(model.kind(index), index)
        numbers.setdefault(model.kind(index), len(numbers))
    return list(first.values()), [numbers[model.kind(index)] for index in range(model.num_layers)]
