"""The memory that pruning a large model takes: random weights in the shape of a 7B, 70B or 405B model, and every
process's peak.

    python scripts/scale.py --shape 7b
    python scripts/scale.py --shape 70b --layers 2
    python scripts/scale.py --shape 405b --layers 2 --limit 24

Makes the model and a calibration set in a scratch folder, runs `distprune prune` on them with one worker, and watches
the resident memory of the driver and of every process below it, Ray's included. Resident memory counts what processes
share once for each of them; the proportional figure beside it counts it once. Ends with status 1 above --limit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from random_model import SHAPES, config_of, make_calibration, make_model
from rich.console import Console
from rich.table import Table

from distprune.engine import load_record

WINDOW = 128
console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    arguments = parse_arguments()
    with TemporaryDirectory(dir=arguments.scratch) as scratch:
        model, calibration, output = (Path(scratch, name) for name in ("model", "calibration.arrow", "pruned"))
        changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
        make_model(model, config_of(arguments.shape, **changes))
        make_calibration(calibration, model, arguments.tokens // WINDOW, WINDOW)
        size = sum(file.stat().st_size for file in model.iterdir())
        console.print(f"{arguments.shape}: {size / 1e9:.1f} GB of weights, {arguments.tokens} calibration tokens")
        peaks = watch(prune_command(model, calibration, output, arguments), arguments.every)
        report(peaks, output)
    if peaks.resident > arguments.limit * 1e9:
        sys.exit(f"above the limit of {arguments.limit:g} GB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--method", default="olica")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--propagation", default="full")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2, help="of the worker")
    parser.add_argument("--limit", type=float, default=8.0, help="GB of resident memory of all processes together")
    parser.add_argument("--scratch", help="folder with room for the model and twice the pruned one")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two looks at the memory")
    return parser.parse_args()


def prune_command(model: Path, calibration: Path, output: Path, arguments: argparse.Namespace) -> list[str]:
    options = {
        "--output": output,
        "--calibration": calibration,
        "--method": arguments.method,
        "--sparsity": arguments.sparsity,
        "--propagation": arguments.propagation,
        "--workers": 1,
        "--threads-per-worker": arguments.threads,
        "--max-shard-size": 10**9,
    }
    given = [str(part) for option in options.items() for part in option]
    return [sys.executable, "-m", "distprune.cli", "prune", str(model), *given]


# ---------------------------------------------------------------- its memory


class Peaks:
    """The most that all processes held together, and each kind of process for itself; in bytes."""

    def __init__(self):
        self.resident, self.proportional = 0, 0
        self.by_kind: Counter[str] = Counter()

    def note(self, resident: Counter[str], proportional: int) -> None:
        self.resident = max(self.resident, resident.total())
        self.proportional = max(self.proportional, proportional)
        self.by_kind |= resident


def watch(command: list[str], every: float) -> Peaks:
    """Run a command to its end, and look at the memory of its processes all the time."""
    peaks = Peaks()
    with subprocess.Popen(command) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peaks.note(*memory(root))
            time.sleep(every)
    if process.returncode:
        sys.exit(process.returncode)
    return peaks


def memory(root: psutil.Process) -> tuple[Counter[str], int]:
    """Resident bytes by kind of process, and the proportional bytes of all."""
    resident, proportional = Counter(), 0
    for process in family_tree(root):
        try:
            kind, held = kind_of(process, root), process.memory_full_info()
        except psutil.Error:
            continue  # it has just ended
        resident[kind] += held.rss
        proportional += held.pss
    return resident, proportional


def family_tree(root: psutil.Process) -> Iterator[psutil.Process]:
    try:
        yield from (root, *root.children(recursive=True))
    except psutil.Error:
        return


def kind_of(process: psutil.Process, root: psutil.Process) -> str:
    if process == root:
        return "driver"
    title = " ".join(process.cmdline()[:1])
    if title.startswith("ray::Worker"):
        return "worker"
    return "idle workers" if title == "ray::IDLE" else "Ray's own"


def report(peaks: Peaks, output: Path) -> None:
    table = Table("process", "peak resident memory")
    for kind, held in peaks.by_kind.items():
        table.add_row(kind, f"{held / 1e9:.2f} GB")
    table.add_row("all at once", f"{peaks.resident / 1e9:.2f} GB")
    table.add_row("all at once, what is shared counted once", f"{peaks.proportional / 1e9:.2f} GB")
    console.print(table)
    record = load_record(output)
    console.print(f"removed: {record.decoder_sparsity:.2%} of the decoder layers' parameters")
    console.print("stages: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record.seconds.items()))
    steps = record.layers[-1].seconds
    console.print("last layer: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in steps.items()))


if __name__ == "__main__":
    main()
