"""Peak memory of workers, driver and nodes.

A worker holds one layer's weights, its statistics, one micro-batch of activations and, while it solves, a projection
in float32 or some copies of the largest Gram matrix; statistics and what solves take are in the host's memory if they
are offloaded. What passes through the object store lies in memory that its node's processes share, and counts in the
resident memory of each that has touched it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distprune.decoder_layer import LayerShape
from distprune.forward import TAPS
from distprune.loss import TOKENS_AT_ONCE
from distprune.planning.scenario import Scenario
from distprune.planning.work import FLOAT32, matrix_parameters, moment_size, tap_widths
from distprune.statistics import Cross, Moment, Power, ScalingPower, taps_of
from distprune.statistics.moments import ROWS

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
        gpu: of the fullest GPU, CUDA's own share included.
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
    placement, on_gpu = scenario.placement, scenario.placement.device == "cuda"
    store = _store_peak(scenario)
    shared = store if scenario.cluster.host_memory is None else min(store, STORE_SHARE * scenario.cluster.host_memory)
    task = FRAGMENTATION * max(task_peaks(scenario).values())
    device = task if on_gpu else 0.0
    private = (BASE_RESIDENT_CUDA if on_gpu else BASE_RESIDENT) + max(
        _host_of_tasks(scenario) + (0.0 if on_gpu else task), _own_samples(scenario)
    )
    driver = BASE_RESIDENT + _driver(scenario)
    return MemoryPlan(
        worker_device=round(device),
        gpu=round((device + CUDA_CONTEXT) * placement.workers_per_gpu) if on_gpu else 0,
        worker_resident=round(private + shared),
        driver_resident=round(driver + shared),
        store=store,
        node_host=round(placement.workers_per_node * private + driver + shared),
        disk=_disk(scenario),
    )


# ---------------------------------------------------------------- where the layer is


def task_peaks(scenario: Scenario) -> dict[str, float]:
    """Bytes on the device where layers run, by task: the greatest layer's."""
    layers = _different_layers(scenario)
    profiling = max(_peak(scenario, index, pruning=False) for index in layers)
    if scenario.needs_gradients:
        peaks = {
            "dense pass": max(_carrying(scenario, index) for index in layers),
            "gradient pass": max(profiling, _loss_peak(scenario, _micro_batch_tokens(scenario))),
        }
    else:
        peaks = {"dense pass": profiling}
    peaks["prune"] = max(_peak(scenario, index, pruning=True) for index in layers)
    if scenario.config.distill:
        peaks["distill"] = max(_distill_peak(scenario, index) for index in layers)
        if scenario.is_end_to_end:
            tokens = min(scenario.config.distill.batch, scenario.lessons.samples) * scenario.lessons.length
            peaks["distill"] = max(peaks["distill"], _loss_peak(scenario, tokens, tables=4))
    return peaks


def _different_layers(scenario: Scenario) -> list[int]:
    """One layer of each kind: the others are as large."""

    def kind(index: int) -> tuple:
        return scenario.shape(index), scenario.shapes[index], scenario.begins_block(index)

    return list({kind(index): index for index in range(scenario.layers)}.values())


def _peak(scenario: Scenario, index: int, *, pruning: bool) -> float:
    """The statistics, and whichever is most of running, solving and running again; of which all but running is on the
    host where that is offloaded."""
    shape, moments = scenario.shape(index), scenario.moments(index, pruning=pruning)
    solve = scenario.solve(index, pruning=pruning)
    if scenario.needs_gradients and not pruning:
        running = _running_back(scenario, index, moments)
    else:
        running = _running_weights(scenario, index) + _running(scenario, shape, moments)
    if scenario.offloads:
        return max([running, *(_running_again(scenario, *observation) for observation in solve.observations)])
    on_gpu = scenario.stored_bytes[index] if scenario.placement.device == "cuda" else 0
    again = [
        on_gpu + _running_again(scenario, *observation) + _statistics(scenario, *observation)
        for observation in solve.observations
    ]
    return _statistics(scenario, shape, moments) + max(running, on_gpu + _solving(scenario, index, pruning), *again)


