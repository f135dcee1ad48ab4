"""What pruning was predicted to cost, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from plotly.subplots import make_subplots

from distprune.engine.run.record import LayerRecord, RunRecord
from distprune.reporting.pages.colours import by_depth
from distprune.reporting.pages.rendering import MARGIN, Chart, plain_figure

#: What the page calls the fields that a method's cost curves are about.
FIELDS = {
    "attention.kv_heads": "KV groups",
    "attention.value_dim": "width of a value head",
    "attention.query_key_dim": "width of a query/key head",
    "attention.query_rank": "rank of the query projection",
    "attention.key_rank": "rank of the key projection",
    "attention.output_rank": "rank of the output projection",
    "ffn.count": "experts",
    "ffn.width": "neurons",
    "ffn.shared_width": "neurons of the shared expert",
}
COLUMNS = 3
PANEL_HEIGHT = 250  # pixels


def predicted_chart(record: RunRecord) -> Chart | None:
    """What each layer adds to the loss, as the plan predicts; None where the method predicts nothing."""
    layers = [layer for layer in record.layers if layer.predicted_loss is not None]
    if not layers:
        return None
    figure = plain_figure(260, bargap=0.25)
    figure.add_bar(
        x=[layer.index for layer in layers],
        y=[layer.predicted_loss for layer in layers],
        hovertemplate="layer %{x}: %{y:.3g} nats a token<extra></extra>",
    )
    figure.update_xaxes(title_text="layer", **layer_ticks(layers))
    figure.update_yaxes(title_text="nats a token", rangemode="tozero")
    sentence = "What the plan predicts each layer to add to the loss. Cuts of different layers count as independent."
    return Chart("predicted-cost", "Predicted cost of each layer", sentence, figure)


def measured_chart(record: RunRecord) -> Chart | None:
    """Each layer's error before and after it was distilled; None where layers were not distilled one by one."""
    layers = [layer for layer in record.layers if layer.distillation]
    if not layers or are_one(layers):
        return None
    figure = plain_figure(280, bargap=0.25, legend=ABOVE)
    for name, field in {"after pruning": "held_out_before", "after distillation": "held_out_after"}.items():
        figure.add_bar(
            name=name,
            x=[layer.index for layer in layers],
            y=[getattr(layer.distillation, field) for layer in layers],
            hovertemplate="layer %{x}, " + name + ": %{y:.3g}<extra></extra>",
        )
    figure.update_xaxes(title_text="layer", **layer_ticks(layers))
    figure.update_yaxes(title_text="relative error", rangemode="tozero")
    sentence = (
        "Error of each layer's output against the dense layer's, and of what the dense layers after it make of it, on "
        "samples that nothing was trained on. A layer whose error did not fall stays as it was pruned."
    )
    return Chart("measured-error", "Measured error of each layer", sentence, figure)


def are_one(layers: Sequence[LayerRecord]) -> bool:
    """Whether all layers were distilled together: they share one loss then."""
    return len(layers) > 1 and all(layer.distillation == layers[0].distillation for layer in layers)


ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


def layer_ticks(layers: Sequence[LayerRecord]) -> dict[str, object]:
    return {"dtick": 1 if len(layers) <= 40 else None, "showgrid": False}


def spectra_chart(record: RunRecord) -> Chart | None:
    """The curves that the plan was made from, with the place at which each layer was cut; None where there are none."""
    fields = [field for field in FIELDS if any(field in layer.cost_curves for layer in record.layers)]
    if not fields:
        return None
    rows = ceil(len(fields) / COLUMNS)
    figure = make_subplots(rows=rows, cols=COLUMNS, vertical_spacing=0.36 / rows, horizontal_spacing=0.06)
    figure.update_layout(template="none", height=PANEL_HEIGHT * rows, margin=MARGIN, showlegend=False)
    colours = by_depth(len(record.layers))
    for number, field in enumerate(fields):
        place = {"row": number // COLUMNS + 1, "col": number % COLUMNS + 1}
        coloured = [*zip(record.layers, colours, strict=True)]
        for layer, colour in coloured:
            if field in layer.cost_curves:
                figure.add_scatter(**curve_of(layer, field), line={"color": colour, "width": 1.2}, **place)
        if cuts := [(layer, colour, *cut) for layer, colour in coloured if (cut := cut_of(layer, field))]:
            figure.add_scatter(**markers_of(cuts), **place)
        figure.update_xaxes(title_text=FIELDS[field], title_standoff=4, **place)
        figure.update_yaxes(rangemode="tozero", title_text="nats" if number % COLUMNS == 0 else None, **place)
    sentence = (
        "What it is predicted to cost, in nats a token, to keep only so much of one thing in one layer: a line for "
        "each layer, from the first (green) to the last (orange). Dots are where layers were cut. Of a rank, the slope is "
        "the singular value's square, in the metric of the loss."
    )
    return Chart("spectra", "Spectra and cuts", sentence, figure)


def curve_of(layer: LayerRecord, field: str) -> dict[str, object]:
    curve = layer.cost_curves[field]
    return {
        "x": curve.kept,
        "y": curve.costs,
        "mode": "lines",
        "hovertemplate": f"layer {layer.index}: " + "%{y:.3g} nats with %{x} left<extra></extra>",
    }


def cut_of(layer: LayerRecord, field: str) -> tuple[int, float] | None:
    """How much is left of what a curve is about, and what that is predicted to cost; None where all of it is."""
    part, _, name = field.partition(".")
    dense, pruned = getattr(layer.dense, part), getattr(layer.pruned, part)
    if field not in layer.cost_curves or dense is None:
        return None
    kept = getattr(pruned, name) if pruned else 0
    if kept is None or kept == getattr(dense, name):
        return None
    curve = layer.cost_curves[field]
    return kept, float(np.interp(kept, curve.kept, curve.costs))


def markers_of(cuts: Sequence[tuple[LayerRecord, str, int, float]]) -> dict[str, object]:
    layers, colours, kept, costs = zip(*cuts, strict=True)
    return {
        "x": kept,
        "y": costs,
        "mode": "markers",
        "marker": {"color": colours, "size": 8, "line": {"width": 1, "color": "white"}},
        "text": [f"layer {layer.index}" for layer in layers],
        "hovertemplate": "%{text}: cut to %{x}, %{y:.3g} nats<extra></extra>",
    }
