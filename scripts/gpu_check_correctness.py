"""Part of the GPU check: every method gives on the GPU what it gives on the CPU, and the same bytes twice.

A small model of random weights is pruned by every method. Its loss on the calibration set must agree, in float32 within
a thousandth and in bfloat16 within a hundredth. With `--offload`, two runs must give the same bytes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from gpu_check_report import Rows, part_arguments
from in_process import InProcess, Result
from random_model import config_of, make_calibration, make_model

from distprune.config import PruneConfig
from distprune.decoder_layer import state_of
from distprune.methods import METHODS

WITHIN = {"float32": 1e-3, "bfloat16": 1e-2}


def main() -> None:
    arguments = part_arguments(__doc__)
    rows, device = Rows(arguments.rows), torch.device(arguments.device)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        make_model(folder, config_of("tiny"), dtype=torch.float32, gain=1.5)
        tokens = make_calibration(Path(scratch, "calibration.arrow"), folder, 16, 64)
        for method in METHODS:
            compare_with_cpu(rows, method, folder, tokens, device)
        compare_with_cpu(rows, "magnitude", folder, tokens, device, distill=True)
        for method in METHODS:
            repeat(rows, method, folder, tokens, device, offload=True)
        repeat(rows, "curvature", folder, tokens, device)
        repeat(rows, "magnitude", folder, tokens, device, distill=True)
    compare_flash_attention(rows, device)


def prune(method: str, folder: Path, tokens: np.ndarray, device: torch.device, **options: object) -> Result:
    config = PruneConfig(model=str(folder), output=folder / "none", method=method, sparsity=0.3, **options)
    return InProcess(config, folder, device).prune(tokens)


def compare_with_cpu(
    rows: Rows, method: str, folder: Path, tokens: np.ndarray, device: torch.device, **options: object
) -> None:
    for dtype, within in WITHIN.items():
        here, there = (
            prune(method, folder, tokens, place, dtype=dtype, **options).loss for place in (torch.device("cpu"), device)
        )
        difference = abs(there - here) / here
        found = f"loss {there:.4f}, on the CPU {here:.4f}: {difference:.1e} apart"
        rows.add(", ".join([method, *options, dtype]), found, difference <= within, loss=there, cpu=here)


def repeat(rows: Rows, method: str, folder: Path, tokens: np.ndarray, device: torch.device, **options: object) -> None:
    first, second = (prune(method, folder, tokens, device, dtype="bfloat16", **options) for _ in range(2))
    same = all(
        torch.equal(tensor, state_of(after)[name])
        for before, after in zip(first.layers, second.layers, strict=True)
        for name, tensor in state_of(before).items()
    )
    rows.add(", ".join([method, *options, "twice"]), "the same bytes" if same else "other bytes", same)


def compare_flash_attention(rows: Rows, device: torch.device) -> None:
    """A pruned model with narrower values gives the same logits by flash attention as by SDPA."""
    if importlib.util.find_spec("flash_attn") is None or device.type != "cuda":
        rows.add("flash attention", "not installed: not run")
        return
    from distprune.modeling import PrunedConfig, PrunedForCausalLM

    shape = {"query_heads": 8, "kv_heads": 2, "query_key_dim": 64, "value_dim": 48, "ffn_width": 704}
    config = PrunedConfig(
        vocab_size=512, hidden_size=512, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=704, layer_shapes=[shape] * 2, dtype=torch.bfloat16,
    )  # fmt: skip
    model = PrunedForCausalLM(config).to(device, torch.bfloat16).eval()
    ids = torch.arange(256, device=device).view(2, 128)
    logits = []
    for implementation in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(ids).logits.float())
    apart = ((logits[0] - logits[1]).norm() / logits[0].norm()).item()
    rows.add("flash attention", f"logits {apart:.1e} from SDPA's", apart < 1e-2)


if __name__ == "__main__":
    main()
