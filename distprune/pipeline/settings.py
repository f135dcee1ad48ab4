"""What a pipeline is: one validated object from a YAML file, with a section for each step."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from distprune.config import DistillConfig, check_range, load_config, read_yaml, switch
from distprune.errors import InputError

# Options of a pruning run that have a place of their own in a pipeline.
ELSEWHERE = {
    "model": "model",
    "revision": "revision",
    "output": "work",
    "sparsity": "sparsities",
    "calibration": "calibration",
    "samples": "calibration.samples",
    "sequence_length": "calibration.sequence_length",
    "seed": "calibration.seed",
    "distill": "distill",
    "address": "address",
    "trust_remote_code": "trust_remote_code",
    "overwrite": "--restart",
    "restart": "--restart",
    "push_to_hub": "publish.to",
    "hub_ignore": "publish.hub_ignore",
    "private": "publish.private",
}


def listed(value: Any) -> Any:
    """One of something stands for a list of one."""
    return [value] if isinstance(value, str | int | float | Path) else value


def refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message})


def percent(fraction: float) -> str:
    return f"{100 * fraction:g}"


class Section(BaseModel):
    """Options that belong together; an unknown one is refused with the known ones' names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, given: Any) -> Any:
        for name in given if isinstance(given, Mapping) else ():
            if name not in cls.model_fields:
                raise refuse(f"'{name}' is not an option. Options: {', '.join(cls.model_fields)}.")
        return given


class CalibrationConfig(Section):
    """Where a calibration set comes from: a file, texts, or the model itself."""

    file: Path | None = Field(None, description="a calibration set in Arrow, as `distprune calibrate` makes it")
    text: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (), description="text files, or names of datasets; without any, the model writes its own samples"
    )
    field: str | None = Field(None, description="field of a record that holds its text or messages")
    samples: int = Field(128, ge=1, description="windows in all")
    sequence_length: int = Field(128, ge=2, description="tokens of each window")
    seed: int = Field(0, ge=0, description="seed of the choice of windows, or of the model's own samples")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str | Path) else given

    @model_validator(mode="after")
    def _file_or_how(self) -> CalibrationConfig:
        if self.file is not None and self.model_fields_set != {"file"}:
            raise refuse("give either a file, or how to make a calibration set.")
        return self


class DistillSection(Section, DistillConfig):
    """The options of distillation; its calibration set may be made here too."""

    calibration: CalibrationConfig | None = None


class EvaluateConfig(Section):
    """What the dense model and each result are measured on."""

    text: str | None = Field(None, description="text file or dataset to take perplexity on")
    field: str | None = Field(None, description="field of a record that holds its text")
    sequence_length: int = Field(128, ge=2, description="tokens of each window of the text")
    max_tokens: int | None = Field(None, ge=1, description="use the text's first tokens only")
    batch_size: int = Field(16, ge=1, description="windows in one forward pass")
    tasks: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (), description="names or patterns of lm-eval's tasks"
    )
    include_path: Path | None = Field(None, description="folder with definitions of further tasks")
    num_fewshot: int | None = Field(None, ge=0, description="examples in each prompt")
    limit: float | None = Field(None, gt=0, description="use each task's first samples only")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    workers: Annotated[int, Field(ge=1)] | Annotated[str, AfterValidator(check_range)] | None = Field(
        None, description="Ray workers to evaluate on, at most, or 'MIN:MAX'; by default this process"
    )

    @model_validator(mode="after")
    def _something(self) -> EvaluateConfig:
        if self.text is None and not self.tasks:
            raise refuse("give a text, tasks or both.")
        return self


class Bound(Section):
    """What a number of a pruned model has to keep within, as it stands or as a multiple of the dense model's."""

    at_least: float | None = None
    at_most: float | None = None
    at_least_times_dense: float | None = None
    at_most_times_dense: float | None = None

    @model_validator(mode="after")
    def _something(self) -> Bound:
        if not self.model_fields_set:
            raise refuse(f"give at least one of {', '.join(type(self).model_fields)}.")
        return self


class GateConfig(Section):
    """What still ships."""

    perplexity: Bound | None = None
    tasks: dict[str, dict[str, Bound]] = Field(default_factory=dict, description="bounds by task and metric")


