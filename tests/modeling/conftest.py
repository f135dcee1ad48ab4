"""Tiny random decoders. Norms and biases are random too, so that a mistake in any of them shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from distprune.modeling import LayerShape, PrunedConfig, PrunedForCausalLM, register_auto_classes

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

PRUNED_SHAPES = [
    LayerShape(4, 2, 16, 11, ffn_width=80, query_rank=20, key_rank=9, calibration_rank=5),
    LayerShape(3, 1, 16, 16, ffn_width=33, query_rank=12, output_bias=True),
    LayerShape(4, 4, 16, 6, ffn_width=7, key_rank=10, calibration_rank=3, output_bias=True, down_bias=True),
]

NO_ATTENTION = {"query_heads": 0, "kv_heads": 0, "query_key_dim": 0, "value_dim": 0}

# Layer 0 has no attention, layer 1 no FFN and values wider than its queries and keys, layer 2 nothing at all.
REDUCED_SHAPES = [
    LayerShape(**NO_ATTENTION, ffn_width=33),
    LayerShape(4, 2, 10, 16, ffn_width=0),
    LayerShape(**NO_ATTENTION, ffn_width=0),
    LayerShape(4, 2, 6, 4, ffn_width=80, query_rank=20, key_rank=9),
]


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter with values large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            parameter.copy_(noise + 1 if "norm" in name else noise)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    register_auto_classes()


@pytest.fixture
def tiny() -> dict:
    return dict(TINY)


@pytest.fixture
def randomized() -> Callable[..., torch.nn.Module]:
    return randomize


@pytest.fixture
def pruned_config() -> Callable[..., PrunedConfig]:
    """A config with three differently pruned layers, changed by keyword."""

    def build(**changes) -> PrunedConfig:
        return PrunedConfig(**(TINY | {"layer_shapes": [asdict(shape) for shape in PRUNED_SHAPES]} | changes))

    return build


@pytest.fixture
def pruned_model(pruned_config) -> Callable[..., PrunedForCausalLM]:
    """A random float32 model with that config, in eval mode."""

    def build(**changes) -> PrunedForCausalLM:
        return randomize(PrunedForCausalLM(pruned_config(**changes)))

    return build


@pytest.fixture
def reduced_model(pruned_model) -> Callable[..., PrunedForCausalLM]:
    """The same with layers that lack rotary pairs, attention or FFN."""

    def build(**changes) -> PrunedForCausalLM:
        shapes = [asdict(shape) for shape in REDUCED_SHAPES]
        model = pruned_model(num_hidden_layers=4, layer_shapes=shapes, **changes)
        generator = torch.Generator().manual_seed(2)
        for pairs in (layer.self_attn.rotary_pairs for layer in model.model.layers if layer.self_attn is not None):
            for group in pairs:
                group.copy_(torch.randperm(8, generator=generator)[: len(group)].sort().values)
        return model

    return build


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids (2, 24), none of them padding."""
    return torch.randint(2, 128, (2, 24), generator=torch.Generator().manual_seed(1))
