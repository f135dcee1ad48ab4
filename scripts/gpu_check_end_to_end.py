"""Part of the GPU check: an 8B-shaped model of random weights, pruned end to end through Ray by one worker.

What it tells of each method: the seconds of every stage beside those that `distprune plan` predicts, how busy the GPU
was, and the peak memory of GPU and processes beside the plan's. The calibration set is 128 windows of 2,048 tokens, or
as many as the disk has room for the hidden states of.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from gpu_check_report import Rows, part_arguments
from random_model import config_of, make_calibration, make_model

GIB = 2**30


@dataclass(frozen=True)
class Size:
    shape: str
    windows: int
    length: int
    micro_batch: int
    seconds: float  # that a run is to take at most


SIZES = {"cuda": Size("8b", 128, 2048, 8, 300.0), "cpu": Size("tiny", 16, 64, 4, 600.0)}


def main() -> None:
    arguments = part_arguments(__doc__)
    rows, size = Rows(arguments.rows), SIZES[arguments.device]
    model = arguments.out / "model"
    shutil.rmtree(model, ignore_errors=True)
    start = time.perf_counter()
    changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    make_model(model, config_of(size.shape, **changes), device=arguments.device)
    written = sum(file.stat().st_size for file in model.iterdir())
    seconds = time.perf_counter() - start
    rows.add("model made", f"{written / 1e9:.1f} GB in {seconds:.0f} s", bytes=written, seconds=seconds)
    for method in ("curvature", "olica"):
        prune(rows, method, model, size, arguments.device, arguments.out)


def prune(rows: Rows, method: str, model: Path, size: Size, device: str, out: Path) -> None:
    output, calibration = out / f"{method}-pruned", out / f"{method}.arrow"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name(f"{output.name}.partial"), ignore_errors=True)
    windows = windows_that_fit(size, method, out)
    make_calibration(calibration, model, windows, size.length)
    options = [
        str(model), "--method", method, "--sparsity", "0.3", "--calibration", str(calibration), "--device", device,
        "--workers", "1", "--threads-per-worker", "4", "--micro-batch", str(size.micro_batch),
    ]  # fmt: skip
    planning = begin_plan(options, device)
    start = time.perf_counter()
    with Watch(device) as watch:
        command = [sys.executable, "-m", "distprune.cli", "prune", *options, "--output", str(output)]
        log = out / f"{method}-run.jsonl"
        with log.open("w") as lines:
            done = subprocess.run(
                [*command, "--log-format", "json"], stdout=lines, stderr=subprocess.PIPE, text=True, check=False
            )
    seconds = time.perf_counter() - start
    if done.returncode:
        rows.add(f"{method}, {windows} windows", f"status {done.returncode}: {done.stderr.strip()[-400:]}", False)
        return
    tell_calls(rows, method, log)
    record = json.loads((output / "distprune_run.json").read_text())
    planned = json.loads(planning.communicate()[0])
    tell(rows, method, windows, seconds, record, planned, watch, size)


def tell_calls(rows: Rows, method: str, log: Path) -> None:
    """How long each kind of call took a worker, waiting for the driver in between left out."""
    seconds = defaultdict(list)
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "call ended":
            seconds[event["call"]].append(event["seconds"])
    found = ", ".join(f"{len(taken)} x {call} {fmean(taken):.2f} s" for call, taken in seconds.items())
    rows.add(f"{method}, calls", found, **{call: fmean(taken) for call, taken in seconds.items()})


def windows_that_fit(size: Size, method: str, folder: Path) -> int:
    """As many as asked for, or as many as there is room for: of a gradient pass every layer's hidden states are kept.

    Half of the free disk is left to weights and profiles.
    """
    config = config_of(size.shape)
    kept = 3 + (config.num_hidden_layers if method == "curvature" else 0)
    window = kept * size.length * config.hidden_size * torch.bfloat16.itemsize
    room = shutil.disk_usage(folder).free / 2
    windows = size.windows
    while windows > size.micro_batch and windows * window > room:
        windows //= 2
    return windows


def begin_plan(options: list[str], device: str) -> subprocess.Popen:
    gpus = ["--gpus", "1"] if device == "cuda" else []
    command = [sys.executable, "-m", "distprune.cli", "plan", *options, *gpus, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def tell(
    rows: Rows, method: str, windows: int, seconds: float, record: dict, planned: dict, watch: Watch, size: Size
) -> None:
    predicted = {stage["name"]: stage["seconds"] for stage in planned["stages"]}
    stages = ", ".join(
        f"{name} {took:.0f} s ({predicted[name]:.0f} planned)" if name in predicted else f"{name} {took:.0f} s"
        for name, took in record["seconds"].items()
    )
    found = f"{seconds:.0f} s ({planned['seconds']:.0f} planned): {stages}"
    what = f"{method}, {windows} windows of {size.length} tokens"
    rows.add(what, found, seconds <= size.seconds, seconds=seconds, stages=record["seconds"], planned=predicted)
    steps = {step for layer in record["layers"] for step in layer["seconds"]}
    by_step = {step: fmean(layer["seconds"].get(step, 0.0) for layer in record["layers"]) for step in sorted(steps)}
    rows.add(
        f"{method}, pruning a layer", ", ".join(f"{step} {took:.2f} s" for step, took in by_step.items()), **by_step
    )
    device = record["peak_memory_workers"][0]["device"]
    expected = planned["memory"]["worker_device"]
    off = expected / device - 1 if device else 0.0
    rows.add(
        f"{method}, memory",
        f"GPU {device / GIB:.1f} GiB (plan {expected / GIB:.1f}, {off:+.0%}), "
        f"worker {record['peak_memory_workers'][0]['resident'] / GIB:.1f} GiB, "
        f"driver {record['peak_memory_driver']['resident'] / GIB:.1f} GiB",
        abs(off) <= 0.15,
        device=device,
        planned=expected,
    )
    if watch.busy:
        rows.add(f"{method}, GPU busy", f"{fmean(watch.busy):.0%} of the time", busy=fmean(watch.busy))


class Watch:
    """Looks at how busy the GPU is, five times a second, while it is open."""

    def __init__(self, device: str):
        self.busy: list[float] = []
        self._open = device == "cuda"
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        if self._open:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False

    def _look(self) -> None:
        while self._open:
            self.busy.append(torch.cuda.utilization() / 100)
            time.sleep(0.2)


if __name__ == "__main__":
    main()
