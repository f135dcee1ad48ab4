"""What every stage of a run does, and how long it would take on the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from distprune.planning.memory import OWN_SAMPLES_BATCH
from distprune.planning.scenario import KEPT_EVERY, Scenario, TokenSet
from distprune.planning.work import FLOAT32, Work, matrix_parameters, total


@dataclass(frozen=True)
class StagePlan:
    """FLOPs of forward passes (and backward ones), of products of statistics and of solves; bytes; seconds."""

    name: str
    forward_flops: float
    statistics_flops: float
    solve_flops: float
    bytes_read: float
    bytes_stored: float
    bytes_written: float
    seconds: float


def plan_stages(scenario: Scenario) -> list[StagePlan]:
    stages = [_start(scenario), _check(scenario)]
    if scenario.config.calibration is None:
        stages.append(_own_samples(scenario))
    stages.append(_dense_pass(scenario))
    if scenario.needs_gradients:
        stages.append(_gradient_pass(scenario))
    stages.append(_prune(scenario))
    if scenario.config.distill:
        stages.append(_end_to_end(scenario) if scenario.is_end_to_end else _distill(scenario))
    return [*stages, _assemble(scenario)]


def _stage(name: str, work: Work, seconds: float) -> StagePlan:
    return StagePlan(
        name, work.forward, work.statistics, work.solves, work.read, work.stored, work.written, round(seconds, 3)
    )


def _seconds(scenario: Scenario, work: Work) -> float:
    """Of one call of a worker."""
    seconds = work.seconds(scenario.rates, scenario.solve_rates, float32=scenario.dtype == torch.float32)
    return scenario.placement.slowdown * seconds + scenario.rates.call_seconds


def _shared_out(scenario: Scenario, chains: Sequence[float]) -> float:
    """How long the workers take for chains of calls, each one after the other: the longest, or all in equal shares."""
    return max(*chains, sum(chains) / scenario.placement.workers) if chains else 0.0


def _while_written(scenario: Scenario, seconds: float, journal: Work) -> float:
    """The driver writes while the workers go on, so the slower of the two counts."""
    return max(seconds, journal.seconds(scenario.rates))


# ---------------------------------------------------------------- before the layers


def _start(scenario: Scenario) -> StagePlan:
    return _stage("start", Work(), scenario.rates.start_seconds)


def _check(scenario: Scenario) -> StagePlan:
    """Every weight is read once and looked at. All workers of a node read from one disk."""
    size = scenario.bytes_before + scenario.outer_bytes
    reading = size / scenario.rates.read / min(scenario.cluster.nodes, scenario.placement.workers)
    looking = Work(passed=float(size)).seconds(scenario.rates) * scenario.placement.slowdown
    return _stage("check", Work(read=size), max(reading, looking / scenario.placement.workers))


def _own_samples(scenario: Scenario) -> StagePlan:
    """One worker runs the whole model, a token of all samples at a time: every token reads every weight.

    What a GPU can't hold waits on its host, and goes there for every token.
    """
    config, size = scenario.config, scenario.bytes_before + scenario.outer_bytes
    steps = config.sequence_length * -(-config.samples // OWN_SAMPLES_BATCH)
    head = 2.0 * scenario.dense.vocab_size * scenario.hidden * scenario.calibration.tokens
    forward = total(scenario.forward(scenario.shape(index), scenario.calibration) for index in range(scenario.layers))
    work = forward + Work(forward=head, passed=float(steps * size), read=size)
    work += scenario.moved(steps * max(0, size - scenario.cluster.gpu_memory))
    return _stage("own samples", work, _seconds(scenario, work))


# ---------------------------------------------------------------- layer by layer


def _dense_pass(scenario: Scenario) -> StagePlan:
    """Hidden states go from layer to layer. Where a gradient pass follows, the profiles are its."""
    states = float(scenario.hidden_states(scenario.calibration))
    handed_on = Work(stored=2 * states)
    each = scenario.carrying if scenario.needs_gradients else partial(_observe, scenario)
    layers = [each(index) + handed_on for index in range(scenario.layers)]
    if scenario.needs_gradients:
        kept = scenario.layers + 1
    else:
        kept = sum(scenario.begins_block(index) or index % KEPT_EVERY == 0 for index in range(scenario.layers))
    return _relay(scenario, "dense pass", handed_on, layers, Work(written=kept * states))


def _gradient_pass(scenario: Scenario) -> StagePlan:
    """Gradients go back from layer to layer, and to every layer the hidden states at its input."""
    gradients = float(scenario.gradients)
    handed_on = Work(stored=2 * gradients + scenario.hidden_states(scenario.calibration))
    layers = [_observe(scenario, index) + handed_on for index in reversed(range(scenario.layers))]
    head = _loss_gradient(scenario) + handed_on
    return _relay(scenario, "gradient pass", head, layers, Work(written=scenario.layers * gradients))


def _loss_gradient(scenario: Scenario) -> Work:
    """Logits and what goes back from them; some six passes over them in float32 on the way."""
    logits = float(scenario.calibration.tokens * scenario.dense.vocab_size)
    read = Work(read=scenario.head_bytes) + scenario.moved(scenario.head_bytes)
    states = scenario.moved(scenario.hidden_states(scenario.calibration) + scenario.gradients)
    return read + states + Work(forward=4 * logits * scenario.hidden, passed=6 * FLOAT32 * logits)


def _relay(scenario: Scenario, name: str, first: Work, layers: Sequence[Work], journal: Work) -> StagePlan:
    """A pipeline: each worker has a layer, and a layer starts when the one before it has passed on its first piece.

    The driver keeps what goes from layer to layer in its journal. What comes first is not shared out.
    """
    pieces = scenario.pieces
    at_once = min(scenario.placement.workers, scenario.layers, pieces)
    each = [_seconds(scenario, layer) + (pieces + 1) * scenario.rates.call_seconds for layer in layers]
    last_starts = (at_once - 1) / pieces * max(each)
    seconds = _seconds(scenario, first) + sum(each) / at_once + last_starts
    return _stage(name, total([first, *layers]) + journal, _while_written(scenario, seconds, journal))


def _observe(scenario: Scenario, index: int) -> Work:
    return scenario.observation(index, pruning=False) + scenario.solve(index, pruning=False).work


def _prune(scenario: Scenario) -> StagePlan:
    """Blocks side by side, and inside a block a relay."""
    calls = [_prune_layer(scenario, index) for index in range(scenario.layers)]
    seconds = [_seconds(scenario, call) for call in calls]
    length = scenario.block_length
    chains = [sum(seconds[start : start + length]) for start in range(0, scenario.layers, length)]
    propagated = scenario.layers - scenario.blocks
    states = propagated * scenario.hidden_states(scenario.calibration)
    journal = Work(written=float(states)) + total(_by_driver(scenario, size) for size in scenario.pruned_bytes)
    return _stage("prune", total(calls) + journal, _while_written(scenario, _shared_out(scenario, chains), journal))


def _prune_layer(scenario: Scenario, index: int) -> Work:
    work = scenario.observation(index, pruning=True) + scenario.solve(index, pruning=True).work
    work += _handed_over(scenario, scenario.pruned_bytes[index])
    if (index + 1) % scenario.block_length and index + 1 < scenario.layers:
        work += scenario.forward(scenario.shapes[index], scenario.calibration)
        states = 2.0 * scenario.hidden_states(scenario.calibration)
        work += Work(stored=states) + scenario.moved(states)
    return work


def _handed_over(scenario: Scenario, size: int) -> Work:
    """What handing over a finished layer takes a worker, whose node is taken to see the output's file system."""
    return Work(stored=size) if scenario.config.writes == "driver" else Work(written=float(size))


