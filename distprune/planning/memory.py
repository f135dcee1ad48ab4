"""Peak memory of workers, driver and nodes.

What tasks take of a device and of its host is what lived at once while they were rehearsed. What passes through the
object store lies in memory that its node's processes share, and counts in the resident memory of each that has touched
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distprune.engine.scheduler.relay import PIECES_PER_WORKER
from distprune.engine.worker.distill_task import Distill
from distprune.engine.worker.end_to_end_tasks import StepOptimizer
from distprune.engine.worker.expert_pass_tasks import MixtureTask
from distprune.engine.worker.expert_tasks import JoinExperts, PruneAround, PruneExperts
from distprune.engine.worker.pass_tasks import Advance, Backward, Embed, LossGradient, Sweep
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.round_tasks import SampledGradient
from distprune.engine.worker.task import Task
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.planning.rehearsal import Rehearsed
from distprune.planning.scenario import Scenario, TokenSet

MIB, GIB = 2**20, 2**30

#: A process with Python, torch, transformers and Ray in it: 530 MiB when it has done next to nothing.
BASE_RESIDENT = 570 * MIB
#: The same with CUDA's libraries.
BASE_RESIDENT_CUDA = 3 * GIB
#: What CUDA and its linear algebra take of a GPU for each process, before the first tensor. Not in torch's own figure.
CUDA_CONTEXT = 1 * GIB
#: Of what a task allocates, what the allocator holds beyond it.
FRAGMENTATION = 1.1
#: Ray gives the object store this share of a node, and kills workers where more than that share is used.
STORE_SHARE, USABLE_SHARE = 0.3, 0.95
#: Layers whose gradients lie on disk at once.
GRADIENTS_KEPT = 2
#: Sequences that the model writes at once, when it makes its own calibration set.
OWN_SAMPLES_BATCH = 128


@dataclass(frozen=True)
class MemoryPlan:
    """Peaks in bytes. Resident memory counts what is shared with the object store; ``node_host`` counts it once.

    Attributes:
        worker_device: what torch allocates on a worker's GPU; 0 without one.
        gpu: of the fullest GPU, CUDA's own part included.
        worker_resident, driver_resident: of each process.
        store: what the object store of the driver's node holds at most; beyond its capacity it spills to disk.
        node_host: of the fullest node, which is the driver's.
        disk: what the folder that the run works in, beside its output, holds at most.
    """

    worker_device: int
    gpu: int
    worker_resident: int
    driver_resident: int
    store: int
    node_host: int
    disk: int


def plan_memory(scenario: Scenario) -> MemoryPlan:
    """The peaks of a run."""
    placement, store = scenario.placement, _store_peak(scenario)
    shared = store if scenario.cluster.host_memory is None else min(store, STORE_SHARE * scenario.cluster.host_memory)
    peaks = task_peaks(scenario)
    device = max(peak.device for peak in peaks.values())
    host = FRAGMENTATION * max(peak.host for peak in peaks.values())
    base = BASE_RESIDENT_CUDA if scenario.on_gpu else BASE_RESIDENT
    private = base + max(host, _own_samples(scenario))
    driver = BASE_RESIDENT + _driver(scenario)
    context = placement.workers_per_gpu * (FRAGMENTATION * device + CUDA_CONTEXT) if scenario.on_gpu else 0
    return MemoryPlan(
        worker_device=round(device),
        gpu=round(context),
        worker_resident=round(private + shared),
        driver_resident=round(driver + shared),
        store=store,
        node_host=round(placement.workers_per_node * private + driver + shared),
        disk=_disk(scenario),
    )


# ---------------------------------------------------------------- workers


@dataclass(frozen=True)
class TaskPeak:
    """Bytes that a task makes live at once, on a GPU and in the host's memory."""

    device: float
    host: float


