"""Part of the GPU check: how fast one layer of 8B's and of 70B's shape is pruned, task by task and solve by solve.

Every figure stands beside what this GPU's matrix products reach, measured first: a task's floor is what its operations
take at those rates, as `distprune plan` counts them. Peak memory stands beside what the plan predicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import torch
from gpu_check_report import Rows, part_arguments
from in_process import InProcess, Measured
from random_model import config_of, make_calibration, make_model
from torch import Tensor

from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.engine.worker.task import Task
from distprune.planning import Cluster, Rates
from distprune.planning.counting import Counts
from distprune.planning.kernels import EIGEN, FLOAT32, FLOAT64, HALF
from distprune.planning.memory import TaskPeak, task_peaks
from distprune.planning.rehearsal import Rehearsed
from distprune.planning.scenario import make_scenario
from distprune.planning.timing import Clock
from distprune.solvers import (
    eliminate,
    elimination_path,
    linear_branch,
    output_projections,
    relaxed_selection,
    ridge,
)
from distprune.solvers.elimination import damped_inverse
from distprune.solvers.low_rank import factor_input_scaled

METHODS = ("curvature", "olica", "oops")
VOCABULARY = 32000


@dataclass(frozen=True)
class Size:
    """A model and a calibration set to measure with."""

    shape: str
    layers: int
    windows: int
    length: int
    micro_batch: int


SIZES = {
    "cuda": [Size("8b", 2, 16, 2048, 8), Size("70b", 1, 16, 2048, 8)],
    "cpu": [Size("tiny", 2, 8, 64, 4)],
}


def main() -> None:
    arguments = part_arguments(__doc__)
    rows, device = Rows(arguments.rows), torch.device(arguments.device)
    ceilings = measure_ceilings(device, 8192 if device.type == "cuda" else 512)
    rows.add("ceilings", ", ".join(f"{name} {value:.3g}" for name, value in ceilings.items()), **ceilings)
    sizes = SIZES[arguments.device]
    for size in sizes:
        with TemporaryDirectory(dir=arguments.out) as scratch:
            folder = Path(scratch, "model")
            config = config_of(size.shape, num_hidden_layers=size.layers, vocab_size=VOCABULARY)
            make_model(folder, config, device=device)
            tokens = make_calibration(Path(scratch, "calibration.arrow"), folder, size.windows, size.length)
            for method in METHODS:
                measure_method(rows, method, size, folder, tokens, device, clock_of(ceilings))
    for size in sizes:
        measure_solves(rows, size, device, ceilings)


# ---------------------------------------------------------------- ceilings


def measure_ceilings(device: torch.device, width: int) -> dict[str, float]:
    """What matrix products reach, in FLOP/s, and copies within the GPU and from the host's ordinary memory, in B/s."""

    def products(dtype: torch.dtype, width: int) -> float:
        left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        return 2 * width**3 / seconds_of(lambda: left @ right, device)

    block = torch.randn(width, width, device=device)
    on_host = torch.randn(width, width)
    return {
        "half": products(torch.bfloat16, width),
        "float32": products(torch.float32, width),
        "float64": products(torch.float64, width // 2),
        "memory": 2 * block.nbytes / seconds_of(lambda: block.clone(), device),
        "to host": block.nbytes / seconds_of(lambda: on_host.copy_(block), device),
        "to device": block.nbytes / seconds_of(lambda: block.copy_(on_host), device),
    }


def clock_of(ceilings: Mapping[str, float]) -> Clock:
    """Tells the seconds that kernels take at these rates, copies between GPU and host left out.

    An eigendecomposition of an n x n matrix counts 9n³ operations, half of which no hardware does as products.
    """
    rates = {field.name: inf for field in fields(Rates)} | {"launch": 0.0, "eigen": ceilings["float64"]}
    reached = Rates(**rates | {name: ceilings[name] for name in ("half", "float32", "float64", "memory")})
    return Clock(reached, reached, reading=inf)


def seconds_of(run: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The median of some runs, after one that doesn't count."""
    taken = []
    for _ in range(times + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[times // 2]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------- tasks


def measure_method(
    rows: Rows, method: str, size: Size, folder: Path, tokens: np.ndarray, device: torch.device, clock: Clock
) -> None:
    config = PruneConfig(
        model=str(folder), output=folder / "none", method=method, sparsity=0.3, micro_batch=size.micro_batch,
        device=device.type, dtype="bfloat16", workers=1, samples=size.windows, sequence_length=size.length,
    )  # fmt: skip
    InProcess(config, folder, device).prune(tokens[:1])  # what is first of its kind is slow
    tasks = InProcess(config, folder, device).prune(tokens).tasks
    hardware, gpus = ("h100", 1) if device.type == "cuda" else ("cpu", 0)
    scenario = make_scenario(config, Checkpoint.open(folder), Cluster(gpus=gpus), hardware, {})
    takes = [scenario.rehearsal.layer(index) for index in range(scenario.layers)]
    for task, measured in tasks.items():
        if of_layers := [of_layer[task] for of_layer in takes if task in of_layer]:
            tell_task(rows, f"{size.shape} {method}: {task.kind()}", measured, of_layers, size.windows, clock)
    tell_memory(rows, f"{size.shape} {method}: memory", tasks, task_peaks(scenario), device)


def tell_task(
    rows: Rows, what: str, measured: Measured, of_layers: Sequence[Rehearsed], windows: int, clock: Clock
) -> None:
    """A task of one layer: its seconds, and those that what was counted while it was rehearsed takes at least."""

    def a_layer(figure: Callable[[Counts], float]) -> float:
        return fmean(rehearsed.on(windows, lambda done: figure(done.counts)) for rehearsed in of_layers)

    seconds, floor = measured.seconds / measured.calls, a_layer(clock.seconds)
    operations = a_layer(lambda counts: counts.flops(HALF, FLOAT32, FLOAT64, EIGEN))
    found = f"{seconds:.2f} s a layer, {operations / seconds / 1e12:.0f} TFLOP/s; "
    found += f"floor {floor:.2f} s ({floor / seconds:.0%})"
    rows.add(what, found, seconds=seconds, floor=floor, flops=operations, peak=measured.peak)


def tell_memory(
    rows: Rows,
    what: str,
    tasks: Mapping[type[Task], Measured],
    peaks: Mapping[str, TaskPeak],
    device: torch.device,
) -> None:
    """Of the whole run, and by task."""
    measured = max(task.peak for task in tasks.values())
    planned = max(peak.device for peak in peaks.values())
    off = planned / measured - 1 if measured else 0.0
    found = f"peak {measured / 2**30:.1f} GiB, planned {planned / 2**30:.1f} ({off:+.0%})"
    by_task = {task.kind(): each.peak for task, each in tasks.items()}
    by_plan = {name: peak.device for name, peak in peaks.items()}
    rows.add(what, found, device.type == "cpu" or off >= -0.15, measured=by_task, planned=by_plan)


# ---------------------------------------------------------------- solves


def measure_solves(rows: Rows, size: Size, device: torch.device, ceilings: Mapping[str, float]) -> None:
    for name, dtype, operations, solve in solves(size, device):
        try:
            seconds = seconds_of(solve, device, times=1)
        except RuntimeError as error:  # out of memory, or not positive definite
            rows.add(f"{size.shape} {name}", str(error).splitlines()[0], False)
            continue
        ceiling = ceilings[str(dtype).removeprefix("torch.")]
        share = operations / seconds / ceiling
        found = f"{seconds:.2f} s, {operations / seconds / 1e12:.2f} TFLOP/s ({share:.0%} of the ceiling)"
        rows.add(f"{size.shape} {name}", found, seconds=seconds, flops=operations, share=share)


def solves(size: Size, device: torch.device) -> Iterator[tuple[str, torch.dtype, float, Callable[[], object]]]:
    """Each kind of solve at the size of the shape: its name, dtype, operations, and what runs it."""
    config = config_of(size.shape)
    d, f = config.hidden_size, config.intermediate_size
    kept = int(0.7 * f)
    joint = second_moment(d + f, device)
    narrow, cross, gram = joint[:d, :d].clone(), joint[:d, d:].clone(), joint[d:, d:].clone()
    del joint
    weight = torch.randn(d, f, device=device)
    square = torch.randn(d, d, device=device) * d**-0.5
    root = torch.linalg.cholesky(narrow.double())
    order = torch.arange(f, device=device)
    single, double = torch.float32, torch.float64
    path = f**3 * (1 + 2 / 3) + d * f**2
    yield "Cholesky factor and inverse, f x f", double, f**3, lambda: damped_inverse(gram, 0.01)
    yield "eigenvectors, d x d", double, 9 * d**3, lambda: torch.linalg.eigh(narrow.double())
    yield "eigenvalues alone, d x d", double, 4 / 3 * d**3, lambda: torch.linalg.eigvalsh(narrow.double())
    yield "eigenvectors, d x d, float32", single, 9 * d**3, lambda: torch.linalg.eigh(narrow)
    yield "elimination path (FFN)", double, path, lambda: elimination_path(weight, gram, 0.01, batch=-(-f // 64))
    yield "elimination (SlimGPT)", double, path * 0.6, lambda: eliminate(weight, gram, kept, 0.01, largest_batch=512)
    yield "output projections", double, 15 * d**3, lambda: output_projections(square, narrow, root)
    branch = kept**3 / 3 + 2 * kept**2 * d + 2 * (f - kept) * d * (kept + d) + 4 * kept * d**2 + 7 / 3 * d**3
    yield "linear branch", double, branch, lambda: linear_branch(weight, order[:kept], gram, narrow, cross, 0.1)
    yield (
        "ridge refit",
        single,
        kept**3 / 3 + 2 * kept**2 * d,
        lambda: ridge(gram[:kept, :kept], cross[:, :kept].mT, 0.03),
    )
    yield "low rank, half", double, 11 * d**3, lambda: factor_input_scaled(square, torch.ones(d, device=device), d // 2)
    yield "low rank, 3%", single, 0.0, lambda: factor_input_scaled(square, torch.ones(d, device=device), int(0.03 * d))
    interaction = (weight.mT @ weight) * gram
    yield (
        "quadratic program (OOPS)",
        single,
        0.0,
        lambda: relaxed_selection(interaction, torch.ones(f, device=device), float(kept)),
    )


def second_moment(width: int, device: torch.device) -> Tensor:
    """A Gram matrix of half rank with a few channels that are far larger than the others."""
    samples = torch.randn(width // 2, width, device=device)
    samples[:, ::97] *= 30
    return samples.mT @ samples / len(samples)


if __name__ == "__main__":
    main()