def _solving(scenario: Scenario, index: int, pruning: bool) -> float:
    """What a solve takes beside the layer and its statistics."""
    return max(scenario.solve(index, pruning=pruning).workspace, scenario.pruned_bytes[index] if pruning else 0)


def _running_again(scenario: Scenario, shape: LayerShape, moments: Sequence[Moment]) -> float:
    return _part(scenario, shape) + _running(scenario, shape, moments)


def _part(scenario: Scenario, shape: LayerShape) -> int:
    """Weights sliced from the layer, to run again."""
    return scenario.stored_dtype.itemsize * matrix_parameters(shape, scenario.hidden)


def _carrying(scenario: Scenario, index: int) -> float:
    shape, carried = scenario.shape(index), scenario.carried(index)
    running = _running_weights(scenario, index) + _running(scenario, shape, carried)
    return running + (0 if scenario.offloads else _statistics(scenario, shape, carried))


def _running(scenario: Scenario, shape: LayerShape, moments: Sequence[Moment]) -> float:
    return _activations(scenario, shape) + _measuring(scenario, shape, moments)


def _running_back(scenario: Scenario, index: int, moments: Sequence[Moment]) -> int:
    """Forward and backward, at its widest in the FFN or in the norm before it, or measuring what was observed."""
    shape, hidden, itemsize = scenario.shape(index), scenario.hidden, scenario.gradient_dtype.itemsize
    widths, taps = tap_widths(shape, hidden), taps_of(moments)
    heads = (shape.query_heads + shape.kv_heads) * (shape.query_key_dim + shape.value_dim)
    # Gate, up and what comes of them, with their gradients; norms compute in float32.
    ffn, norm = itemsize * 6 * shape.ffn_width + FLOAT32 * 3 * hidden, FLOAT32 * 8 * hidden
    activations, observed = (itemsize * sum(widths[tap] for tap in some) for some in (taps & {*TAPS}, taps))
    tokens = _micro_batch_tokens(scenario)
    passing = tokens * (activations + itemsize * heads + max(ffn, norm))
    measuring = tokens * observed + _measuring(scenario, shape, moments)
    return _running_weights(scenario, index, itemsize) + max(passing, measuring)


def _loss_peak(scenario: Scenario, tokens: int, tables: int = 2) -> int:
    """At the model's end: the head, ``tables`` of some logits, and ``tokens`` in its norm, which is in float32."""
    dtype, vocabulary, on_gpu = scenario.gradient_dtype, scenario.dense.vocab_size, scenario.placement.device == "cuda"
    shares = not on_gpu and dtype == scenario.stored_dtype
    head = (scenario.head_bytes if on_gpu else 0) + (0 if shares else dtype.itemsize * vocabulary * scenario.hidden)
    return head + FLOAT32 * (tables * min(TOKENS_AT_ONCE, tokens) * vocabulary + 3 * tokens * scenario.hidden)


def _parameters(scenario: Scenario, index: int) -> int:
    return scenario.stored_bytes[index] // scenario.stored_dtype.itemsize


def _pruned_parameters(scenario: Scenario, index: int) -> int:
    return scenario.pruned_bytes[index] // scenario.stored_dtype.itemsize


def _running_weights(scenario: Scenario, index: int, itemsize: int | None = None) -> int:
    """Of the module's own copy: none on the CPU where the checkpoint's dtype serves."""
    itemsize = itemsize or scenario.dtype.itemsize
    shares = scenario.placement.device == "cpu" and itemsize == scenario.stored_dtype.itemsize
    return 0 if shares else itemsize * _parameters(scenario, index)


def _statistics(scenario: Scenario, shape: LayerShape, moments: Sequence[Moment]) -> int:
    widths = tap_widths(shape, scenario.hidden)
    return FLOAT32 * sum(moment_size(moment, widths) for moment in moments)


