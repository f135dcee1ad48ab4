"""The options of a pruning run for type checkers: the fields of :class:`distprune.config.PruneConfig` as keywords."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict


class DistillOptions(TypedDict, total=False):
    """The fields of :class:`distprune.config.DistillConfig`."""

    objective: Literal["layers", "logits"]
    calibration: str | Path | None
    epochs: int
    learning_rate: float
    train: Literal["full", "lora"]
    rank: int
    train_routers: bool
    look_ahead: int
    batch: int
    held_out: float
    seed: int


class SearchOptions(TypedDict, total=False):
    """The fields of :class:`distprune.config.SearchConfig`."""

    steps: int
    seconds: float | None
    samples: int | None
    calibration: str | Path | None


class PruneOptions(TypedDict, total=False):
    """The fields of :class:`distprune.config.PruneConfig` but model and output."""

    method: str
    options: dict[str, Any]
    sparsity: float
    target: Literal["parameters", "active-parameters", "flops", "kv-cache", "bytes", "latency"]
    latency_table: str | Path | None
    count_embeddings: bool
    layout: Literal["free", "heterogeneous", "stock"]
    align: int
    calibration: str | Path | None
    samples: int
    sequence_length: int
    seed: int
    distill: DistillOptions | bool | None
    propagation: int | Literal["full"]
    rounds: int
    search: SearchOptions | bool | None
    library: str | Path | None
    from_library: str | Path | None
    micro_batch: int
    experts_at_once: int | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: Literal["auto", "cpu", "cuda"]
    offload: bool
    workers: int | str | None
    threads_per_worker: int
    gpus_per_worker: float | None
    address: str | None
    weights: Literal["auto", "shared", "served", "hub"]
    writes: Literal["auto", "driver"]
    max_shard_size: int
    push_to_hub: str | None
    hub_ignore: list[str]
    private: bool
    overwrite: bool
    restart: bool
    revision: str | None
    trust_remote_code: bool
