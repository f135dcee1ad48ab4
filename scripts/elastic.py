"""How a run's workers come and go with Ray's autoscaler: from a head without CPUs to as many as it asks for, and back.

    python scripts/elastic.py --workers 1:4

A random model is pruned on a cluster whose nodes are processes of this machine, of one worker each. The seconds since
the run began are printed whenever the number of nodes or of workers changes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import ray
from autoscaling_cluster import autoscaling_cluster
from random_model import SHAPES, config_of, make_calibration, make_model
from rich.console import Console
from rich.table import Table

import distprune
from distprune.engine.telemetry.progress import Progress

LOOK_EVERY = 0.25  # seconds
LEAVE_SECONDS = 120
WINDOW, MICRO_BATCH = 64, 4  # tokens, windows


@dataclass(frozen=True)
class Moment:
    """Seconds since the run began; the nodes beside the head, and the workers that are up; what the run is at."""

    seconds: float
    nodes: int
    workers: int
    stage: str


class Watch(Progress):
    """Counts the workers that are up."""

    def __init__(self) -> None:
        self.workers, self.name = 0, "Starting"

    def stage(self, name, total, done=0):
        self.name = name

    def joined(self, worker):
        self.workers += 1

    def lost(self, worker, assignment):
        self.workers -= 1

    def left(self, worker):
        self.workers -= 1


class Timeline:
    """Moments at which something had changed."""

    def __init__(self, watch: Watch):
        self.moments: list[Moment] = []
        self._watch, self._began = watch, time.monotonic()

    def look(self) -> Moment:
        nodes = sum(node["Alive"] for node in ray.nodes()) - 1
        seen = Moment(round(time.monotonic() - self._began, 1), nodes, self._watch.workers, self._watch.name)
        if not self.moments or (nodes, seen.workers) != (self.moments[-1].nodes, self.moments[-1].workers):
            self.moments.append(seen)
        return seen

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, it is kept up to date."""
        ended = Event()

        def look_again_and_again() -> None:
            while not ended.wait(LOOK_EVERY):
                self.look()

        self.look()
        thread = Thread(target=look_again_and_again)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def main() -> None:
    arguments = parse_arguments()
    with TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        moments = run(folder, arguments)
    table = Table("seconds", "nodes", "workers", "stage")
    for moment in moments:
        table.add_row(f"{moment.seconds:.0f}", str(moment.nodes), str(moment.workers), moment.stage)
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1:4")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW} tokens, to calibrate on")
    parser.add_argument("--method", default="olica")
    parser.add_argument("--propagation", default="1")
    parser.add_argument("--idle", type=float, default=5, help="seconds until an idle node is removed")
    parser.add_argument("--folder", type=Path, help="where model, calibration, result and timeline are kept")
    return parser.parse_args()


def run(folder: Path, arguments: argparse.Namespace) -> list[Moment]:
    """Prune a random model; model, calibration.arrow, pruned and timeline.json lie in the folder then."""
    model, calibration = folder / "model", folder / "calibration.arrow"
    make_model(model, config_of(arguments.shape, num_hidden_layers=arguments.layers))
    make_calibration(calibration, model, arguments.windows, WINDOW)
    most = int(arguments.workers.split(":")[-1])
    with autoscaling_cluster(most, arguments.idle) as address, joined(address):
        watch = Watch()
        timeline = Timeline(watch)
        with timeline.kept():
            distprune.prune(
                str(model),
                folder / "pruned",
                sparsity=0.3,
                method=arguments.method,
                calibration=calibration,
                propagation=arguments.propagation,
                micro_batch=MICRO_BATCH,
                device="cpu",
                workers=arguments.workers,
                progress=watch,
            )
            watch.workers, watch.name = 0, "Done"
            wait_until_nodes_leave(timeline)
    (folder / "timeline.json").write_text(json.dumps([asdict(moment) for moment in timeline.moments]))
    return timeline.moments


@contextmanager
def joined(address: str) -> Iterator[None]:
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()  # before the cluster ends, or this process would end with it


def wait_until_nodes_leave(timeline: Timeline) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    while timeline.moments[-1].nodes and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)


if __name__ == "__main__":
    main()
