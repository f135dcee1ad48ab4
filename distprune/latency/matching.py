"""Whether a latency table is of the model that is to be pruned."""

from __future__ import annotations

from distprune.config import PruneConfig
from distprune.errors import InputError
from distprune.latency.latency_table import AGAIN, LatencyTable
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import ExpertsShape

OPTION = "--latency-table"


def latency_table_for(config: PruneConfig, model: Architecture) -> LatencyTable | None:
    """The table that a run plans with; None where its target is another one.

    Raises:
        InputError: there is a table and no such target, or the other way round; or the table is unreadable or of
            another model.
    """
    if config.target != "latency":
        if config.latency_table is None:
            return None
        raise InputError(
            f"{OPTION} {config.latency_table}: belongs to --target latency, and the target is {config.target}. Give "
            "both, or neither."
        )
    refuse_mixtures(model, "--target latency")
    if config.latency_table is None:
        raise InputError(
            f"--target latency: needs {OPTION}. Make the table on the device that will serve the model, with "
            "`distprune measure-latency`."
        )
    if config.count_embeddings:
        raise InputError(
            "--count-embeddings: a latency table says nothing of what lies outside the decoder layers. Leave it out."
        )
    table = LatencyTable.read(config.latency_table)
    if difference := difference_of(table, model):
        raise InputError(f"{config.latency_table}: was measured for another model: {difference}. {AGAIN}.")
    return table


def refuse_mixtures(model: Architecture, option: str) -> None:
    """See that no layer has a mixture of experts.

    Raises:
        InputError: one has.
    """
    if any(isinstance(shape.ffn, ExpertsShape) for shape in model.dense_shapes):
        raise InputError(
            f"{option}: the latency of mixtures of experts, as of this {model.config.model_type} model, can't be "
            "measured yet. Choose --target active-parameters or flops."
        )


def difference_of(table: LatencyTable, model: Architecture) -> str | None:
    """In what a model differs from the one that was measured, for people; None where it does not."""
    compared = {
        "model_type": (table.model_type, model.config.model_type),
        "hidden size": (table.hidden_size, model.hidden_size),
        "layers": (len(table.layers), model.num_layers),
    }
    for name, (measured, given) in compared.items():
        if measured != given:
            return f"its {name} is {measured}, and that of the model to prune is {given}"
    for index in range(model.num_layers):
        measured, given = table.kind(index).shape, model.dense_shape(index).to_json()
        if measured != given:
            return f"its layer {index} has the shape {measured}, and that of the model to prune has {given}"
    return None
