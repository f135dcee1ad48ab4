"""A run's plan, from its configuration, a checkpoint's headers and the machines that are to be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from distprune.config import PruneConfig
from distprune.engine.run.record import parameter_counts
from distprune.hardware import AUTO, ComputeDtype, compute_dtype
from distprune.planning import memory as constants
from distprune.planning.cluster import Cluster
from distprune.planning.memory import MemoryPlan, plan_memory
from distprune.planning.model_from_headers import open_headers
from distprune.planning.scenario import Scenario, make_scenario, settled_dtype
from distprune.planning.simulated_run import StagePlan, plan_stages
from distprune.planning.verdict import Verdict, judge


@dataclass(frozen=True)
class RunPlan:
    """Parameters are counts, memory is in bytes, times are in seconds.

    Attributes:
        dtype, dtype_reason: of forward passes, and why it is that one.
        blocks, block_length: runs of layers that are pruned on each other's outputs, and the layers of each.
        bytes_read: from the checkpoint, over all workers and stages; the page cache may serve a part of it.
        bytes_stored: put into the object store, over the run.
        bytes_written: to the output's disk, journal and parts that become shards included.
        assumptions: every rate and constant that the figures rest on.
    """

    model: str
    method: str
    sparsity: float
    device: str
    dtype: str
    dtype_reason: str
    hardware: str
    workers: int
    cluster: Cluster
    layers: int
    blocks: int
    block_length: int
    samples: int
    sequence_length: int
    decoder_parameters_before: int
    decoder_parameters_after: int
    total_parameters_before: int
    total_parameters_after: int
    memory: MemoryPlan
    bytes_read: float
    bytes_stored: float
    bytes_written: float
    stages: list[StagePlan]
    seconds: float
    assumptions: Mapping[str, float]
    verdict: Verdict


def plan_run(
    config: PruneConfig,
    cluster: Cluster,
    *,
    hardware: str | None = None,
    rates: Mapping[str, float] | None = None,
) -> RunPlan:
    """What a run would take. Reads configuration, headers and the calibration sets' sizes alone, and writes nothing.

    Args:
        config: the run; "auto" is the dtype that this machine's CPU computes in at speed, or the checkpoint's on GPUs.
        cluster: what is to be asked for.
        hardware: a key of :data:`distprune.planning.RATES`; by default "h100" where workers have GPUs, else "cpu".
        rates: fields of :class:`distprune.planning.Rates` to replace.

    Raises:
        InputError: the input is unusable; names it and the mend.
    """
    on_gpu = config.device == "cuda" or (config.device == "auto" and cluster.gpus)
    checkpoint = open_headers(config.model, config.revision, config.trust_remote_code)
    dtype = planned_dtype(config, settled_dtype(checkpoint), bool(on_gpu))
    settled = config.model_copy(update={"dtype": dtype.name})
    scenario = make_scenario(settled, checkpoint, cluster, hardware or ("h100" if on_gpu else "cpu"), rates or {})
    memory, stages = plan_memory(scenario), plan_stages(scenario)
    return RunPlan(
        model=config.model,
        method=config.method,
        sparsity=config.sparsity,
        device=scenario.placement.device,
        dtype=dtype.name,
        dtype_reason=dtype.reason,
        hardware=scenario.hardware,
        workers=scenario.placement.workers,
        cluster=cluster,
        layers=scenario.layers,
        blocks=scenario.blocks,
        block_length=scenario.block_length,
        samples=scenario.calibration.samples,
        sequence_length=scenario.calibration.length,
        **parameter_counts(scenario.architecture, list(scenario.shapes)),
        memory=memory,
        bytes_read=sum(stage.bytes_read for stage in stages),
        bytes_stored=sum(stage.bytes_stored for stage in stages),
        bytes_written=sum(stage.bytes_written for stage in stages),
        stages=stages,
        seconds=sum(stage.seconds for stage in stages),
        assumptions=_assumptions(scenario),
        verdict=judge(scenario, memory),
    )


def planned_dtype(config: PruneConfig, stored: torch.dtype, on_gpu: bool) -> ComputeDtype:
    """The dtype of forward passes, on GPUs from Ampere on or on CPUs like this machine's."""
    if config.dtype != AUTO:
        return ComputeDtype(getattr(torch, config.dtype), "as --dtype asks")
    if on_gpu and stored.itemsize == 2:
        return ComputeDtype(stored, "the checkpoint's own dtype, for which GPUs before Ampere would have no units")
    return compute_dtype(stored, "cpu")


def _assumptions(scenario: Scenario) -> dict[str, float]:
    """The worker's rates by their names, those of offloaded solves among them, and the constants of memory and of
    solves."""
    on_gpu = scenario.on_gpu
    base = constants.BASE_RESIDENT_CUDA if on_gpu else constants.BASE_RESIDENT
    context = {"cuda_context": constants.CUDA_CONTEXT} if on_gpu else {}
    rates = asdict(scenario.rates)
    if scenario.on_gpu and scenario.config.offload:
        host = scenario.clock.host
        rates |= {f"offloaded_{name}": getattr(host, name) for name in ("float32", "float64", "eigen", "memory")}
    return {
        **rates,
        "worker_base_resident": base,
        "driver_base_resident": constants.BASE_RESIDENT,
        **context,
        "fragmentation": constants.FRAGMENTATION,
    }
