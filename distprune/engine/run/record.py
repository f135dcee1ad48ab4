"""What a run leaves beside its result: the effective configuration and the record of what was done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distprune.budgets import decoder_parameters, layer_parameters, outer_parameters, parameters_by_part
from distprune.calibration import Calibration
from distprune.config import PruneConfig
from distprune.distillation.layerwise import DistillationReport
from distprune.engine.telemetry.process_memory import PeakMemory
from distprune.engine.worker.report import Report
from distprune.errors import InputError
from distprune.latency import LatencyPrediction
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import LayerShape
from distprune.methods import CostCurve, Plan

RECORD_FILE = "distprune_run.json"
CONFIG_FILE = "distprune_config.yaml"
REPORT_FILE = "report.html"
CALIBRATION_FILE = "calibration.arrow"
LOG_FILE = "distprune_log.jsonl"
#: Stays where the run was: it names nodes and paths, and nothing that opens or describes the model needs it.
NOT_FOR_THE_HUB = (LOG_FILE,)
OWN_FILES = (RECORD_FILE, CONFIG_FILE, CALIBRATION_FILE, LOG_FILE, REPORT_FILE)


#: Draws the report of a run, whose result lies in a folder, into that folder.
DrawReport = Callable[[Path], object]


@dataclass(frozen=True)
class LayerRecord:
    """One layer: its shape before and after, its parameters, the seconds each step took, and how it went.

    Attributes:
        expert_tokens: how many calibration tokens each of its experts has seen in the dense model.
        parts: parameters before and after, by the part that :func:`distprune.budgets.parameters_by_part` names.
        predicted_loss: what the plan says that the layer adds to the loss, in nats a token; None of most methods.
        cost_curves: see :meth:`distprune.methods.Method.cost_curves`.
    """

    index: int
    dense: LayerShape
    pruned: LayerShape
    parameters_before: int
    parameters_after: int
    seconds: Mapping[str, float]
    warnings: list[str]
    distillation: DistillationReport | None
    expert_tokens: list[int] | None = None
    parts: Mapping[str, list[int]] = field(default_factory=dict)
    predicted_loss: float | None = None
    cost_curves: Mapping[str, CostCurve] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationRecord:
    """The windows of tokens that a run was calibrated on, and the texts that they are of; none of own samples."""

    samples: int
    sequence_length: int
    sources: list[str]

    @classmethod
    def of(cls, calibration: Calibration) -> CalibrationRecord:
        samples, sequence_length = calibration.tokens.shape
        return cls(samples, sequence_length, [*calibration.metadata.sources])


@dataclass(frozen=True)
class RunRecord:
    """Parameters are counts, memory is in bytes, times are in seconds.

    Attributes:
        dtype: that of forward passes.
        predicted_loss, gap: what the plan says of itself, see :class:`distprune.methods.Plan`; None of most methods.
        notes: what the run says of itself: where it took the model for something else than its configuration says.
        left_alone: parameters of what distprune doesn't know, which no pruning changes, by what they belong to.
        left_alone_share: the fraction of all stored parameters that these are.
        commit: of a model on the hub.
        calibration: what the run was calibrated on.
        version: of distprune.
        bytes_before, bytes_after: of all tensors on disk; None where an earlier version has made the record.
        latency: what the plan makes of the measured latencies; None of other targets.
        zeroed: the fraction of the weights of attention and feed-forward networks that the method has set to zero; None
            of methods that remove parameters.
    """

    model: str
    method: str
    options: Mapping[str, object]
    layout: str
    sparsity_asked: float
    predicted_loss: float | None
    gap: float | None
    decoder_parameters_before: int
    decoder_parameters_after: int
    total_parameters_before: int
    total_parameters_after: int
    fingerprint: str
    workers: int
    device: str
    dtype: str
    peak_memory_driver: PeakMemory
    peak_memory_workers: list[PeakMemory]
    seconds: Mapping[str, float]
    layers: list[LayerRecord] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    left_alone: Mapping[str, int] = field(default_factory=dict)
    left_alone_share: float = 0.0
    commit: str | None = None
    calibration: CalibrationRecord | None = None
    version: str | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    latency: LatencyPrediction | None = None
    zeroed: float | None = None

    def sparsity_reached(self, count_embeddings: bool) -> float:
        """What became of the sparsity asked for: the fraction removed, or zeroed.

        Args:
            count_embeddings: whether that of all parameters was asked for, and not that of the decoder layers.
        """
        if self.zeroed is not None:
            return self.zeroed
        return self.total_sparsity if count_embeddings else self.decoder_sparsity

    @property
    def decoder_sparsity(self) -> float:
        """The fraction of the decoder layers' parameters that was removed."""
        return 1 - self.decoder_parameters_after / self.decoder_parameters_before

    @property
    def total_sparsity(self) -> float:
        """The fraction of all parameters that was removed."""
        return 1 - self.total_parameters_after / self.total_parameters_before

    def save(self, folder: Path, config: PruneConfig) -> None:
        (folder / RECORD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")
        (folder / CONFIG_FILE).write_text(config.to_yaml())


def forecast(predicted_loss: float, gap: float) -> str:
    """What a plan says of itself, for people."""
    return (
        f"The plan is predicted to raise the loss by {predicted_loss:.4g} nats a token "
        f"(optimality gap of the allocation: {gap:.1g})"
    )


def layer_records(
    model: Architecture,
    plan: Plan,
    reports: list[Report],
    distillations: list[DistillationReport | None],
    expert_tokens: list[list[int] | None],
    cost_curves: list[Mapping[str, CostCurve]],
) -> list[LayerRecord]:
    return [
        LayerRecord(
            index=index,
            dense=model.dense_shape(index),
            pruned=shape,
            parameters_before=layer_parameters(model, index, model.dense_shape(index)),
            parameters_after=layer_parameters(model, index, shape),
            seconds=reports[index].seconds,
            warnings=reports[index].warnings,
            distillation=distillations[index],
            expert_tokens=expert_tokens[index],
            parts=parts_before_and_after(model, index, shape),
            predicted_loss=None if plan.by_layer is None else plan.by_layer[index],
            cost_curves=cost_curves[index],
        )
        for index, shape in enumerate(plan)
    ]


def parts_before_and_after(model: Architecture, index: int, shape: LayerShape) -> dict[str, list[int]]:
    """Parameters of each part of a layer, dense and in that shape."""
    before = parameters_by_part(model, index, model.dense_shape(index))
    after = parameters_by_part(model, index, shape)
    return {part: [before[part], after.get(part, 0)] for part in before}


def parameter_counts(model: Architecture, plan: list[LayerShape]) -> dict[str, int]:
    """The four counts of :class:`RunRecord`."""
    before = decoder_parameters(model, model.dense_shapes)
    after, outer = decoder_parameters(model, plan), outer_parameters(model)
    return {
        "decoder_parameters_before": before,
        "decoder_parameters_after": after,
        "total_parameters_before": before + outer,
        "total_parameters_after": after + outer,
    }


def load_record(folder: Path) -> RunRecord:
    """Read back the record of a finished run.

    Raises:
        InputError: the folder holds none.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        raise InputError(f"{file}: not found. Give the output folder of a distprune prune run.")
    try:
        stored = json.loads(file.read_text())
        layers = [read_layer(layer) for layer in stored.pop("layers")]
        driver = PeakMemory(**stored.pop("peak_memory_driver"))
        workers = [PeakMemory(**peak) for peak in stored.pop("peak_memory_workers")]
        calibration, latency = stored.pop("calibration", None), stored.pop("latency", None)
        stored.setdefault("dtype", "not recorded")  # as it was before dtypes were settled
        return RunRecord(
            **stored,
            layers=layers,
            peak_memory_driver=driver,
            peak_memory_workers=workers,
            calibration=calibration and CalibrationRecord(**calibration),
            latency=latency and LatencyPrediction.from_json(latency),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: is not a run's record ({error}). Prune the model again.") from None


def read_layer(stored: Mapping[str, Any]) -> LayerRecord:
    distillation = stored["distillation"]
    return LayerRecord(
        **{
            **stored,
            "dense": LayerShape.from_json(stored["dense"]),
            "pruned": LayerShape.from_json(stored["pruned"]),
            "distillation": distillation and DistillationReport(**distillation),
            "cost_curves": {name: CostCurve(**curve) for name, curve in stored.get("cost_curves", {}).items()},
        }
    )
