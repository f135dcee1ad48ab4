"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from distprune.comparison import ComparisonRow
from distprune.engine import RunRecord, RunStatus
from distprune.engine.run.record import REPORT_FILE, LayerRecord
from distprune.layers.shapes import ExpertsShape

GIB = 2**30


def parameter_table(record: RunRecord) -> Table:
    """Parameters before and after: of the decoder layers, and of everything."""
    table = Table(title=f"{record.method}, {record.layout} layout", title_justify="left", box=SIMPLE_HEAD)
    for column in ("parameters", "before", "after", "removed"):
        table.add_column(column, justify="left" if column == "parameters" else "right")
    counts = {
        "decoder layers": (record.decoder_parameters_before, record.decoder_parameters_after),
        "all parameters": (record.total_parameters_before, record.total_parameters_after),
    }
    for name, (before, after) in counts.items():
        table.add_row(name, f"{before:,}", f"{after:,}", f"{1 - after / before:.2%}")
    return table


def layer_table(record: RunRecord) -> Table:
    """One row a layer: what is left of each part, of how much, and the share of its parameters that went."""
    table = Table(
        title="What is left of each layer (of how much)",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for column in ("layer", "Q/K/O rank", "KV groups", "pairs", "value", "FFN", "branch", "removed"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in record.layers:
        table.add_row(*layer_row(layer))
    return at_full_width(table)


def layer_row(layer: LayerRecord) -> tuple[str, ...]:
    return (str(layer.index), *attention_cells(layer), *ffn_cells(layer), f"{removed(layer):.1%}")


def attention_cells(layer: LayerRecord) -> tuple[str, ...]:
    """Ranks, KV groups, rotary pairs and value width; nothing of attention that is not known or was removed."""
    dense, pruned = layer.dense.attention, layer.pruned.attention
    if dense is None or pruned is None:
        return ("-",) * 4
    return (
        "/".join(str(rank or "full") for rank in (pruned.query_rank, pruned.key_rank, pruned.output_rank)),
        f"{pruned.kv_heads}/{dense.kv_heads}",
        f"{pruned.query_key_dim // 2}/{dense.query_key_dim // 2}",
        f"{pruned.value_dim}/{dense.value_dim}",
    )


def ffn_cells(layer: LayerRecord) -> tuple[str, ...]:
    """Width and the rank of the linear branch, of a mixture its experts, their width and what is shared beside them;
    nothing of a network that is not known or was removed."""
    dense, pruned = layer.dense.ffn, layer.pruned.ffn
    if dense is None or pruned is None:
        return ("-",) * 2
    if isinstance(dense, ExpertsShape):
        return f"{mixture_text(pruned)}/{mixture_text(dense)}", "-"
    return f"{pruned.width}/{dense.width}", str(pruned.branch_rank or "-")


def mixture_text(shape: ExpertsShape) -> str:
    """Such as 8x64+32: eight experts of 64 neurons, and 32 that every token passes through."""
    return f"{shape.count}x{shape.width}" + (f"+{shape.shared.width}" if shape.shared else "")


def removed(layer: LayerRecord) -> float:
    """The share of its parameters that went."""
    return 1 - layer.parameters_after / layer.parameters_before


def memory_line(record: RunRecord) -> str:
    """What was computed in, peak memory of driver and workers, and where the time went."""
    workers = ", ".join(
        f"{peak.resident / GIB:.2f} GiB" + (f" (+{peak.device / GIB:.2f} GiB on the GPU)" if peak.device else "")
        for peak in record.peak_memory_workers
    )
    took = {name: f"{seconds:.1f} s" for name, seconds in record.seconds.items()}
    stages = ", ".join(f"{name} {seconds}" for name, seconds in took.items() if seconds != "0.0 s")
    driver = record.peak_memory_driver.resident / GIB
    return (
        f"forward passes in {record.dtype} on {record.device}\n"
        f"peak memory: driver {driver:.2f} GiB, workers {workers}\n"
        f"time: {sum(record.seconds.values()):.1f} s ({stages})"
    )


def place_line(output: Path) -> str:
    """Where the result of a run is, and the first thing to look at there."""
    return f"The checkpoint is in {output}; its report, for a browser, is {output / REPORT_FILE}"


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """One row a model: the sparsity asked and reached, the parameters left, and what it cost."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    first, *others = comparison_columns(rows)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*comparison_row(row)[: len(table.columns)])
    return at_full_width(table)


def at_full_width(table: Table) -> Table:
    """The table, whose lines wrap where the terminal is narrower: unsightly, but no digit is lost."""
    table.width = Console(width=1000).measure(table).maximum
    return table


def comparison_columns(rows: Sequence[ComparisonRow]) -> list[str]:
    """The heads of the columns, in two lines each."""
    counts = ["decoder\nparameters", "all\nparameters"]
    columns = ["\nmethod", "\nasked", "\nreached", *counts, "\nperplexity", "\nseconds"]
    on_gpu = any(row.peak_memory and row.peak_memory.device for row in rows)
    return [*columns, "peak\nGiB", *(["on GPU\nGiB"] if on_gpu else [])]


def comparison_row(row: ComparisonRow) -> tuple[str, ...]:
    peak = row.peak_memory
    return (
        row.method,
        f"{100 * row.sparsity_asked:g}%",
        f"{row.sparsity_reached:.2%}",
        f"{row.decoder_parameters:,}",
        f"{row.total_parameters:,}",
        f"{row.perplexity:.2f}",
        "-" if row.seconds is None else f"{row.seconds:.1f}",
        "-" if peak is None else f"{peak.resident / GIB:.2f}",
        "-" if peak is None else f"{peak.device / GIB:.2f}",
    )


def status_lines(status: RunStatus) -> str:
    """What the run is, whether it is alive, and how many layers each stage has done, in how many seconds."""
    run = status.run
    stages = [
        f"{stage}: {done} of {run.layers} layers, {status.seconds.get(stage, 0.0):.1f} s"
        for stage, done in status.layers_done.items()
    ]
    return "\n".join([f"{run.model}, {run.method} at {run.sparsity:.0%}: {status.state}", *stages])