def _by_driver(scenario: Scenario, size: int) -> Work:
    """What the driver writes of it."""
    return Work(written=float(size)) if scenario.config.writes == "driver" else Work()


def _distill(scenario: Scenario) -> StagePlan:
    """The dense model runs ahead as a relay; the pruned layers learn side by side."""
    lessons = scenario.lessons
    size = 2.0 * scenario.hidden_states(lessons)
    states = Work(stored=size) + scenario.moved(size)
    ahead, learning = [states], []
    for index in range(scenario.layers):
        ahead.append(scenario.reading(index) + scenario.forward(scenario.shape(index), lessons) + states)
        learning.append(_learn(scenario, index))
    relay, learnt = ([_seconds(scenario, call) for call in calls] for calls in (ahead, learning))
    seconds = max(sum(relay) + learnt[-1], (sum(relay) + sum(learnt)) / scenario.placement.workers)
    parts = total(_by_driver(scenario, size) for size in scenario.pruned_bytes)
    return _stage("distill", total([*ahead, *learning]) + parts, _while_written(scenario, seconds, parts))


def _learn(scenario: Scenario, index: int) -> Work:
    """Forward and backward over the training samples, an optimizer step a batch, the held-out samples twice.

    The dense layers that judge the output run forward on it and backward, for its gradient.
    """
    options, lessons, shape = scenario.config.distill, scenario.lessons, scenario.shapes[index]
    held_out = scenario.held_out
    training, steps = options.epochs * (lessons.samples - held_out), scenario.steps
    one = TokenSet(1, lessons.length)
    work = scenario.forward(shape, one) * (3.0 * training + 2.0 * held_out)
    for judge in range(index + 1, min(index + 1 + options.look_ahead, scenario.layers)):
        work += scenario.forward(scenario.shape(judge), one) * (2.0 * training + 2.0 * held_out)
        work += Work(read=scenario.stored_bytes[judge])
    # A step reads and writes weights, gradients and both moments, casts the weights and clears the gradients.
    optimizer = Work(passed=float(steps) * matrix_parameters(shape, scenario.hidden) * 12 * FLOAT32)
    exercise = 3.0 if options.look_ahead else 2.0
    lesson = scenario.moved(exercise * options.epochs * scenario.hidden_states(lessons))
    pruned = scenario.pruned_bytes[index]
    return work + optimizer + lesson + Work(stored=float(pruned)) + _handed_over(scenario, pruned)


