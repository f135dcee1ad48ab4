"""How a run scales with workers: the engine's own scheduler on simulated clusters, with costs measured here.

    python scripts/scaling.py --shape 70b --measure costs.json   # minutes: every task of a layer of random weights
    python scripts/scaling.py --costs costs.json --plot scaling.html

Parallel efficiency is T(1) / (N T(N)): what N workers are worth of N times one. With losses, every worker is lost at
the given rate, and its place is taken minutes later; T(1) is that of a worker that is never lost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import plotly.graph_objects as go
import torch
from in_process import InProcess
from plotly.subplots import make_subplots
from random_model import SHAPES, config_of, make_calibration, make_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distprune.budgets import Target
from distprune.calibration import open_calibration
from distprune.config import PruneConfig
from distprune.engine.scheduler.simulation import Costs, Machines, Pass, simulate
from distprune.engine.worker.check_tasks import CheckLayer
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.pass_tasks import Advance, CloseLayer, Embed, OpenForward, Sweep
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.task import Task

WINDOW = 128  # tokens
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODELS = (80, 126)
SEEDS = range(5)
START_SECONDS = 15.0  # a worker's imports, a GPU's libraries
console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        costs = measure(arguments)
        arguments.measure.write_text(json.dumps(asdict(costs), indent=2) + "\n")
    else:
        costs = Costs(**json.loads(arguments.costs.read_text()))
    console.print(costs)
    curves = [curve for layers in MODELS for curve in curves_of(layers, costs, arguments)]
    print_table(curves)
    if arguments.plot:
        plot(curves).write_html(arguments.plot, include_plotlyjs="cdn")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--measure", type=Path, metavar="COSTS", help="time the tasks of one layer here, and keep that")
    source.add_argument("--costs", type=Path, help="what was measured before")
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--method", default="olica")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, help="simulate so many windows of 128 tokens; by default those measured")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--micro-batch", type=int, default=1, help="samples of 128 tokens that are never parted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--losses", type=float, default=0.05, help="workers lost in an hour, of each")
    parser.add_argument("--disk", type=float, default=1.0, help="GB a second that the driver writes")
    parser.add_argument("--worker-disk", type=float, help="GB a second that each worker writes; else the driver does")
    parser.add_argument("--shared-disk", type=float, default=inf, help="GB a second that all workers write together")
    parser.add_argument("--plot", type=Path, help="HTML file")
    parser.add_argument("--scratch", help="folder with room for one layer")
    return parser.parse_args()


# ---------------------------------------------------------------- what tasks cost


def measure(arguments: argparse.Namespace) -> Costs:
    """Time every task of a layer, in this process."""
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory(dir=arguments.scratch) as scratch:
        model, calibration = Path(scratch, "model"), Path(scratch, "calibration.arrow")
        # The last layer never gets a linear branch, so of two the first does.
        make_model(model, config_of(arguments.shape, num_hidden_layers=2))
        make_calibration(calibration, model, arguments.tokens // WINDOW, WINDOW)
        config = PruneConfig(model=str(model), output="none", method=arguments.method)
        worker = InProcess(config, model, torch.device("cpu")).worker
        return time_tasks(worker, torch.tensor(open_calibration(calibration).tokens))


def time_tasks(worker: LayerWorker, ids: Tensor) -> Costs:
    def timed(task: Task) -> tuple[float, Any]:
        start = time.perf_counter()
        value = task.run(worker)
        return time.perf_counter() - start, value

    _, states = timed(Embed(ids))
    check, _ = timed(CheckLayer(0))
    forward, _ = timed(Advance(0, states))
    # Nothing is carried from the second layer of a block, nor to the first one here.
    read, _ = timed(OpenForward(1))
    swept, _ = timed(Sweep(1, 0, states))
    profile, (remembered, _) = timed(CloseLayer(1, 1))
    architecture = worker.architecture
    plan = worker.method.plan(Target(architecture, 0.3), [remembered] * 2, align=8)
    _, (finished, _, report) = timed(Prune(0, states, plan[0], remembered, {}, propagates=False))
    return Costs(
        start=START_SECONDS,
        check=check,
        read=read,
        forward=forward,
        dense_statistics=max(0.0, swept - forward),
        profile=profile,
        statistics=max(0.0, report.seconds["statistics"] - forward),
        carried=bool(worker.method.carried_moments(architecture.dense_shape(0))),
        solve=report.seconds["solve"],
        states=states.nbytes,
        pruned=sum(tensor.nbytes for tensor in finished.written.values()),
    )


# ---------------------------------------------------------------- efficiency


@dataclass(frozen=True)
class Curve:
    """Efficiency by number of workers, of a model with so many layers pruned in blocks."""

    layers: int
    propagation: str
    losses: float
    efficiency: dict[int, float]
    hours: dict[int, float]


def curves_of(layers: int, costs: Costs, arguments: argparse.Namespace) -> Iterator[Curve]:
    measured = arguments.tokens // WINDOW
    samples = arguments.windows or measured
    costs = costs.on_samples(samples / measured)
    disks = {"disk": 1e9 * arguments.disk, "shared_disk": 1e9 * arguments.shared_disk}
    disks["worker_disk"] = arguments.worker_disk and 1e9 * arguments.worker_disk
    for name, length in {"1": 1, "4": 4, "full": layers}.items():
        run = Pass(layers, length, samples, arguments.micro_batch)
        alone = simulate(costs, Machines(1, **disks), run).seconds
        for losses in (0.0, arguments.losses):
            seeds = SEEDS if losses else SEEDS[:1]
            seconds = {
                workers: fmean(simulate(costs, Machines(workers, losses, **disks), run, seed).seconds for seed in seeds)
                for workers in arguments.workers
            }
            efficiency = {workers: alone / (workers * took) for workers, took in seconds.items()}
            yield Curve(layers, name, losses, efficiency, {workers: took / 3600 for workers, took in seconds.items()})


def print_table(curves: list[Curve]) -> None:
    numbers = list(curves[0].efficiency)
    table = Table("layers", "propagation", "lost an hour", *map(str, numbers), title="parallel efficiency (hours)")
    for curve in curves:
        cells = [f"{curve.efficiency[workers]:.2f} ({curve.hours[workers]:.1f})" for workers in numbers]
        table.add_row(str(curve.layers), curve.propagation, f"{curve.losses:.0%}", *cells)
    Console(width=160).print(table)


def plot(curves: list[Curve]) -> go.Figure:
    figure = make_subplots(
        cols=len(MODELS), subplot_titles=[f"{layers} layers" for layers in MODELS], shared_yaxes=True
    )
    colours = {"1": "#2a6fdb", "4": "#e08e0b", "full": "#b3261e"}
    for curve in curves:
        lost = f", {curve.losses:.0%} of workers lost an hour" if curve.losses else ""
        figure.add_scatter(
            x=list(curve.efficiency),
            y=list(curve.efficiency.values()),
            name=f"propagation {curve.propagation}{lost}",
            line={"color": colours[curve.propagation], "dash": "dot" if curve.losses else "solid"},
            showlegend=curve.layers == MODELS[0],
            col=MODELS.index(curve.layers) + 1,
            row=1,
        )
    figure.update_xaxes(type="log", title="workers", tickvals=list(curves[0].efficiency))
    figure.update_yaxes(range=[0, 1.05])
    figure.update_layout(title="Parallel efficiency, T(1) / (N T(N))", template="plotly_white")
    return figure


if __name__ == "__main__":
    main()
