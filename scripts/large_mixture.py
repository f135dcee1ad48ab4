"""Prune one layer of DeepSeek-V3's shape, random weights, with some of its 256 experts in memory at a time.

    python scripts/large_mixture.py FOLDER [--experts-at-once 8] [--method wanda-sp] [--experts 256]

It writes a checkpoint of 23 GB to FOLDER/model, unless it is there, prunes it to FOLDER/pruned, and prints how long
that took and the most memory that all processes of the run held together (their proportional set sizes). Then the
engine's own scheduler does the pruning pass again on simulated clusters, where every task takes as long as it took
here, and it prints what part of the workers' time they are at work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from random_model import make_calibration, make_tokenizer, random_tensors
from torch import Tensor
from transformers import DeepseekV3Config

from distprune.checkpoint.piecewise import piecewise_file
from distprune.engine.run.journal import entry_of
from distprune.engine.run.record import LOG_FILE
from distprune.engine.run.states import DENSE
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.scheduler.simulation import Machines, MemoryJournal, SimulatedRuntime, SimulatedWorker
from distprune.engine.stages.context import RunContext
from distprune.engine.stages.pruning_pass import PruningPass
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.expert_tasks import PruneAround, PruneExperts
from distprune.engine.worker.task import Task
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.layers.tree import build_on_meta
from distprune.planning.simulated_run import stand_ins

LAYER = "model.layers.0."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
#: Random numbers that experts' weights are cut from.
POOL = 2**26


def config_of(experts: int) -> DeepseekV3Config:
    """DeepSeek-V3's own, except for the number of layers, of words and, if asked for, of experts."""
    return DeepseekV3Config(
        num_hidden_layers=1,
        first_k_dense_replace=0,
        vocab_size=512,
        max_position_embeddings=4096,
        n_routed_experts=experts,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


@torch.no_grad()
def make_model(folder: Path, config: DeepseekV3Config) -> None:
    """Write a checkpoint whose experts are stored one by one, as they are released."""
    architecture, model = Architecture(config), build_on_meta(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    make_tokenizer(folder, config.vocab_size)
    torch.manual_seed(0)
    of_layer = [name for name in model.state_dict() if name.startswith(LAYER) and ".experts." not in name]
    others = [*architecture.outer_tensors(), *of_layer]
    drawn = random_tensors(model, others, torch.bfloat16, "cpu", gain=0.5)
    hidden, width = config.hidden_size, config.moe_intermediate_size
    dims = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    experts = {
        f"{LAYER}mlp.experts.{number}.{projection}.weight": torch.empty(
            dims[projection], dtype=torch.bfloat16, device="meta"
        )
        for number in range(config.n_routed_experts)
        for projection in PROJECTIONS
    }
    pool = torch.randn(POOL, dtype=torch.bfloat16)
    with piecewise_file(folder / "model.safetensors", drawn | experts) as file:
        file.write(drawn)
        for place, (name, tensor) in enumerate(experts.items()):
            file.write({name: cut(pool, place, tensor)})


def cut(pool: Tensor, place: int, like: Tensor) -> Tensor:
    """Numbers from the pool, from a place of its own for each tensor."""
    start = place * 7919 % (len(pool) - like.numel())
    return pool[start : start + like.numel()].view(like.shape) * (0.5 * like.shape[1] ** -0.5)


def memory_of(process: psutil.Process) -> int:
    """Bytes that a process and those that it has started hold, what they share counted once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total


@dataclass(frozen=True)
class Took:
    """The seconds of a pruning pass's tasks: around the experts, of each of the chunks, and for the output."""

    around: float
    experts: list[float]
    join: float

    @classmethod
    def of(cls, log: Path) -> Took:
        """What the log of a run says whose model has one layer."""
        seconds: dict[str, list[float]] = {}
        for line in log.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "call ended" and event["stage"] == "Pruning":
                seconds.setdefault(event["call"], []).append(event["seconds"])
        return cls(sum(seconds["prune_around"]), seconds["prune_experts"], sum(seconds.get("join_experts", [0.0])))


class Replay(SimulatedRuntime):
    """Workers whose tasks take what was measured; notes when the first chunk begins and the last one ends."""

    def __init__(self, took: Took, workers: int):
        super().__init__(SimpleNamespace(start=0.0), Machines(workers), None)
        self.took, self.began, self.ended = took, inf, 0.0

    def _done(self, task: Task, worker: SimulatedWorker) -> tuple[list, float, float]:
        took = self.took
        if isinstance(task, PruneExperts):
            self.began = min(self.began, self.clock)
            return stand_ins(task), took.experts[task.chunk], 0.0
        return stand_ins(task), took.around if isinstance(task, PruneAround) else took.join, 0.0

    def fetch(self, results: list) -> list:
        self.ended = self.clock
        return super().fetch(results)


def replay(took: Took, workers: int) -> tuple[float, float]:
    """The seconds of the pruning pass, and those of its experts, by so many workers."""
    runtime, chunks = Replay(took, workers), len(took.experts)
    context = RunContext(
        WorkerPool(runtime, workers), Progress(), 1, MemoryJournal(), 1, 1, experts_at_once=1, mixtures={0: chunks}
    )
    context.journal.write(entry_of(DENSE, 0), tensors={"0": torch.zeros(1, 1, 1)})
    PruningPass(context, [LayerShape(None, ExpertsShape(chunks, 1))], [{}], lambda *_: None).run(())
    return runtime.clock, runtime.ended - runtime.began


def tell_how_it_spreads(took: Took) -> None:
    """Print parallel efficiencies: the seconds of one worker over those of all workers of several."""
    print(f"around the experts {took.around:.0f} s, {len(took.experts)} chunks {sum(took.experts):.0f} s")
    alone = replay(took, 1)
    for workers in (2, 4, 8, 16):
        layer, experts = (one / (workers * several) for one, several in zip(alone, replay(took, workers), strict=True))
        print(f"{workers:3} workers, simulated: efficiency {experts:.2f} of the experts, {layer:.2f} of the layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--experts-at-once", type=int, default=8)
    parser.add_argument("--method", default="wanda-sp")
    parser.add_argument("--sparsity", default="0.3")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", default="2")
    given = parser.parse_args()
    model, output = given.folder / "model", given.folder / "pruned"
    config = config_of(given.experts)
    if not (model / "model.safetensors").exists():
        began = time.perf_counter()
        make_model(model, config)
        print(f"made the model in {time.perf_counter() - began:.0f} s", flush=True)
    calibration = given.folder / "calibration.arrow"
    make_calibration(calibration, model, given.samples, given.length)
    options = {
        "--output": output, "--method": given.method, "--sparsity": given.sparsity, "--calibration": calibration,
        "--experts-at-once": given.experts_at_once, "--workers": 1, "--threads-per-worker": given.threads,
        "--micro-batch": 1, "--dtype": "bfloat16", "--device": "cpu",
    }  # fmt: skip
    words = [model, *(each for pair in options.items() for each in pair), "--overwrite"]
    began, most = time.perf_counter(), 0
    run = subprocess.Popen([sys.executable, "-m", "distprune.cli", "prune", *map(str, words)])
    process = psutil.Process(run.pid)
    while run.poll() is None:
        most = max(most, memory_of(process))
        time.sleep(0.5)
    seconds, memory = time.perf_counter() - began, most / 2**30
    print(f"{seconds:.0f} s, {memory:.2f} GiB in all processes at most, exit {run.returncode}", flush=True)
    if run.returncode == 0:
        tell_how_it_spreads(Took.of(output / LOG_FILE))


if __name__ == "__main__":
    main()