def task_peaks(scenario: Scenario) -> dict[str, TaskPeak]:
    """The peaks of every kind of task, that of the greatest layer."""
    peaks: dict[str, TaskPeak] = {}
    for task, rehearsed, samples in _rehearsed(scenario):

        def peak(kind: bool, rehearsed: Rehearsed = rehearsed, samples: float = samples) -> float:
            def of(done):
                return sum(size for device, size in done.counts.peak.items() if (device == "cpu") == kind)

            return rehearsed.on(samples, of)

        before = peaks.get(task.kind(), TaskPeak(0, 0))
        peaks[task.kind()] = TaskPeak(max(before.device, peak(False)), max(before.host, peak(True)))
    return peaks


#: Tasks that get all samples, or pieces as large as the run's go.
ON_ALL_SAMPLES = (
    *(Embed, Prune, PruneAround, PruneExperts, JoinExperts, MixtureTask),
    *(Sweep, Backward, LossGradient, SampledGradient),
)


def _rehearsed(scenario: Scenario) -> Iterator[tuple[type[Task], Rehearsed, float]]:
    """All tasks, once of every kind of layer, and how many samples one gets at most."""
    for task, rehearsed in _rehearsed_on_all(scenario):
        yield task, rehearsed, _samples(scenario, task)
    if scenario.learns_gates:
        step = scenario.step_of_gates
        for index in one_of_each_group(scenario):
            for passed in scenario.rehearsal.gate_learning(index).values():
                yield from ((task, rehearsed, step) for task, rehearsed in passed.items())


def one_of_each_group(scenario: Scenario) -> list[int]:
    """A layer of every kind."""
    return [*{scenario.rehearsal.group(index): index for index in range(scenario.layers)}.values()]


def _rehearsed_on_all(scenario: Scenario) -> Iterator[tuple[type[Task], Rehearsed]]:
    """The tasks of all stages but that in which gates learn."""
    rehearsal = scenario.rehearsal
    yield from rehearsal.ends().items()
    for index in one_of_each_group(scenario):
        is_run = {Advance: scenario.config.distill is not None}
        yield from ((task, takes) for task, takes in rehearsal.layer(index).items() if is_run.get(task, True))
        yield from rehearsal.learning(index).items()
        for through_pruned in rehearsal.further_round(index).values():
            yield from through_pruned.items()


