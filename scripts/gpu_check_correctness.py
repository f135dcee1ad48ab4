"""Part of the GPU check: every method gives on the GPU what it gives on the CPU, and the same bytes twice.

Small models of random weights are pruned: a Llama by every method, and other families by curvature. The loss on the
calibration set must agree, in float32 within a thousandth and in bfloat16 within a hundredth. Two runs must give the
same bytes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from gpu_check_report import Rows, part_arguments
from in_process import InProcess, Result
from random_model import config_of, make_calibration, make_model, random_pruned
from tiny_families import tiny_config
from transformers import PreTrainedConfig

from distprune.config import PruneConfig
from distprune.layers.architecture import Architecture
from distprune.methods import METHODS

WITHIN = {"float32": 1e-3, "bfloat16": 1e-2}
#: Norms of other kinds and sliding windows, fused projections, mixers beside attention, and no gate.
FAMILIES = ("gemma3_text", "phi3", "qwen3_5_text", "gpt_neox")


def main() -> None:
    arguments = part_arguments(__doc__)
    rows, device = Rows(arguments.rows), torch.device(arguments.device)
    with TemporaryDirectory() as scratch:
        llama = Check(rows, Path(scratch, "llama"), config_of("tiny"), device)
        methods = [name for name, method in METHODS.items() if method.removes != ("experts",)]
        for method in methods:
            llama.compare_with_cpu(method)
        llama.compare_with_cpu("magnitude", distill=True)
        for method in methods:
            llama.repeat(method, offload=True)
        llama.repeat("curvature")
        llama.repeat("magnitude", distill=True)
        for model_type in FAMILIES:
            family = Check(rows, Path(scratch, model_type), tiny_config(model_type), device)
            family.compare_with_cpu("curvature")
            family.repeat("curvature")
    compare_flash_attention(rows, device)


class Check:
    """Runs on one small model of random weights.

    Args:
        folder: where it is written to.
        device: what is compared with the CPU.
    """

    def __init__(self, rows: Rows, folder: Path, config: PreTrainedConfig, device: torch.device):
        self.rows, self.folder, self.device, self.name = rows, folder / "model", device, config.model_type
        make_model(self.folder, config, dtype=torch.float32, gain=1.5)
        self.tokens: np.ndarray = make_calibration(folder / "calibration.arrow", self.folder, 16, 64)

    def compare_with_cpu(self, method: str, **options: object) -> None:
        for dtype, within in WITHIN.items():
            places = torch.device("cpu"), self.device
            here, there = (self._prune(method, place, dtype=dtype, **options).loss for place in places)
            difference = abs(there - here) / here
            found = f"loss {there:.4f}, on the CPU {here:.4f}: {difference:.1e} apart"
            what = ", ".join([self.name, method, *options, dtype])
            self.rows.add(what, found, difference <= within, loss=there, cpu=here)

    def repeat(self, method: str, **options: object) -> None:
        first, second = (self._prune(method, self.device, dtype="bfloat16", **options) for _ in range(2))
        same = all(map(self._are_equal, range(len(first.layers)), first.layers, second.layers))
        what = ", ".join([self.name, method, *options, "twice"])
        self.rows.add(what, "the same bytes" if same else "other bytes", same)

    def _prune(self, method: str, device: torch.device, **options: object) -> Result:
        folder = self.folder
        config = PruneConfig(model=str(folder), output=folder / "none", method=method, sparsity=0.3, **options)
        run = InProcess(config, folder, device)
        self.names = run.model.architecture.names
        return run.prune(self.tokens)

    def _are_equal(self, index: int, *layers) -> bool:
        before, after = (self.names(index).state_of(layer) for layer in layers)
        return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def compare_flash_attention(rows: Rows, device: torch.device) -> None:
    """A pruned model with narrower values gives the same logits by flash attention as by SDPA."""
    if importlib.util.find_spec("flash_attn") is None or device.type != "cuda":
        rows.add("flash attention", "not installed: not run")
        return
    architecture = Architecture(config_of("tiny", hidden_size=512, intermediate_size=704))
    narrow = [shape.with_attention(value_dim=48) for shape in architecture.dense_shapes]
    model = random_pruned(architecture, narrow, dtype=torch.bfloat16, device=device)
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
