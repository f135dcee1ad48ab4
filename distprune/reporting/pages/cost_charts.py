"""What pruning was predicted to cost, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence

from distprune.engine.run.record import LayerRecord, RunRecord
from distprune.reporting.pages.rendering import ABOVE, Chart, plain_figure


def predicted_chart(record: RunRecord) -> Chart | None:
    """What each layer adds to the loss, as the plan predicts; None where the method predicts none."""
    layers = [layer for layer in record.layers if layer.predicted_loss is not None]
    if not any(layer.predicted_loss for layer in layers):
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


def layer_ticks(layers: Sequence[LayerRecord]) -> dict[str, object]:
    return {"dtick": 1 if len(layers) <= 40 else None, "showgrid": False}