class PublishConfig(Section):
    """Where the results go that pass the gate."""

    to: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        min_length=1,
        description="folders, s3://..., gs://..., hf://ORGANIZATION/NAME; {percent} stands for the sparsity",
    )
    which: Literal["smallest", "best", "all"] = Field(
        "smallest", description="of those that pass: the most pruned one, that of the lowest perplexity, or all"
    )
    hub_ignore: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (), description="patterns of files that the hub does not get; a run's log it never gets"
    )
    private: bool = Field(True, description="make repositories on the hub private")
    overwrite: bool = Field(False, description="replace a checkpoint that was published there before")

    @field_validator("to")
    @classmethod
    def _placeholders(cls, destinations: tuple[str, ...]) -> tuple[str, ...]:
        for destination in destinations:
            try:
                names = {name for _, name, _, _ in Formatter().parse(destination) if name is not None}
            except ValueError as error:
                raise refuse(f"'{destination}': {error}. The one placeholder is {{percent}}.") from None
            if names - {"percent"}:
                raise refuse(
                    f"'{destination}' holds {{{min(names - {'percent'})}}}. The one placeholder is {{percent}}."
                )
        return destinations


class PipelineConfig(Section):
    """Every option of a pipeline."""

    model: str = Field(description="local Hugging Face folder, hub id, or .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    work: Path = Field(description="folder of the pipeline's own: state, calibration sets, checkpoints, summary")
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    prune: dict[str, Any] = Field(default_factory=dict, description="options of `distprune prune`")
    sparsities: Annotated[tuple[float, ...], BeforeValidator(listed)] = Field(
        min_length=1, description="fractions to remove, each of which makes a checkpoint"
    )
    distill: Annotated[DistillSection | None, BeforeValidator(switch)] = None
    evaluate: EvaluateConfig
    gate: GateConfig = Field(default_factory=GateConfig)
    publish: PublishConfig | None = None
    address: str | None = Field(None, description="Ray cluster to join; by default RAY_ADDRESS, or a local one")
    trust_remote_code: bool = Field(False, description="run code that comes with the input model")

    @field_validator("prune")
    @classmethod
    def _prune_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if name in ELSEWHERE:
                raise refuse(f"'{name}' is not given here, but by {ELSEWHERE[name]}.")
        try:
            load_config(None, {"model": "any", "output": "any", **options})
        except InputError as error:
            raise refuse(str(error)) from None
        return options

    @field_validator("sparsities")
    @classmethod
    def _different_sparsities(cls, sparsities: tuple[float, ...]) -> tuple[float, ...]:
        names = [percent(sparsity) for sparsity in sparsities]
        for sparsity, name in zip(sparsities, names, strict=True):
            if not 0 < sparsity < 1:
                raise refuse(f"{sparsity:g} is not between 0 and 1.")
            if names.count(name) > 1:
                raise refuse(f"{sparsity:g} is given twice.")
        return sparsities

    @model_validator(mode="after")
    def _fits_together(self) -> PipelineConfig:
        self._check_gate()
        if self.publish:
            self._check_destinations(self.publish)
        return self

    def _check_gate(self) -> None:
        if self.gate.perplexity and self.evaluate.text is None:
            raise refuse("gate.perplexity needs evaluate.text.")
        for task in self.gate.tasks:
            if not any(fnmatch(task, pattern) for pattern in self.evaluate.tasks):
                raise refuse(f"gate.tasks.{task}: '{task}' is not among evaluate.tasks.")

    def _check_destinations(self, publish: PublishConfig) -> None:
        if publish.which == "best" and self.evaluate.text is None:
            raise refuse("publish.which: best is told by perplexity, so it needs evaluate.text.")
        for destination in publish.to:
            if publish.which == "all" and len(self.sparsities) > 1 and "{percent}" not in destination:
                raise refuse(
                    f"publish.to: several results would go to '{destination}'. Write {{percent}} in it, or give "
                    "publish.which smallest or best."
                )
            if publish.to.count(destination) > 1:
                raise refuse(f"publish.to: '{destination}' is given twice.")

    def distill_calibration(self) -> CalibrationConfig | None:
        """Where distillation's own calibration set comes from; what is not said of it is as for the other set."""
        own = self.distill and self.distill.calibration
        if own is None or own.file is not None:
            return own
        like = {name: getattr(self.calibration, name) for name in ("field", "sequence_length", "seed")}
        given = own.model_dump(include=own.model_fields_set)
        return CalibrationConfig.model_validate({**like, **given})


def load_pipeline(file: Path) -> PipelineConfig:
    """The pipeline in a YAML file.

    Raises:
        InputError: the file is missing or no YAML mapping, or an option is unknown, missing or out of range.
    """
    try:
        return PipelineConfig.model_validate(read_yaml(file, "the path"))
    except ValidationError as error:
        raise InputError(f"{file}: {explain(error.errors()[0])}") from None


def explain(problem: Mapping[str, Any]) -> str:
    """What is wrong with which option, in a sentence."""
    option = ".".join(map(str, problem["loc"]))
    match problem["type"]:
        case "refused":
            return f"{option}: {problem['msg']}" if option else problem["msg"]
        case "missing":
            return f"option '{option}' must be given."
    return f"option '{option}' is {problem['input']!r}: {problem['msg']}."
