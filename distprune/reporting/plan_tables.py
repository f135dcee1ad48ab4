"""A run's plan for the terminal: what it is, what it takes, how long, and whether it fits."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from distprune.planning import RunPlan

GIB = 2**30
BYTES = {"worker_base_resident", "driver_base_resident", "cuda_context"}
SECONDS = {"launch", "call_seconds", "start_seconds"}
BYTES_A_SECOND = {"memory", "offloaded_memory", "link", "locked", "store", "network", "read", "write"}
PURE_NUMBERS = {"fragmentation"}


def plan_summary(plan: RunPlan) -> str:
    """Layers and blocks, workers, calibration tokens and parameters."""
    blocks = "1 block" if plan.blocks == 1 else f"{plan.blocks} blocks"
    cluster = plan.cluster
    machines = f"{cluster.gpus} GPUs on " if plan.device == "cuda" else ""
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    workers = "1 worker" if plan.workers == 1 else f"{plan.workers} workers"
    return "\n".join(
        [
            f"{plan.model}: {plan.method} at sparsity {plan.sparsity:g}",
            f"{plan.layers} layers in {blocks} of {plan.block_length}; {workers}, {machines}{nodes}",
            f"forward passes in {plan.dtype}: {plan.dtype_reason}",
            f"calibration: {plan.samples} samples of {plan.sequence_length} tokens",
            f"decoder parameters: {plan.decoder_parameters_before:,} to {plan.decoder_parameters_after:,}",
            f"all parameters: {plan.total_parameters_before:,} to {plan.total_parameters_after:,}",
        ]
    )


def memory_table(plan: RunPlan) -> Table:
    """Peak memory by process, and the bytes that move over the whole run."""
    memory = plan.memory
    table = _table("what it takes", "GiB")
    rows = {
        "worker, GPU": memory.worker_device,
        "fullest GPU, with CUDA's share": memory.gpu,
        "worker, host": memory.worker_resident,
        "driver, host": memory.driver_resident,
        "object store, at most": memory.store,
        "driver's node, all together": memory.node_host,
        "work folder on disk, at most": memory.disk,
        "read from the checkpoint": plan.bytes_read,
        "through the object store": plan.bytes_stored,
        "written": plan.bytes_written,
    }
    for name, size in rows.items():
        if size or "GPU" not in name:
            table.add_row(name, f"{size / GIB:,.2f}")
    return table


def stage_table(plan: RunPlan) -> Table:
    """Every stage's floating-point operations, by the numbers that they are on, and its time."""
    table = _table("stage", "16-bit\nTFLOP", "float32\nTFLOP", "float64\nTFLOP", "time")
    kinds = ("half_flops", "float32_flops", "float64_flops")
    for stage in plan.stages:
        flops = (getattr(stage, kind) for kind in kinds)
        table.add_row(
            stage.name, *(f"{count / 1e12:,.2f}" if count else "-" for count in flops), duration(stage.seconds)
        )
    totals = (sum(getattr(stage, kind) for stage in plan.stages) for kind in kinds)
    table.add_row("in all", *(f"{count / 1e12:,.2f}" for count in totals), duration(plan.seconds))
    return table


def assumptions_line(plan: RunPlan) -> str:
    """The rates and constants that the figures rest on, under the names that --rate takes."""
    figures = ", ".join(f"{name} {_figure(name, value)}" for name, value in plan.assumptions.items())
    return f"assumed of each worker ({plan.hardware}): {figures}"


def verdict_line(plan: RunPlan) -> str:
    """What would not fit first and how to fix it, or that all fits that the cluster's description lets one check."""
    verdict = plan.verdict
    if not verdict.fits:
        return f"does not fit: {verdict.problem}. {verdict.mend}"
    return "fits" if plan.cluster.host_memory else "fits; host memory was not checked: give --host-memory"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _figure(name: str, value: float) -> str:
    if name in BYTES:
        return f"{value / GIB:.2f} GiB"
    if name in SECONDS:
        return f"{value:g} s"
    if name in PURE_NUMBERS:
        return f"{value:g}"
    return f"{value / 1e9:,g} GB/s" if name in BYTES_A_SECOND else f"{value / 1e12:g} TFLOP/s"
