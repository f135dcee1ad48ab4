"""The first thing that would not fit, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from distprune.planning.memory import GIB, USABLE_SHARE, MemoryPlan, plan_memory
from distprune.planning.scenario import Scenario


@dataclass(frozen=True)
class Verdict:
    """``problem`` and ``mend`` are None where it fits, or where nothing is known to be too small."""

    fits: bool
    problem: str | None
    mend: str | None


def judge(scenario: Scenario, memory: MemoryPlan) -> Verdict:
    problem = _gpu_problem(scenario, memory) or _host_problem(scenario, memory)
    return Verdict(problem is None, problem, problem and _mend(scenario, memory))


def _gpu_problem(scenario: Scenario, memory: MemoryPlan) -> str | None:
    if memory.gpu <= scenario.cluster.gpu_memory:
        return None
    sharing = scenario.placement.workers_per_gpu
    workers = "a worker" if sharing == 1 else f"{sharing} workers"
    return f"{workers} would need {_gib(memory.gpu)} of a GPU's {_gib(scenario.cluster.gpu_memory)}"


def _host_problem(scenario: Scenario, memory: MemoryPlan) -> str | None:
    host = scenario.cluster.host_memory
    if host is None or memory.node_host <= USABLE_SHARE * host:
        return None
    count = scenario.placement.workers_per_node
    workers = "1 worker" if count == 1 else f"{count} workers"
    return (
        f"the driver's node with {workers} would need {_gib(memory.node_host)} of its {_gib(host)}, "
        f"of which Ray lets {USABLE_SHARE:.0%} be used"
    )


def fits(scenario: Scenario) -> bool:
    memory = plan_memory(scenario)
    return not (_gpu_problem(scenario, memory) or _host_problem(scenario, memory))


def _mend(scenario: Scenario, memory: MemoryPlan) -> str:
    """The smallest change of one option that makes it fit, or larger machines."""
    for option, changed in _changes(scenario):
        if fits(changed):
            return f"Give {option}."
    if memory.gpu > scenario.cluster.gpu_memory:
        return f"Ask for GPUs of {_gib(memory.gpu)} or more, or give another --method."
    return f"Ask for nodes of {_gib(memory.node_host / USABLE_SHARE)} of memory or more."


def _changes(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    config, placement = scenario.config, scenario.placement
    if placement.workers_per_gpu > 1:
        for workers in range(placement.workers_per_gpu - 1, 0, -1):
            yield f"--gpus-per-worker {1 / workers:.3g}", _with(scenario, gpus_per_worker=1 / workers)
    yield from _smaller_batches(scenario)
    yield from _fewer_workers(scenario)
    if config.calibration is None:
        # The size stays as it is; what goes is the step that loads the whole model.
        yield (
            "--calibration, a set made elsewhere: the model's own samples need the whole model",
            _with(scenario, calibration=Path("calibration.arrow")),
        )
        yield (
            "--calibration, a set made elsewhere, and --workers 1 --micro-batch 1",
            _with(scenario, calibration=Path("calibration.arrow"), workers=1, micro_batch=1),
        )
    if placement.device == "cuda" and not config.offload:
        offloaded = _with(scenario, offload=True)
        yield "--offload", offloaded
        for option, changed in (*_smaller_batches(offloaded), *_fewer_workers(offloaded)):
            yield f"--offload {option}", changed
    if placement.device == "cuda":
        on_cpu = replace(_with(scenario, device="cpu"), cluster=replace(scenario.cluster, gpus=0))
        yield "--device cpu", on_cpu


def _smaller_batches(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    batch = min(scenario.config.micro_batch, scenario.calibration.samples)
    if not fits(_with(scenario, micro_batch=1)):
        return
    while (batch := batch // 2) >= 1:
        yield f"--micro-batch {batch}", _with(scenario, micro_batch=batch)


def _fewer_workers(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    for workers in range(scenario.placement.workers - 1, 0, -1):
        yield f"--workers {workers}", _with(scenario, workers=workers)


def _with(scenario: Scenario, **options: object) -> Scenario:
    return replace(scenario, config=scenario.config.model_copy(update=options))


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
