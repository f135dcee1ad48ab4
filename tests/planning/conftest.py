"""Plans of checkpoints that are headers and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from headers import write_headers

from distprune.config import PruneConfig
from distprune.planning import Cluster, RunPlan, plan_run

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session")
def small_headers(tmp_path_factory) -> Callable[..., Path]:
    """Writes the small Llama with another geometry."""
    return lambda **changes: write_headers(tmp_path_factory.mktemp("small"), **SMALL | changes)


@pytest.fixture(scope="session")
def headers_70b(tmp_path_factory) -> Path:
    return write_headers(tmp_path_factory.mktemp("llama-70b"), **LLAMA_70B)


@pytest.fixture(scope="session")
def small(small_headers) -> Path:
    return small_headers()


@pytest.fixture(scope="session")
def plan(small) -> Callable[..., RunPlan]:
    """Plans a run of the small Llama, on two cores and in bfloat16 unless told otherwise."""

    def make(model: Path = small, cluster: Cluster | None = None, rates=None, hardware=None, **options) -> RunPlan:
        config = PruneConfig(model=str(model), output="pruned", **{"dtype": "bfloat16"} | options)
        return plan_run(config, cluster or Cluster(cpus=2), hardware=hardware, rates=rates)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A model of 70 billion parameters takes half a minute to plan for."""
    for item in items:
        if "headers_70b" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
