"""What a run is: one validated object from the command line, YAML or Python, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distprune.errors import InputError

# What decides where and how fast a run goes, and never what it makes.
PLACEMENT = ("output", "overwrite", "workers", "gpus_per_worker", "address")


class PruneConfig(BaseModel):
    """Every option of a pruning run. The same names serve in YAML, on the command line and in Python."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="local Hugging Face folder, hub id, or .gguf file")
    output: Path = Field(description="folder of the pruned checkpoint")
    method: str = Field("olica", description="pruning method")
    options: dict[str, Any] = Field(default_factory=dict, description="hyperparameters of the method")
    sparsity: float = Field(0.2, ge=0, lt=1, description="fraction of the decoder layers' parameters to remove")
    count_embeddings: bool = Field(False, description="the fraction is of all parameters, embeddings included")
    align: int = Field(8, ge=1, description="widths and ranks are multiples of this")

    calibration: Path | None = Field(None, description="calibration set in Arrow; by default the model's own samples")
    samples: int = Field(128, ge=1, description="own samples to generate when no calibration set is given")
    sequence_length: int = Field(128, ge=2, description="tokens of each own sample")
    seed: int = Field(0, description="seed of the own samples")

    propagation: int | Literal["full"] = Field(
        "full",
        description="layers pruned on each other's outputs in a row; 1 takes the dense model's activations",
    )
    micro_batch: int = Field(16, ge=1, description="calibration samples in one forward pass")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of forward passes; auto takes the checkpoint's"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes GPUs where the cluster has any")

    workers: int | None = Field(None, ge=1, description="worker actors; by default one a GPU, or one a CPU share")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of each worker")
    gpus_per_worker: float | None = Field(None, ge=0, description="GPUs a worker asks Ray for; 1 on cuda by default")
    address: str | None = Field(None, description="Ray cluster to join; by default RAY_ADDRESS, or a local one")

    max_shard_size: int = Field(5 * 10**9, ge=1, description="bytes of one safetensors file at most")
    overwrite: bool = Field(False, description="replace an existing output folder")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run code that comes with the input model")

    def block_length(self, layers: int) -> int:
        """Layers pruned on each other's outputs in a row, for a model of ``layers`` layers."""
        return layers if self.propagation == "full" else min(self.propagation, layers)

    def fingerprint(self, model: str, calibration: str) -> str:
        """Identifies what a run makes: the given fingerprints of model and calibration set, and every option that
        can change a byte of the result. Hexadecimal SHA-256."""
        what = self.model_dump(mode="json", exclude={*PLACEMENT, "model", "calibration", "revision"})
        return hashlib.sha256(json.dumps([model, calibration, what], sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The effective configuration, which ``distprune prune --config`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> PruneConfig:
    """The configuration in a YAML file, with ``overrides`` (those that are not None) on top.

    Raises:
        InputError: the file is missing or no YAML mapping, or an option is unknown, missing or out of range.
    """
    settings = {} if path is None else _read_yaml(path)
    given = {name: value for name, value in overrides.items() if value is not None}
    if "options" in given:
        given["options"] = {**(settings.get("options") or {}), **given["options"]}
    return make_config({**settings, **given}, origin=str(path) if path else "options")


def make_config(settings: Mapping[str, Any], origin: str = "options") -> PruneConfig:
    """Validate ``settings``; ``origin`` is named in the error message."""
    try:
        config = PruneConfig(**settings)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]) if problem["loc"] else "?"
        message = {
            "missing": "must be given",
            "extra_forbidden": f"is not an option. Options: {', '.join(PruneConfig.model_fields)}",
        }.get(problem["type"], f"is {problem['input']!r}: {problem['msg']}")
        raise InputError(f"{origin}: '{option}' {message}.") from None
    if config.propagation != "full" and config.propagation < 1:
        raise InputError(f"{origin}: 'propagation' is {config.propagation}: give a number of layers from 1, or 'full'.")
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Check --config.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: must be a mapping of option names to values.")
    return settings
