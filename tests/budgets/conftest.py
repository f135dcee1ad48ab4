"""Tiny decoders whose layers have random shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distprune.modeling import PrunedConfig


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., PrunedConfig]:
    """A dense configuration, changed by keyword; heads are wider together than the hidden size."""

    def build(**changes) -> PrunedConfig:
        sizes = {
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        return PrunedConfig(**sizes | changes)

    return build
