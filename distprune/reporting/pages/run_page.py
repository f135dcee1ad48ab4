"""The report of one run: its record, log and configuration as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from distprune.engine import RunRecord
from distprune.engine.run.record import LayerRecord
from distprune.evaluation import ModelEvaluation
from distprune.reporting.latency_tables import milliseconds
from distprune.reporting.pages.cost_charts import are_one, measured_chart, predicted_chart
from distprune.reporting.pages.distillation_chart import distillation_chart
from distprune.reporting.pages.evaluation_charts import evaluation_charts, evaluation_tables
from distprune.reporting.pages.expert_tokens_chart import expert_tokens_chart
from distprune.reporting.pages.removal_charts import parameters_chart, units_chart
from distprune.reporting.pages.rendering import Chart, Figure, HtmlTable, Section, render
from distprune.reporting.pages.spectra_chart import spectra_chart
from distprune.reporting.pages.timeline import timeline_of
from distprune.reporting.pages.timeline_chart import timeline_chart
from distprune.reporting.pages.wording import duration, percent, short_bytes, short_count, three_digits
from distprune.reporting.run_tables import attention_cells, ffn_cells, removed
from distprune.storage import SCHEME

GIB = 2**30


@dataclass(frozen=True)
class RunMaterial:
    """What a report is made of.

    Attributes:
        record: what was done.
        settings: the effective configuration, as YAML.
        events: the run's log.
        evaluations: of the dense and the pruned model, the dense one first; may be of more.
    """

    record: RunRecord
    settings: str = ""
    events: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[ModelEvaluation] = ()


def run_page(material: RunMaterial) -> str:
    """The HTML of the report."""
    record = material.record
    return render(
        "run.html.jinja",
        title=f"{name_of(record.model)}, {record.method} at {100 * record.sparsity_asked:g}%",
        subtitle=subtitle(record),
        figures=[*figures(record, asked_for(record, material.settings)), *quality_figures(material.evaluations)],
        notes=record.notes,
        sections=[section for section in sections(material) if section.charts or section.tables],
        settings=material.settings,
        fingerprint=record.fingerprint,
    )


def name_of(model: str) -> str:
    """The last part of a path or URL; a hub id as it is."""
    return PurePosixPath(model).name if model.startswith((".", "/")) or SCHEME in model else model


def subtitle(record: RunRecord) -> str:
    workers = "one worker" if record.workers == 1 else f"{record.workers} workers"
    return f"{record.layout} layout; forward passes in {record.dtype} on {record.device}, by {workers}"


# ---------------------------------------------------------------- headline figures


def asked_for(record: RunRecord, settings: str) -> str:
    """What was asked for, and of what where that is not the decoder layers' parameters."""
    given = yaml.safe_load(settings) or {}
    resource = given.get("target", "parameters").replace("-", " ")
    whole = " of the whole model" if given.get("count_embeddings") else ""
    of = f" of the {resource}" if whole or resource != "parameters" else ""
    return f"{100 * record.sparsity_asked:g}%{of}{whole}"


def figures(record: RunRecord, asked: str) -> Iterator[Figure]:
    """What the run is remembered by; ``asked`` says what it was asked for."""
    yield Figure(
        "sparsity",
        "parameters removed",
        percent(record.decoder_sparsity),
        record.decoder_sparsity,
        f"of the decoder layers; asked: {asked}",
    )
    if record.zeroed is not None:
        below = "of attention and feed-forward networks; none removed"
        yield Figure("zeroed", "weights set to zero", percent(record.zeroed), record.zeroed, below)
    for name, title, before, after in (
        ("decoder-parameters", "decoder parameters", record.decoder_parameters_before, record.decoder_parameters_after),
        ("total-parameters", "all parameters", record.total_parameters_before, record.total_parameters_after),
    ):
        yield Figure(name, title, short_count(after), after, f"of {short_count(before)}")
    if record.bytes_before and record.bytes_after is not None:
        below = f"of {short_bytes(record.bytes_before)}"
        yield Figure("bytes", "weights on disk", short_bytes(record.bytes_after), record.bytes_after, below)
    seconds = sum(record.seconds.values())
    slowest = max(record.seconds, key=lambda stage: record.seconds[stage], default=None)
    below = f"most of it: {slowest}, {duration(record.seconds[slowest])}" if slowest else ""
    yield Figure("seconds", "time", duration(seconds), seconds, below)
    if record.predicted_loss is not None:
        below = "nats a token, by the method's own plan"
        value = record.predicted_loss
        yield Figure("predicted-loss", "loss predicted to rise by", three_digits(value), value, below)
    for place, workload in enumerate(record.latency.workloads if record.latency else ()):
        dense, planned = workload.milliseconds_per_token
        below = f"predicted for the decoder layers; dense: {milliseconds(dense)}"
        yield Figure(f"latency-{place}", str(workload), milliseconds(planned), planned, below)


