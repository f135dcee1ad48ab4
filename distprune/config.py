"""What a run is: one validated object from the command line, YAML or Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distprune.errors import InputError
from distprune.storage import HUB_SCHEME, Location

# What decides where and how fast a run goes, and never what it makes.
PLACEMENT = (
    *("output", "overwrite", "restart", "workers", "gpus_per_worker", "address", "weights", "writes"),
    *("push_to_hub", "hub_ignore", "private", "library"),
)

#: How a worker comes by the weights; see :mod:`distprune.engine.worker.weights`.
Way = Literal["auto", "shared", "served", "hub"]


#: In how many parts the samples of a step go through the model, at least.
PARTS = 4
#: Other defaults of the objective "logits": a model that is trained whole forgets what the text is not about.
END_TO_END = {"train": "lora", "rank": 8, "learning_rate": 1e-3, "batch": 16}


def part_of_step(batch: int, most: int) -> int:
    """Samples in one forward pass of a step that goes through the whole model: a step's go from layer to layer in
    parts, so that several workers have something to do."""
    return min(most, -(-batch // PARTS))


class DistillConfig(BaseModel):
    """Every option of distillation, layer-wise or end to end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Literal["layers", "logits"] = Field(
        default="layers",
        description="each layer alone learns its dense outputs, or all together the dense model's predictions",
    )
    calibration: Location | None = Field(
        default=None, description="calibration set to learn from; by default the pruning's own"
    )
    epochs: int = Field(default=1, ge=1, description="how often each sample is learnt from")
    learning_rate: float = Field(
        default=5e-4,
        gt=0,
        description="peak, of AdamW with warmup and cosine decay; layer-wise, lower for layers that have lost little",
    )
    train: Literal["full", "lora"] = Field(
        default="full", description="all weights, or low-rank updates folded in at the end"
    )
    rank: int = Field(default=16, ge=1, description="rank of the low-rank updates")
    train_routers: bool = Field(default=False, description="the routers of mixtures of experts train too")
    look_ahead: int = Field(default=1, ge=0, description="dense layers after it that also judge a layer's output")
    batch: int = Field(default=8, ge=1, description="samples a step")
    held_out: float = Field(default=1 / 16, gt=0, lt=1, description="share of the samples that decides what is kept")
    seed: int = Field(default=0, ge=0, description="seed of the samples' order and of the low-rank updates")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_objective(cls, options: Any) -> Any:
        is_end_to_end = isinstance(options, Mapping) and options.get("objective") == "logits"
        return {**END_TO_END, **options} if is_end_to_end else options

    def micro_batch(self, most: int) -> int:
        """Samples in one forward pass of end-to-end distillation."""
        return part_of_step(self.batch, most)

    def end_of_look_ahead(self, index: int, layers: int) -> int:
        """The first layer whose dense form no longer judges the output of layer ``index``."""
        return min(index + 1 + self.look_ahead, layers)


class SearchConfig(BaseModel):
    """Every option of the search, which refines a plan by measuring it on windows that nothing else sees."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=2, ge=1, description="how often all parts are measured and the plan is made anew")
    seconds: float | None = Field(
        default=None, gt=0, description="no step begins after so long; what is found then depends on the machine"
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="windows of the calibration set that are held out to measure on; by default a quarter, 32 at most",
    )
    calibration: Location | None = Field(
        default=None, description="calibration set to measure on, in place of held-out windows"
    )


def switch(value: Any) -> Any:
    """``true`` stands for all defaults, ``false`` for nothing."""
    return ({} if value else None) if isinstance(value, bool) else value


def current_name(layout: Any) -> Any:
    """``per-layer`` is what ``free`` was called."""
    return "free" if layout == "per-layer" else layout


def check_range(text: str) -> str:
    """``MIN:MAX``, two whole numbers from 1."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise ValueError("give a number, or MIN:MAX")
    return text


def without_hub_scheme(model: str) -> str:
    """``hf://NAME`` is the hub id ``NAME``."""
    return model.removeprefix(HUB_SCHEME)


