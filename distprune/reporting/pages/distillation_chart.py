"""How the loss of distillation fell."""

from __future__ import annotations

import plotly.graph_objects as go

from distprune.engine.run.record import LayerRecord, RunRecord
from distprune.reporting.pages.colours import by_depth
from distprune.reporting.pages.cost_charts import are_one
from distprune.reporting.pages.rendering import ABOVE, Chart, plain_figure


def distillation_chart(record: RunRecord) -> Chart | None:
    """The training loss over the steps; None where nothing was distilled, or in one step."""
    layers = [layer for layer in record.layers if layer.distillation]
    if not any(len(layer.distillation.training) > 1 for layer in layers):
        return None
    figure = plain_figure(300, showlegend=False)
    figure.update_xaxes(title_text="share of the steps", tickformat=".0%", range=[-0.02, 1.02], zeroline=False)
    if are_one(layers):
        add_whole_model(figure, layers[0])
        sentence = (
            "Divergence of the pruned model's predictions from the dense model's, on the text that is learnt from and "
            "on samples that nothing was trained on. Where these did not improve, the layers stay as they were pruned."
        )
    else:
        add_layers(figure, layers)
        sentence = (
            "Each layer's training loss, relative to that of its first steps: a line for each layer that learnt, from "
            "the first (green) to the last (orange)."
        )
    return Chart("distillation-loss", "Distillation", sentence, figure)


def add_whole_model(figure: go.Figure, layer: LayerRecord) -> None:
    """One loss for all layers, in nats a token."""
    report = layer.distillation
    hover = "%{y:.3g} nats a token<extra></extra>"
    figure.add_scatter(name="training", **steps_of(report.training), mode="lines+markers", hovertemplate=hover)
    figure.add_scatter(
        name="held out, before and after",
        x=[0, 1],
        y=[report.held_out_before, report.held_out_after],
        mode="lines+markers",
        line={"dash": "dash"},
        marker={"size": 9},
        hovertemplate=hover,
    )
    figure.update_layout(showlegend=True, legend=ABOVE)
    figure.update_yaxes(title_text="nats a token")


def add_layers(figure: go.Figure, layers: list[LayerRecord]) -> None:
    """Losses of layers differ by orders of magnitude, so each is measured by its own first one."""
    for layer, colour in zip(layers, by_depth(len(layers)), strict=True):
        losses = layer.distillation.training
        if losses and losses[0] > 0:
            figure.add_scatter(
                **steps_of([loss / losses[0] for loss in losses]),
                mode="lines+markers",
                line={"color": colour, "width": 1.5},
                marker={"size": 4},
                customdata=losses,
                hovertemplate=f"layer {layer.index}: " + "%{customdata:.3g}<extra></extra>",
            )
    figure.update_yaxes(title_text="loss, relative", rangemode="tozero", tickformat=".0%")


def steps_of(losses: list[float]) -> dict[str, list[float]]:
    """Points at the middle of equal stretches of the steps."""
    return {"x": [(place + 0.5) / len(losses) for place in range(len(losses))], "y": losses}