def quality_figures(evaluations: Sequence[ModelEvaluation]) -> Iterator[Figure]:
    """The last model's perplexity beside the first one's."""
    if len(evaluations) > 1 and all(evaluation.perplexity for evaluation in evaluations):
        first, last = evaluations[0].perplexity.perplexity, evaluations[-1].perplexity.perplexity
        yield Figure("perplexity", "perplexity", f"{last:.2f}", last, f"dense: {first:.2f}")


# ---------------------------------------------------------------- sections


def sections(material: RunMaterial) -> Iterator[Section]:
    """In the order in which people ask; those without charts and tables are left out."""
    record = material.record
    yield Section(
        "quality",
        "Quality, speed and size",
        [*evaluation_charts(material.evaluations)] if material.evaluations else [],
        [*evaluation_tables(material.evaluations)] if material.evaluations else [],
    )
    removal = [parameters_chart(record), units_chart(record), expert_tokens_chart(record)]
    table = HtmlTable(LAYER_COLUMNS, [layer_row(layer, record) for layer in record.layers])
    yield Section("removed", "What was removed", drawn(removal), [], table, "All layers in numbers")
    cost = [predicted_chart(record), measured_chart(record), spectra_chart(record), distillation_chart(record)]
    yield Section("cost", "What it cost the model", drawn(cost))
    time = [timeline_chart(timeline_of(material.events))]
    yield Section("time", "Where the time went", drawn(time), [stage_table(record), memory_table(record)])


def drawn(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart]


LAYER_COLUMNS = [
    "layer",
    "parameters before",
    "after",
    "removed",
    "Q/K/O rank",
    "KV groups",
    "pairs",
    "value",
    "FFN",
    "branch",
    "predicted cost",
    "error",
    "distilled",
    "seconds",
]


def layer_row(layer: LayerRecord, record: RunRecord) -> tuple[str, ...]:
    return (
        str(layer.index),
        f"{layer.parameters_before:,}",
        f"{layer.parameters_after:,}",
        percent(removed(layer)),
        *attention_cells(layer),
        *ffn_cells(layer),
        "-" if layer.predicted_loss is None else three_digits(layer.predicted_loss),
        *distillation_cells(layer, record),
        three_digits(sum(layer.seconds.values())),
    )


def distillation_cells(layer: LayerRecord, record: RunRecord) -> tuple[str, str]:
    """The layer's own error before and after distillation, if it was distilled by itself."""
    report = layer.distillation
    if report is None or are_one(record.layers):
        return "-", "-"
    return three_digits(report.held_out_before), three_digits(report.held_out_after)


def stage_table(record: RunRecord) -> HtmlTable:
    """How long each stage took."""
    whole = sum(record.seconds.values())
    rows = [(stage, duration(seconds), percent(seconds / whole)) for stage, seconds in record.seconds.items() if whole]
    return HtmlTable(["stage", "time", "of all"], rows)


def memory_table(record: RunRecord) -> HtmlTable:
    """Peak memory of the driver and of the most loaded worker."""
    rows = [("driver", gib(record.peak_memory_driver.resident), gib(record.peak_memory_driver.device))]
    if peaks := record.peak_memory_workers:
        rows.append(
            (
                f"largest of {len(peaks)} workers",
                gib(max(peak.resident for peak in peaks)),
                gib(max(peak.device for peak in peaks)),
            )
        )
    return HtmlTable(["peak memory", "host", "GPU"], rows)


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size else "-"
