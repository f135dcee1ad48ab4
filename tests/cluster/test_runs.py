"""The runs: each is a configuration, and fits the machines that its first lines name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from headers import write_headers
from random_model import SHAPES
from transformers import Qwen3MoeConfig

from distprune import plan
from distprune.calibration import CalibrationMetadata, write_calibration
from distprune.config import load_config

FOLDER = Path(__file__).parents[2] / "cluster" / "runs"
RUNS = sorted(file.name for file in FOLDER.glob("*.yaml"))
VOCABULARY, CONTEXT = 128256, 131072  # Llama 3.1's
QWEN3_235B = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "tie_word_embeddings": False,
}


def options_of(run: str, command: str) -> dict[str, str]:
    """The options that the comment at the top gives a command of distprune."""
    (line,) = re.findall(rf"^#   .*distprune {command} (.*)$", (FOLDER / run).read_text(), re.MULTILINE)
    words = [word for word in shlex.split(line) if "/" not in word and word != "--cover-experts"]
    return dict(zip((word[2:].replace("-", "_") for word in words[::2]), words[1::2], strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_it_is_a_configuration(run):
    config = load_config(FOLDER / run, {})
    # A cluster that starts with no GPU would be taken for one of CPUs.
    assert config.device == "cuda"
    assert config.calibration == Path(options_of(run, "calibrate")["output"])
    assert options_of(run, "prune") in ({"config": run}, {"config": run, "address": "auto"})


@pytest.mark.slow  # a plan for a large model takes a minute
@pytest.mark.parametrize("run", RUNS)
def test_it_fits_the_machines_that_it_names(run, tmp_path):
    asked = options_of(run, "plan")
    assert asked.pop("config") == run
    numbers = {name: int(asked.pop(name)) for name in ("gpus", "nodes") if name in asked}
    made = options_of(run, "calibrate")
    length, calibration = int(made["sequence_length"]), tmp_path / "calibration.arrow"
    metadata = CalibrationMetadata("0" * 64, VOCABULARY, length, ("none",), 0, False)
    write_calibration(calibration, np.zeros((int(made["samples"]), length), np.int32), metadata)

    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    if (name := run.partition("-")[0]) == "235b":
        config = Qwen3MoeConfig(**QWEN3_235B, **sizes, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16")
        model = write_headers(tmp_path / "model", config)
    else:
        model = write_headers(tmp_path / "model", **SHAPES[name], **sizes)
    planned = plan(str(model), config=FOLDER / run, calibration=calibration, **numbers, **asked)
    assert planned.verdict.fits, planned.verdict
    assert planned.cluster.host_memory is not None
    assert planned.workers == numbers["gpus"]
