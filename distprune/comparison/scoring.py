"""Perplexity measured in a process of its own.

Evaluation needs the model whole. In the driver's process it would keep GPU memory that the next run needs, and count
as peak memory of runs that took far less.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from distprune.config import PruneConfig
from distprune.errors import InputError

BAD_INPUT = 2


@dataclass(frozen=True)
class Evaluation:
    """What perplexity is taken on: the first ``max_tokens`` of a text, in windows of ``length`` tokens.

    ``text`` is a file or data set that ``distprune evaluate`` takes, ``field`` the one of its records.
    """

    text: str | Path
    max_tokens: int | None = None
    length: int = 128
    field: str | None = None


def evaluate_apart(model: Path, evaluation: Evaluation, config: PruneConfig) -> float:
    """The perplexity that ``distprune evaluate`` finds, with the runs' device and dtype; "auto" asks this machine's.

    Raises:
        InputError: what it refuses.
        RuntimeError: it failed; holds what it said.
    """
    command = [sys.executable, "-m", "distprune.cli", "evaluate", str(model.absolute()), "--json"]
    options = {
        "--text": evaluation.text,
        "--field": evaluation.field,
        "--sequence-length": evaluation.length,
        "--max-tokens": evaluation.max_tokens,
        "--batch-size": config.micro_batch,
        "--device": config.device,
        "--dtype": config.dtype,
    }
    for name, value in options.items():
        command += [] if value is None else [name, str(value)]
    command += ["--trust-remote-code"] if config.trust_remote_code else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        [found] = json.loads(done.stdout)
        return found["perplexity"]["perplexity"]
    if done.returncode == BAD_INPUT:
        raise InputError(re.split(r"^distprune: ", done.stderr, flags=re.MULTILINE)[-1].strip())
    raise RuntimeError(f"distprune evaluate ended with status {done.returncode}:\n{done.stderr}")