def _end_to_end(scenario: Scenario) -> StagePlan:
    """Every step is a relay: dense layers, pruned ones, the model's end, and the pruned ones backwards."""
    options, lessons, workers = scenario.config.distill, scenario.lessons, scenario.placement.workers
    held_out = scenario.held_out
    training, steps = options.epochs * (lessons.samples - held_out), scenario.steps
    looks = 2 * -(-held_out // options.batch)
    pieces = min(-(-options.batch // options.micro_batch(scenario.config.micro_batch)), 4 * workers)
    one = TokenSet(1, lessons.length)
    work = Work()
    for index in range(scenario.layers):
        dense, pruned = scenario.forward(scenario.shape(index), one), scenario.forward(scenario.shapes[index], one)
        work += (dense + pruned) * (training + 2.0 * held_out) + pruned * (3.0 * training)
        work += Work(read=(steps + looks) * float(scenario.stored_bytes[index] + scenario.pruned_bytes[index]))
        # A pupil is made in float32, twice a step, and its weights with their gradients are gone over as it learns.
        passed = matrix_parameters(scenario.shapes[index], scenario.hidden) * 8.0 * FLOAT32
        work += Work(passed=(2 * steps + looks) * passed, read=steps * float(scenario.pruned_bytes[index]))
    logits = lessons.length * (training + 2.0 * held_out) * scenario.dense.vocab_size
    work += Work(forward=6 * logits * scenario.hidden, passed=8 * FLOAT32 * logits)
    states = 2.0 * scenario.hidden_states(TokenSet(training, lessons.length)) * (3 * scenario.layers + 1)
    work += Work(stored=states) + scenario.moved(states)
    calls = (steps * (3 * scenario.layers + 1) + looks * (2 * scenario.layers + 1)) * (pieces + 2)
    at_once = min(workers, scenario.layers, pieces)
    seconds = _seconds(scenario, work) / at_once + calls * scenario.rates.call_seconds
    parts = Work(written=float(scenario.bytes_after))
    return _stage("distill", work + parts, seconds)


# ---------------------------------------------------------------- after the layers


def _assemble(scenario: Scenario) -> StagePlan:
    """Embedding and head become parts too, and all parts are written anew as shards."""
    outer = scenario.outer_bytes
    work = Work(read=outer, written=float(scenario.bytes_after + 2 * outer))
    return _stage("assemble", work, work.seconds(scenario.rates))
