"""Is distprune right and fast on this machine's GPU? Four parts, each in a process and a time limit of its own.

    scripts/gpu_check.sh                                  # on a machine with a GPU
    python scripts/gpu_check.py --device cpu --out DIR    # the script itself, at a small size

Every part reports what it has found, even if it runs out of time or fails. At the end one table tells it all, and
OUT/gpu_check.json holds the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from gpu_check_report import Rows, print_rows
from rich.console import Console

HERE = Path(__file__).parent
console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Part:
    """A script, and the seconds that it may take."""

    name: str
    limit: int

    @property
    def script(self) -> Path:
        return HERE / f"gpu_check_{self.name}.py"


PARTS = [Part("correctness", 90), Part("layers", 100), Part("end_to_end", 320), Part("serving", 60)]


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": describe_machine(arguments.device), "parts": {}}
    for part in PARTS:
        if part.name in arguments.parts:
            found["parts"][part.name] = run(part, arguments)
            (arguments.out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(found["machine"])
    print_rows(console, found["parts"])
    if any(
        result["ended"] != "done" or not all(row["ok"] for row in result["rows"]) for result in found["parts"].values()
    ):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: everything at a small size")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of logs, results and models")
    parser.add_argument("--layers", type=int, help="of the 8B-shaped model, for a quicker look")
    parser.add_argument("--limit", type=float, default=1.0, help="multiplies the time limits of all parts")
    return parser.parse_args()


def run(part: Part, arguments: argparse.Namespace) -> dict:
    """What a part found, how it ended and after how many seconds."""
    rows, log = (arguments.out / f"{part.name}{suffix}" for suffix in (".jsonl", ".log"))
    rows.unlink(missing_ok=True)
    command = [sys.executable, part.script, "--device", arguments.device, "--out", arguments.out, "--rows", rows]
    command += ["--layers", str(arguments.layers)] if arguments.layers else []
    paths = [str(HERE.parent), str(HERE.parent / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    start, ended = time.perf_counter(), "done"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            if status := process.wait(part.limit * arguments.limit):
                ended = f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = "ran out of time"
        finally:
            end_session(process.pid)
    seconds = time.perf_counter() - start
    console.print(f"{part.name}: {ended}, {seconds:.0f} s")
    if ended != "done":
        console.print("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
    return {"ended": ended, "seconds": round(seconds, 1), "rows": Rows.read(rows)}


def end_session(leader: int) -> None:
    """End a process and all that it has started, Ray's processes too: they would disturb the next part."""
    of_session = [process for process in psutil.process_iter() if session_of(process) == leader]
    for process in of_session:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(of_session, timeout=10)


def session_of(process: psutil.Process) -> int | None:
    with suppress(OSError):
        return os.getsid(process.pid)
    return None


def describe_machine(device: str) -> str:
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cpu":
        return f"CPU, {versions}"
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {versions}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    main()