def _measuring(scenario: Scenario, shape: LayerShape, moments: Sequence[Moment]) -> int:
    """One micro-batch's activations in float32, for the moment that takes most; a product takes both of its sides."""
    widths, tokens = tap_widths(shape, scenario.hidden), _micro_batch_tokens(scenario)
    squared = tokens if scenario.placement.device == "cuda" else min(ROWS, tokens)

    def copied(moment: Moment) -> int:
        match moment:
            case Cross(tap, other):
                return tokens * (widths[tap] + widths[other])
            case Power(tap):
                return squared * widths[tap]
            case ScalingPower(tap):
                return squared * 3 * widths[tap]
        return tokens * widths[moment.tap]

    return FLOAT32 * max(map(copied, moments), default=0)


def _micro_batch_tokens(scenario: Scenario) -> int:
    calibration = scenario.calibration
    return min(scenario.config.micro_batch, calibration.samples) * calibration.length


def _activations(scenario: Scenario, shape: LayerShape) -> int:
    """Of one micro-batch: what is observed, and what runs at the widest place."""
    hidden = scenario.hidden
    values, heads = shape.query_heads * shape.value_dim, shape.query_heads * shape.query_key_dim
    widest = shape.ffn_width + max(3 * shape.ffn_width, 6 * heads)
    return _micro_batch_tokens(scenario) * scenario.dtype.itemsize * (7 * hidden + values + widest)


def _distill_peak(scenario: Scenario, index: int) -> float:
    """The student in float32, its gradients and AdamW's two moments, its products' copies, and what backward needs.

    Of the dense layers that judge it: what backward needs, in 16 bits, and on a GPU their weights.
    """
    options, lessons, on_gpu = scenario.config.distill, scenario.lessons, scenario.placement.device == "cuda"
    shape, hidden = scenario.shapes[index], scenario.hidden
    temporary = FLOAT32 if on_gpu else 0  # all parameters are stepped at once there
    if options.train == "full":
        parameter = scenario.dtype.itemsize + 4 * FLOAT32 + temporary
    else:  # what doesn't train is the layer's own, and updated once
        parameter = scenario.stored_dtype.itemsize * (2 if on_gpu else 1)
    saved = 3 * shape.ffn_width + 4 * hidden + 2 * shape.query_heads * (shape.query_key_dim + shape.value_dim)
    samples = options.micro_batch(scenario.config.micro_batch) if scenario.is_end_to_end else options.batch
    batch = min(samples, lessons.samples) * lessons.length
    judges = _judges(scenario)
    weights = judges * scenario.dtype.itemsize * _parameters(scenario, index) if on_gpu else 0
    parameters, activations = _pruned_parameters(scenario, index), (1 + judges / 2) * FLOAT32 * batch * saved
    if scenario.is_end_to_end and options.train == "full":
        # The optimizer's moments are there only when activations have gone.
        passing = (scenario.dtype.itemsize + 2 * FLOAT32) * parameters + activations
        return max(passing, (4 * FLOAT32 + temporary) * parameters)
    return parameter * parameters + activations + weights


def _judges(scenario: Scenario) -> int:
    """Dense layers that a layer looks ahead to; fewer for the last ones."""
    return 0 if scenario.is_end_to_end else min(scenario.config.distill.look_ahead, scenario.layers - 1)


# ---------------------------------------------------------------- the host's side


def _host_of_tasks(scenario: Scenario) -> float:
    """The greatest of: a table that is checked, weights with the hidden states that leave or are learnt from, and with
    what is offloaded."""
    largest = max(info.nbytes for info in scenario.checkpoint.tensors.values())
    layer = max(scenario.stored_bytes)
    learnt_from = 0
    if scenario.lessons:
        judges = _judges(scenario)
        learnt_from = (3 if judges else 2) * scenario.hidden_states(scenario.lessons) + judges * layer
        if scenario.is_end_to_end:
            learnt_from = 3 * scenario.step_states
    leaving = scenario.hidden_states(scenario.calibration)
    if scenario.placement.device == "cuda":
        leaving = _page_locked(leaving)
    leaving += _offloaded(scenario) if scenario.offloads else 0
    return max(largest, layer + max(leaving, learnt_from))


def _page_locked(size: int) -> int:
    """What CUDA's allocator of page-locked memory takes for so many bytes: the next power of two."""
    return 1 << (size - 1).bit_length()