def _samples(scenario: Scenario, task: type[Task]) -> float:
    """Those that one task gets at most: a piece of the relays', all, or all that is learnt from."""
    if issubclass(task, (Sweep, Backward, LossGradient, SampledGradient)) and scenario.config.experts_at_once is None:
        batches = -(-scenario.calibration.samples // scenario.batch)
        pieces = min(batches, PIECES_PER_WORKER * scenario.placement.workers)
        return min(scenario.calibration.samples, scenario.batch * -(-batches // pieces))
    if issubclass(task, ON_ALL_SAMPLES):
        return scenario.calibration.samples
    if issubclass(task, (Advance, Distill)):
        return scenario.distilled_on.samples if scenario.distilled_on else scenario.calibration.samples
    return min(scenario.config.distill.batch, scenario.distilled_on.samples) if scenario.is_end_to_end else 1.0


def _own_samples(scenario: Scenario) -> float:
    """The whole model and its KV cache, where no calibration set is given. On a GPU it spreads over what there is."""
    if scenario.config.calibration is not None or scenario.on_gpu:
        return 0.0
    architecture, rows = scenario.architecture, min(OWN_SAMPLES_BATCH, scenario.config.samples)
    heads = [shape.attention for shape in architecture.dense_shapes if shape.attention]
    cached = sum(each.kv_heads * (each.query_key_dim + each.value_dim) for each in heads)
    logits = rows * architecture.vocab_size * (4 + 4 + 8)
    itemsize, stored = scenario.dtype.itemsize, architecture.dtype.itemsize
    weights = (scenario.bytes_before + scenario.outer_bytes) * itemsize // stored
    return weights + rows * cached * scenario.config.sequence_length * itemsize + logits


# ---------------------------------------------------------------- driver, store and disk


def _driver(scenario: Scenario) -> float:
    """Hidden states on their way through the journal, a shard as it is made of parts, mapped from their files, or what
    layers learn end to end."""
    after = scenario.bytes_after + scenario.outer_bytes
    largest = max(scenario.config.max_shard_size, *scenario.pruned_bytes)
    return max(scenario.hidden_states(scenario.calibration), min(after, largest), _learnt(scenario))


def _learnt(scenario: Scenario) -> float:
    """Bytes of all that trains in end-to-end distillation, with the optimizer's two moments."""
    if not scenario.is_end_to_end:
        return 0.0
    rehearsal = scenario.rehearsal
    return sum(rehearsal.learning(index)[StepOptimizer].less.given for index in range(scenario.layers))


def _store_peak(scenario: Scenario) -> int:
    """What the workers' calls hold at once: inputs, outputs that are put once more, and pruned layers."""
    workers, states = scenario.placement.workers, scenario.hidden_states(scenario.calibration)
    # Layers whose experts come in chunks are written where they are pruned, if that node sees the output's folder.
    is_written = scenario.config.experts_at_once is not None and scenario.config.writes == "auto"
    layer = 0 if is_written else max(scenario.pruned_bytes)
    # In the dense pass, the input of every open layer, and what the driver just got.
    batches = -(-scenario.calibration.samples // scenario.batch)
    open_layers = min(workers, scenario.layers, batches, PIECES_PER_WORKER * workers)
    relays = min(workers, scenario.blocks)
    pruning = relays * ((3 if scenario.block_length > 1 else 1) * states + layer)
    peak = max(3 * states, (open_layers + 2) * states, pruning)
    if scenario.config.experts_at_once is not None:
        # What is passed between the tasks that share a layer: what each expert gives comes, and is put once more.
        each = 3 + 2 * max(shape.ffn.per_token for shape in mixtures(scenario))
        peak = max(peak, each * max(states, scenario.gradients if scenario.needs_gradients else 0))
    if scenario.needs_gradients:
        # The same of gradients, and the hidden states that go with the pieces at work.
        peak = max(peak, (open_layers + 2) * scenario.gradients + states)
    if scenario.is_end_to_end:
        # Both models' hidden states of a step, what was learnt before and is learnt now, and the layers that are open.
        samples = min(scenario.config.distill.batch, scenario.distilled_on.samples)
        states = (2 * scenario.layers + 1) * scenario.hidden_states(TokenSet(samples, scenario.distilled_on.length))
        peak = max(peak, states + 2 * _learnt(scenario) + 2 * workers * layer)
    elif scenario.distilled_on:
        # Distillation runs so many layers ahead, each with its input and its target.
        peak = max(peak, (2 * workers + 2) * scenario.hidden_states(scenario.distilled_on) + 2 * workers * layer)
    return round(peak)


def mixtures(scenario: Scenario) -> list[LayerShape]:
    """The shapes of the layers that have a mixture of experts."""
    return [shape for shape in scenario.architecture.dense_shapes if isinstance(shape.ffn, ExpertsShape)]


def _disk(scenario: Scenario) -> int:
    """The pruned layers, and every block's input or, where pruning aims at them, hidden states of all layers and of the
    model's end; or all parts, and the shards that they become; or hidden states of all of these, with the gradients of
    some layers, and in a further round what pruning has left and needs. Profiles lie there to the end."""
    states = scenario.hidden_states(scenario.calibration)
    hidden_size = scenario.architecture.hidden_size
    profiles = sum(scenario.method.profile_bytes(hidden_size, shape) for shape in scenario.architecture.dense_shapes)
    waiting = scenario.layers + 1 if scenario.aiming else scenario.blocks + scenario.learns_gates
    pruning = scenario.bytes_after + waiting * states
    assembling = 2 * scenario.bytes_after + 2 * scenario.outer_bytes
    gradients = (scenario.layers + 1) * states + GRADIENTS_KEPT * scenario.gradients if scenario.needs_gradients else 0
    again = gradients + scenario.bytes_after + waiting * states if scenario.config.rounds > 1 else 0
    return profiles + max(pruning, assembling, gradients, again)
