"""A run that has not been asked for yet: everything that its plan is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from distprune.budgets import Target, amount, decoder_parameters, outer_parameters, target_of
from distprune.calibration import open_calibration
from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.decoder_layer import LayerShape
from distprune.errors import InputError
from distprune.families import Family
from distprune.methods import Method, make_method
from distprune.modeling import PrunedConfig
from distprune.planning.cluster import Cluster, Placement, place_workers
from distprune.planning.headers import dense_model
from distprune.planning.rates import Rates, rates_of
from distprune.planning.shapes import expected_shapes
from distprune.planning.solves import Problem, Solve, solve_of
from distprune.planning.work import (
    FLOAT32,
    Work,
    backward_flops,
    forward_flops,
    matrix_parameters,
    moment_work,
    tap_widths,
    total,
    update_parameters,
)
from distprune.statistics import Moment, taps_of

# As the engine's relay has it.
PIECES_PER_WORKER = 4
# As its dense pass has it.
KEPT_EVERY = 4


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
    checkpoint: Checkpoint
    cluster: Cluster
    hardware: str
    rate_overrides: Mapping[str, float]
    family: Family
    dense: PrunedConfig
    method: Method
    target: Target
    shapes: tuple[LayerShape, ...]
    stored_bytes: tuple[int, ...]  # of each layer in the checkpoint
    pruned_bytes: tuple[int, ...]  # of each layer in the result
    outer_bytes: int  # of embedding, final norm and head
    stored_dtype: torch.dtype
    calibration: TokenSet
    lessons: TokenSet | None  # what distillation learns from

    @property
    def layers(self) -> int:
        return self.dense.num_hidden_layers

    @property
    def hidden(self) -> int:
        return self.dense.hidden_size

    @property
    def block_length(self) -> int:
        return self.config.block_length(self.layers)

    @property
    def blocks(self) -> int:
        return -(-self.layers // self.block_length)

    @cached_property
    def placement(self) -> Placement:
        return place_workers(self.config, self.cluster, self.layers)

    @cached_property
    def rates(self) -> Rates:
        return rates_of(self.hardware, self.config.threads_per_worker, self.rate_overrides)

    @property
    def offloads(self) -> bool:
        """Whether statistics are kept and layers solved elsewhere than where these run."""
        return self.config.offload and self.placement.device == "cuda"

    @cached_property
    def solve_rates(self) -> Rates:
        """Of where layers are solved."""
        return rates_of("cpu", self.config.threads_per_worker, self.rate_overrides) if self.offloads else self.rates

    @property
    def dtype(self) -> torch.dtype:
        """Of forward passes."""
        return getattr(torch, self.config.dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of gradients, and of the forward passes that they need."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @property
    def needs_gradients(self) -> bool:
        """Whether there is a gradient pass."""
        return bool(self.method.gradient_moments(self.shape(0)))

    @property
    def pieces(self) -> int:
        """In how many pieces the samples go through the dense pass, and the gradient pass."""
        batches = -(-self.calibration.samples // self.config.micro_batch)
        return min(batches, PIECES_PER_WORKER * self.placement.workers)

    # ---------------------------------------------------------------- distillation

    @property
    def is_end_to_end(self) -> bool:
        return self.config.distill is not None and self.config.distill.objective == "logits"

    @property
    def held_out(self) -> int:
        """Samples that nothing is learnt from."""
        samples = self.lessons.samples
        return min(max(1, round(self.config.distill.held_out * samples)), samples - 1)

    @property
    def steps(self) -> int:
        """Of the optimizer."""
        options = self.config.distill
        return options.epochs * -(-(self.lessons.samples - self.held_out) // options.batch)

    @property
    def step_states(self) -> int:
        """Bytes of the hidden states between two layers in a step of end-to-end distillation."""
        return self.hidden_states(TokenSet(min(self.config.distill.batch, self.lessons.samples), self.lessons.length))

    @property
    def learnt_bytes(self) -> int:
        """Of all that trains in end-to-end distillation, with the optimizer's two moments."""
        options = self.config.distill
        count = matrix_parameters if options.train == "full" else partial(update_parameters, rank=options.rank)
        return 3 * FLOAT32 * sum(count(shape, self.hidden) for shape in self.shapes)

    # ---------------------------------------------------------------- bytes

    def hidden_states(self, texts: TokenSet) -> int:
        """Bytes of the hidden states between two layers."""
        return texts.tokens * self.hidden * self.dtype.itemsize

    @property
    def gradients(self) -> int:
        """Bytes of the gradients between two layers."""
        return self.calibration.tokens * self.hidden * self.gradient_dtype.itemsize

    @property
    def head_bytes(self) -> int:
        """Of what gives the logits, in the checkpoint."""
        return self.checkpoint.tensors[self.family.head_of(self.dense)].nbytes

    @property
    def bytes_before(self) -> int:
        """Of all decoder layers in the checkpoint."""
        return sum(self.stored_bytes)

    @property
    def bytes_after(self) -> int:
        """Of all decoder layers in the result."""
        return sum(self.pruned_bytes)

    # ---------------------------------------------------------------- one layer

    def shape(self, index: int) -> LayerShape:
        return self.dense.layer_shape(index)

    def moments(self, index: int, *, pruning: bool) -> list[Moment]:
        """What is held for a layer in the pruning pass; or in the dense or the gradient pass, whichever profiles it."""
        if pruning:
            return list(self.method.pruning_moments(self.shape(index), self.shapes[index]))
        carried = () if self.needs_gradients else self.carried(index)
        return list(dict.fromkeys((*self._profiled(index), *carried)))

    def _profiled(self, index: int) -> list[Moment]:
        """What its profile is made of."""
        dense = self.shape(index)
        return list(dict.fromkeys((*self.method.dense_moments(dense), *self.method.gradient_moments(dense))))

    def carried(self, index: int) -> Sequence[Moment]:
        """What of it is collected in the dense pass for the pruning pass."""
        return self.method.carried_moments(self.shape(index)) if self.begins_block(index) else ()

    def begins_block(self, index: int) -> bool:
        return index % self.block_length == 0

    def solve(self, index: int, *, pruning: bool) -> Solve:
        moments = self.moments(index, pruning=True) if pruning else self._profiled(index)
        if not pruning and not moments:
            return Solve(Work(), 0)
        planned = self.shapes[index] if pruning else None
        solve = solve_of(self.method.name, Problem(self.hidden, self.shape(index), planned, moments))
        again = total(self.observed(*observation) for observation in solve.observations)
        return replace(solve, work=solve.work + again)

    def moved(self, size: float) -> Work:
        """Bytes that go to a GPU or come from it, where there is one."""
        return Work(moved=float(size)) if self.placement.device == "cuda" else Work()

    def forward(self, shape: LayerShape, texts: TokenSet) -> Work:
        return Work(forward=forward_flops(shape, self.hidden, texts.samples, texts.length))

    def backward(self, shape: LayerShape) -> Work:
        """Of the whole calibration set, with the gradients that go to the device and come back."""
        samples, length = self.calibration.samples, self.calibration.length
        return Work(forward=backward_flops(shape, self.hidden, samples, length)) + self.moved(2 * self.gradients)

    def reading(self, index: int) -> Work:
        """A layer from the checkpoint to the device."""
        return Work(read=self.stored_bytes[index]) + self.moved(self.stored_bytes[index])

    def carrying(self, index: int) -> Work:
        """What a layer takes in a dense pass without profiles."""
        return self.reading(index) + self.observed(self.shape(index), self.carried(index))

    def observation(self, index: int, *, pruning: bool) -> Work:
        """Reading a layer, running it over the calibration set (and back, for gradients) and collecting its moments."""
        read = self.reading(index)
        shape, moments = self.shape(index), self.moments(index, pruning=pruning)
        if pruning and set(moments) <= set(self.carried(index)):
            return read
        observed = self.observed(shape, moments)
        if pruning and "ffn_output" not in taps_of(moments):  # the output isn't computed
            observed += Work(forward=-2.0 * self.calibration.tokens * shape.ffn_width * self.hidden)
        if not pruning and self.needs_gradients:
            observed += self.backward(shape)
        return read + observed

    def observed(self, shape: LayerShape, moments: Sequence[Moment]) -> Work:
        """Running a layer of that shape over the calibration set and collecting moments."""
        widths = tap_widths(shape, self.hidden)
        batches = -(-self.calibration.samples // self.config.micro_batch)
        measured = total(
            moment_work(moment, widths, self.calibration.tokens, batches, self.dtype.itemsize, self.placement.device)
            for moment in moments
        )
        moved = self.moved(2 * self.hidden_states(self.calibration))
        if self.offloads:  # what a micro-batch adds comes to the host, and is read there beside the total
            moved += Work(moved=measured.passed_in_solves / 2)
            measured += Work(passed_in_solves=measured.passed_in_solves / 2)
        return moved + self.forward(shape, self.calibration) + measured


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
    method = make_method(config.method, config.options)
    family, dense = dense_model(checkpoint)
    sizes = family.stored_sizes(checkpoint.tensors, dense)
    target = target_of(config, dense, sizes)
    shapes = tuple(expected_shapes(method, target, config.align))
    own = TokenSet(config.samples, config.sequence_length)
    calibration = _token_set(config.calibration, dense) or own
    lessons = None
    if config.distill:
        lessons = _token_set(config.distill.calibration, dense) or calibration
    _check_length(calibration, dense)
    tensors, indices = checkpoint.tensors, range(dense.num_hidden_layers)
    layers = [[tensors[name] for name in family.layer_shapes(dense, index)] for index in indices]
    return Scenario(
        config=config,
        checkpoint=checkpoint,
        cluster=cluster,
        hardware=hardware,
        rate_overrides=rate_overrides,
        family=family,
        dense=dense,
        method=method,
        target=target,
        shapes=shapes,
        stored_bytes=tuple(sum(info.nbytes for info in layer) for layer in layers),
        pruned_bytes=tuple(
            amount("bytes", dense, index, shape, sizes.layers[index]) for index, shape in enumerate(shapes)
        ),
        outer_bytes=sum(tensors[name].nbytes for name in family.outer_shapes(dense)),
        # Of the largest tensor, a matrix: norms may be stored in another.
        stored_dtype=max(layers[0], key=lambda info: info.nbytes).dtype,
        calibration=calibration,
        lessons=lessons,
    )


def _token_set(path: Path | None, dense: PrunedConfig) -> TokenSet | None:
    if path is None:
        return None
    texts = TokenSet(*open_calibration(path).tokens.shape)
    _check_length(texts, dense)
    return texts


def _check_length(texts: TokenSet, dense: PrunedConfig) -> None:
    if texts.length > dense.max_position_embeddings:
        raise InputError(
            f"windows of {texts.length} tokens exceed the model's context of {dense.max_position_embeddings}. "
            "Give a shorter --sequence-length."
        )


def parameter_counts(scenario: Scenario) -> dict[str, int]:
    """Of the decoder layers and of everything, before and after."""
    before = scenario.target.dense
    after = decoder_parameters(scenario.dense, scenario.shapes)
    outer = outer_parameters(scenario.dense)
    return {
        "decoder_parameters_before": before,
        "decoder_parameters_after": after,
        "total_parameters_before": before + outer,
        "total_parameters_after": after + outer,
    }