def _offloaded(scenario: Scenario) -> float:
    """Statistics, and what a solve takes or a part of the layer that runs again; the greatest layer's."""

    def held(index: int, pruning: bool) -> float:
        observations = scenario.solve(index, pruning=pruning).observations
        again = [_part(scenario, part) + _statistics(scenario, part, some) for part, some in observations]
        statistics = _statistics(scenario, scenario.shape(index), scenario.moments(index, pruning=pruning))
        return statistics + max([_solving(scenario, index, pruning), *again])

    layers = _different_layers(scenario)
    return FRAGMENTATION * max(held(index, pruning) for index in layers for pruning in (False, True))


def _own_samples(scenario: Scenario) -> float:
    """The whole model and its KV cache, where no calibration set is given. On a GPU it spreads over what there is."""
    if scenario.config.calibration is not None or scenario.placement.device == "cuda":
        return 0.0
    dense, rows = scenario.dense, min(OWN_SAMPLES_BATCH, scenario.config.samples)
    cached = 2 * dense.num_key_value_heads * dense.head_dim * scenario.layers * scenario.config.sequence_length
    logits = rows * dense.vocab_size * (FLOAT32 + FLOAT32 + 8)
    weights = (scenario.bytes_before + scenario.outer_bytes) * scenario.dtype.itemsize // scenario.stored_dtype.itemsize
    return weights + rows * cached * scenario.dtype.itemsize + logits


def _driver(scenario: Scenario) -> float:
    """Hidden states on their way through the journal, a shard as it is made of parts, mapped from their files, or what
    layers learn end to end."""
    after = scenario.bytes_after + scenario.outer_bytes
    learnt = scenario.learnt_bytes if scenario.is_end_to_end else 0
    return max(scenario.hidden_states(scenario.calibration), min(after, _largest_shard(scenario)), learnt)


def _largest_shard(scenario: Scenario) -> int:
    return max(scenario.config.max_shard_size, *scenario.pruned_bytes)


def _store_peak(scenario: Scenario) -> int:
    """What the workers' calls hold at once: inputs, outputs that are put once more, and pruned layers."""
    workers, states = scenario.placement.workers, scenario.hidden_states(scenario.calibration)
    layer = max(scenario.pruned_bytes)
    # In the dense pass, the input of every open layer, and what the driver just got.
    open_layers = min(workers, scenario.layers, scenario.pieces)
    relays = min(workers, scenario.blocks)
    pruning = relays * ((3 if scenario.block_length > 1 else 1) * states + layer)
    peak = max(3 * states, (open_layers + 2) * states, pruning)
    if scenario.needs_gradients:
        # The same of gradients, and the hidden states that go with the pieces at work.
        peak = max(peak, (open_layers + 2) * scenario.gradients + states)
    if scenario.is_end_to_end:
        # Both models' hidden states of a step, what was learnt before and is learnt now, and the layers that are open.
        states = (2 * scenario.layers + 1) * scenario.step_states
        peak = max(peak, states + 2 * scenario.learnt_bytes + 2 * workers * layer)
    elif scenario.lessons:
        # Distillation runs so many layers ahead, each with its input and its target.
        ahead = 2 * workers + 2
        peak = max(peak, ahead * scenario.hidden_states(scenario.lessons) + 2 * workers * layer)
    return peak


def _disk(scenario: Scenario) -> int:
    """Every block's input and the pruned layers; or all parts, and the shards that they become; or hidden states of
    every layer and of the model's end, with the gradients of some layers. Profiles lie there to the end."""
    states = scenario.hidden_states(scenario.calibration)
    profiles = sum(
        scenario.method.profile_bytes(scenario.hidden, scenario.shape(index)) for index in range(scenario.layers)
    )
    pruning = scenario.bytes_after + scenario.blocks * states
    assembling = 2 * scenario.bytes_after + 2 * scenario.outer_bytes
    gradients = (scenario.layers + 1) * states + GRADIENTS_KEPT * scenario.gradients if scenario.needs_gradients else 0
    return profiles + max(pruning, assembling, gradients)