# Defaults are given by name: type checkers take those fields alone for optional.
class PruneConfig(BaseModel):
    """Every option of a pruning run. The same names serve in YAML, on the command line and in Python."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, AfterValidator(without_hub_scheme)] = Field(
        description="local Hugging Face folder, hub id, .gguf file, or URL in an object store"
    )
    output: Location = Field(description="folder of the pruned checkpoint, or its URL in an object store")
    method: str = Field(default="curvature", description="pruning method")
    options: dict[str, Any] = Field(default_factory=dict, description="hyperparameters of the method")
    sparsity: float = Field(default=0.2, ge=0, lt=1, description="fraction of the decoder layers' parameters to remove")
    target: Literal["parameters", "active-parameters", "flops", "kv-cache", "bytes", "latency"] = Field(
        default="parameters", description="what the fraction is of, for methods that can plan for it"
    )
    latency_table: Location | None = Field(
        default=None, description="latencies that distprune measure-latency has measured, for the target latency"
    )
    count_embeddings: bool = Field(default=False, description="the fraction is of the whole model, embeddings included")
    layout: Annotated[Literal["free", "heterogeneous", "stock"], BeforeValidator(current_name)] = Field(
        default="free",
        description="what may differ from layer to layer: anything; heads and FFN width, which more programs open; or "
        "nothing, as in the original architecture",
    )
    align: int = Field(default=8, ge=1, description="widths and ranks are multiples of this")

    calibration: Location | None = Field(
        default=None, description="calibration set in Arrow; by default the model's own samples"
    )
    samples: int = Field(default=128, ge=1, description="own samples to generate when no calibration set is given")
    sequence_length: int = Field(default=128, ge=2, description="tokens of each own sample")
    seed: int = Field(default=0, ge=0, description="seed of the own samples")

    distill: Annotated[DistillConfig | None, BeforeValidator(switch)] = Field(
        default=None, description="distillation after pruning: its options, or true for their defaults"
    )

    propagation: Annotated[int, Field(ge=1)] | Literal["full"] = Field(
        default="full",
        description="layers pruned on each other's outputs in a row; 1 takes the dense model's activations",
    )
    rounds: int = Field(
        default=1,
        ge=1,
        description="how often the model is planned and pruned; from the second time on, by what is measured on the "
        "model that the time before has pruned",
    )
    search: Annotated[SearchConfig | None, BeforeValidator(switch)] = Field(
        default=None, description="refine the plan by measuring it: the search's options, or true for their defaults"
    )
    library: Location | None = Field(
        default=None, description="folder that keeps the parts which the search has solved, for other plans"
    )
    from_library: Location | None = Field(
        default=None, description="take the parts from the library of an earlier search, and solve nothing"
    )
    micro_batch: int = Field(default=16, ge=1, description="calibration samples in one forward pass")
    experts_at_once: int | None = Field(
        default=None,
        ge=1,
        description="experts of a mixture that a worker holds at once; by default all of a layer, which is faster",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of forward passes; auto takes the checkpoint's if all workers' hardware has units for it, "
        "else float32",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes GPUs where the cluster has any"
    )
    offload: bool = Field(
        default=False,
        description="layers run on the GPU, but statistics are kept and layers solved in the host's memory",
    )

    workers: Annotated[int, Field(ge=1)] | Annotated[str, AfterValidator(check_range)] | None = Field(
        default=None, description="worker actors, at most, or 'MIN:MAX'; by default one a GPU, or one a CPU share"
    )
    threads_per_worker: int = Field(default=1, ge=1, description="CPU threads of each worker")
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="GPUs a worker asks Ray for; 1 on cuda by default"
    )
    address: str | None = Field(default=None, description="Ray cluster to join; by default RAY_ADDRESS, or a local one")

    weights: Way = Field(
        default="auto",
        description="where workers read the model: in its folder (shared), from the driver's node (served), from the "
        "hub, or as each node best can",
    )
    writes: Literal["auto", "driver"] = Field(
        default="auto",
        description="who writes finished layers: workers whose node sees the output's file system, or the driver alone",
    )
    max_shard_size: int = Field(default=5 * 10**9, ge=1, description="bytes of one safetensors file at most")
    push_to_hub: Annotated[str, AfterValidator(without_hub_scheme)] | None = Field(
        default=None,
        description="repository on the Hugging Face hub that the result is uploaded to, or NAMESPACE/ for one of the "
        "suggested name",
    )
    hub_ignore: list[str] = Field(
        default_factory=list,
        description="patterns of files that are not uploaded to the hub; the run's log never is",
    )
    private: bool = Field(default=True, description="make the repository on the hub private")
    overwrite: bool = Field(default=False, description="replace an existing output folder, and a checkpoint on the hub")
    restart: bool = Field(default=False, description="begin anew where an unfinished run could go on")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the input model")

    def block_length(self, layers: int) -> int:
        """Layers pruned on each other's outputs in a row, for a model of ``layers`` layers."""
        return layers if self.propagation == "full" else min(self.propagation, layers)

    def worker_range(self) -> tuple[int, int | None]:
        """How many workers a run waits for before it starts, and how many it may have; None is all that fit."""
        if isinstance(self.workers, str):
            least, most = map(int, self.workers.split(":"))
            return least, most
        return 1, self.workers

    def decisive(self) -> dict[str, Any]:
        """Every option that can change a byte of the result; files that it reads are known by their content."""
        by_content = {
            **dict.fromkeys(("model", "calibration", "revision", "latency_table", "from_library"), True),
            "distill": {"calibration"},
            "search": {"calibration"},
        }
        return self.model_dump(mode="json", exclude=dict.fromkeys(PLACEMENT, True) | by_content)

    def to_yaml(self) -> str:
        """The effective configuration, which ``distprune prune --config`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> PruneConfig:
    """The configuration in a YAML file, with ``overrides`` (those that are not None) on top.

    Raises:
        InputError: the file is missing or no YAML mapping, or an option is unknown, missing or out of range.
    """
    settings = {} if path is None else read_yaml(path)
    given = {name: value for name, value in overrides.items() if value is not None}
    merged = {**settings, **given}
    for group in ("options", "distill", "search"):
        both = settings.get(group), given.get(group)
        if all(isinstance(options, Mapping) for options in both):
            merged[group] = {**both[0], **both[1]}
    try:
        return PruneConfig.model_validate(merged)
    except ValidationError as error:
        problem = error.errors()[0]
        origin = f"{path}: " if problem["loc"][0] in settings.keys() - given.keys() else ""
        raise InputError(origin + _explain(problem)) from None


# On the command line.
HOW_GIVEN = {
    "model": ": the first argument, a folder, hub id or .gguf file",
    "output": ": --output FOLDER, where the pruned checkpoint is to be",
}


#: Options that are several of their own.
GROUPS: Mapping[Any, type[BaseModel]] = {"distill": DistillConfig, "search": SearchConfig}


def _explain(problem: Mapping[str, Any]) -> str:
    group = GROUPS.get(problem["loc"][0], PruneConfig)
    option, known = ".".join(map(str, problem["loc"])), ", ".join(group.model_fields)
    match problem["type"]:
        case "missing":
            return f"option '{option}' must be given{HOW_GIVEN.get(option, '')}."
        case "extra_forbidden" | "invalid_key":
            return f"'{option}' is not an option. Options: {known}."
    if problem["loc"][0] == "propagation":
        return f"option 'propagation' is {problem['input']!r}: give a number of layers from 1, or 'full'."
    if problem["loc"][0] == "workers":
        return f"option 'workers' is {problem['input']!r}: give a number from 1, or 'MIN:MAX'."
    if problem["loc"][0] == "sparsity" and problem["type"] == "less_than" and problem["input"] < 100:
        return f"option 'sparsity' is {problem['input']!r}: {problem['msg']}. Write 30% as 0.3."
    return f"option '{option}' is {problem['input']!r}: {problem['msg']}."


class _Loader(yaml.SafeLoader):
    """Takes 2:8 for a text; YAML 1.1 takes it for a number of base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"^[0-9]+:[0-9]+$")), *resolvers]
    if first in "0123456789"
    else resolvers
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file, which the option named.

    Raises:
        InputError: the file is missing, or holds something else.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Check {option}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: must be a mapping of option names to values.")
    return settings
