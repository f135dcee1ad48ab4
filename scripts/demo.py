"""Prune SmolLM2-135M by 20% on two workers, and hear the model before and after."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from smollm2 import bundled_smollm2
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import distprune
from distprune.calibration import Sampling, generate_own_samples, load_tokenizer
from distprune.calibration.whole_model import load_config, load_model
from distprune.checkpoint import resolve_model
from distprune.evaluation import generate_sentence, perplexity_of_model
from distprune.hardware import compute_dtype
from distprune.reporting import console_progress, memory_line

PROMPT = "The best way to learn a language is"
SAMPLES = 128
#: A core that is slower gets fewer samples, a micro-batch at least, so that the demo takes some five minutes.
FULL_SPEED = 1.5e11  # FLOP/s
MICRO_BATCH = 16
console = Console(soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("smollm2-pruned"), help="folder of the pruned model")
    output = parser.parse_args().output

    gguf = bundled_smollm2()
    console.print(f"Importing {gguf.name} ...")
    model = resolve_model(str(gguf))
    samples = affordable_samples(model)
    with TemporaryDirectory() as scratch:
        calibration = Path(scratch) / "calibration.arrow"
        console.print(f"Writing the calibration set: {samples} samples of 128 tokens by the model itself ...")
        distprune.calibrate(str(gguf), calibration, samples=samples, sequence_length=128, seed=0)
        record = distprune.prune(
            str(gguf),
            output,
            method="curvature",
            sparsity=0.2,
            calibration=calibration,
            workers=2,
            micro_batch=MICRO_BATCH,
            overwrite=True,
            progress=console_progress(console),
        )
    console.print(memory_line(record), highlight=False)
    show_comparison(model, output, held_out_text(model, samples * 3 // 8), record)
    console.print(f"\nThe pruned model is in {output}, and {output}/report.html shows what was removed where.")


def affordable_samples(model: Path) -> int:
    """How many calibration samples this machine works through in a few minutes; fewer than usual are announced."""
    if torch.cuda.is_available():
        return SAMPLES
    dtype = compute_dtype(load_config(model).dtype, "cpu")
    console.print(str(dtype))
    speed = speed_of_core(dtype.dtype)
    samples = max(1, min(SAMPLES, int(SAMPLES * speed / FULL_SPEED)) // MICRO_BATCH) * MICRO_BATCH
    if samples < SAMPLES:
        console.print(
            f"A core of this machine does {speed / 1e9:.0f} GFLOP/s in {dtype.name}: {samples} calibration samples "
            f"must do instead of {SAMPLES}, and the pruned model will be worse for it."
        )
    return samples


def speed_of_core(dtype: torch.dtype) -> float:
    """FLOP/s of one thread in products of the size of SmolLM2's: the best of some, since others may use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    states, weight = torch.ones(2048, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        states @ weight
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * states.numel() * weight.shape[1] / best


def held_out_text(model: Path, samples: int) -> str:
    """Text that calibration did not see: more samples, of another seed and without random tokens."""
    tokens = generate_own_samples(model, samples, 128, seed=1, sampling=Sampling(random_opening=0))
    return "".join(load_tokenizer(model).batch_decode(tokens))


def show_comparison(model: Path, output: Path, text: str, record: distprune.engine.RunRecord) -> None:
    table = Table("model", "decoder parameters", "all parameters", "perplexity")
    sentences = {}
    for name, path, decoder, total in (
        ("original", model, record.decoder_parameters_before, record.total_parameters_before),
        ("pruned", output, record.decoder_parameters_after, record.total_parameters_after),
    ):
        network, tokenizer = load_model(path), AutoTokenizer.from_pretrained(path)
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
