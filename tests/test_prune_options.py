"""Type checkers know the options of a run, and what a run gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

import distprune
from distprune import InputError, PruneConfig
from distprune.config import DistillConfig
from distprune.prune_options import DistillOptions, PruneOptions

ROOT = Path(distprune.__file__).parents[1]
SAMPLE = """
import distprune
from distprune import PruneConfig, RunRecord

config = PruneConfig(model="m", output="o", sparsity=0.3)
record: RunRecord = distprune.prune(config, progress=True)
record = distprune.prune("m", "o", sparsity=0.3, workers="2:8", distill={"epochs": 2}, layout="stock")
removed: float = record.decoder_sparsity
name: str = distprune.suggested_name(record)
first, *others = distprune.evaluate(["m", "o"], "text.txt")
if first.perplexity is not None:
    perplexity: float = first.perplexity.perplexity
distprune.card("o", [first, *others], base_model="org/m")
distprune.plan("m", gpus=8, sparsity=0.5)
"""
WRONG = {
    'distprune.prune("m", "o", sparsty=0.3)': "call-overload",
    'distprune.prune("m", "o", layout="even")': "call-overload",
    'distprune.prune("m", "o", distill={"epoch": 2})': "call-overload",
    "distprune.prune(config, workers=2)": "call-overload",
    "distprune.prun": "attr-defined",
    "text: str = distprune.inspect('o').decoder_sparsity": "assignment",
}


@pytest.mark.parametrize(("options", "config"), [(PruneOptions, PruneConfig), (DistillOptions, DistillConfig)])
def test_type_checkers_are_told_every_option_and_every_choice(options, config):
    hints = get_type_hints(options)
    assert [*hints] == [name for name in config.model_fields if name not in ("model", "output")]
    for name, hint in hints.items():
        annotation = config.model_fields[name].annotation
        if get_origin(annotation) is Literal:
            assert get_args(hint) == get_args(annotation), name


@pytest.mark.slow
def test_strict_type_checking_passes_what_is_right_and_nothing_else(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "sample.py").write_text(SAMPLE + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--follow-imports=silent"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "sample.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    told = [line for line in done.stdout.splitlines() if "error:" in line]
    first = SAMPLE.count("\n") + 1
    expected = {(f"sample.py:{first + place}:", f"[{code}]") for place, code in enumerate(WRONG.values())}
    assert {(line.split()[0], line.split()[-1]) for line in told} == expected, done.stdout + done.stderr


@pytest.mark.parametrize("beside", [{"output": "o"}, {"sparsity": 0.3}, {"config": "run.yaml"}])
def test_a_whole_run_takes_no_options_beside_it(beside):
    with pytest.raises(InputError, match="A PruneConfig is a whole run"):
        distprune.prune(PruneConfig(model="m", output="o"), **beside)
