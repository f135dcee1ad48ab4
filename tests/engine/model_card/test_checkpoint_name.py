"""Pruned models have names that people recognize and the hub takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub.utils import validate_repo_id

from distprune import suggested_name
from distprune.engine.run.model_card.checkpoint_name import rounded


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (999, "999"),
        (1_000, "1K"),
        (94_300_000, "94M"),
        (134_515_008, "135M"),
        (999_400_000, "999M"),
        (999_600_000, "1B"),
        (1_235_814_400, "1.2B"),
        (6_040_000_000, "6B"),
        (6_738_415_616, "6.7B"),
        (9_949_000_000, "9.9B"),
        (9_960_000_000, "10B"),
        (70_553_706_496, "71B"),
        (1_040_000_000_000, "1T"),
    ],
)
def test_numbers_of_parameters_are_rounded_as_people_do(parameters, text):
    assert rounded(parameters) == text


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct-distprune-6B"),
        ("/models/Llama-3.1-8B/", "Llama-3.1-8B-distprune-6B"),
        ("s3://bucket/llama", "llama-distprune-6B"),
        ("models/SmolLM2-135M.Q8_0.gguf", "SmolLM2-135M-distprune-6B"),
        ("Llama-3.1-8B-IQ4_XS.gguf", "Llama-3.1-8B-distprune-6B"),
        ("Qwen3-F16.gguf", "Qwen3-distprune-6B"),
        ("Phi.gguf", "Phi-distprune-6B"),
        ("me/Llama-3.1-8B-distprune-7.2B", "Llama-3.1-8B-distprune-6B"),
        ("my model (new)..", "my-model-new-distprune-6B"),
        ("..", "model-distprune-6B"),
        ("x" * 200, f"{'x' * 80}-distprune-6B"),
    ],
)
def test_the_name_is_the_originals_with_what_is_left(model, name):
    found = suggested_name(SimpleNamespace(model=model, total_parameters_after=6_040_000_000))
    assert found == name
    validate_repo_id(found)
