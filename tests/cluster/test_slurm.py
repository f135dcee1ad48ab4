"""The batch script for Slurm, with `srun` and `scontrol` that do everything on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from slurm_stubs import write_stubs

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"

# Stands in for Ray: two nodes are there at once.
RAY = """#!/usr/bin/env bash
case $1 in
    start) exec sleep 600 ;;
    status) printf ' 1 node_a\\n 1 node_b\\n' ;;
esac
"""
# Ends with the status that it is given, or, given none, is interrupted as distprune is.
DISTPRUNE = """#!/usr/bin/env bash
trap 'sleep 0.5; exit 130' TERM
echo "joins $RAY_ADDRESS" "$@"
[[ -n ${1-} ]] && exit "$1"
for ((;;)); do sleep 0.1; done
"""


class Allocation:
    """Two nodes that Slurm has given a job."""

    def __init__(self, folder: Path, **stubs: str):
        self.requeued, self.job = folder / "requeued", str(os.getpid())
        self.tmp = Path("/tmp", f"slurm-{self.job}")  # a path that Ray's sockets fit into
        self.tmp.mkdir()
        path = [str(write_stubs(folder / "bin", **stubs)), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = os.environ | {
            "PATH": os.pathsep.join(path),
            "REQUEUED": str(self.requeued),
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NODELIST": "first,second",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_TMPDIR": str(self.tmp),
        }
        self.environment.pop("RAY_ADDRESS", None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = ["bash", str(SCRIPT), *words]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True)

    def times_requeued(self) -> int:
        return self.requeued.read_text().splitlines().count(self.job) if self.requeued.exists() else 0

    def left_behind(self) -> list[str]:
        """The commands of processes that still use the job's folder."""
        commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        return [command for command in commands if str(self.tmp) in command]


@pytest.fixture
def allocate(tmp_path) -> Iterator[Callable[..., Allocation]]:
    made: list[Allocation] = []

    def make(**stubs: str) -> Allocation:
        made.append(Allocation(tmp_path, **stubs))
        return made[-1]

    yield make
    for allocation in made:
        shutil.rmtree(allocation.tmp, ignore_errors=True)


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_exit_status_is_that_of_distprune(allocate, status):
    allocation = allocate(ray=RAY, distprune=DISTPRUNE)
    process = allocation.start(str(status))
    output, _ = process.communicate(timeout=60)
    assert re.fullmatch(rf"joins [\d.]+:\d+ {status}\n", output)
    assert process.returncode == status
    assert allocation.times_requeued() == 0
    assert not allocation.left_behind()


@pytest.mark.parametrize(
    ("distprune", "status"), [(DISTPRUNE, 130), (DISTPRUNE.replace("trap", "# trap"), 143)], ids=["running", "starting"]
)
def test_sigterm_interrupts_distprune_and_puts_the_job_back_into_the_queue(allocate, distprune, status):
    allocation = allocate(ray=RAY, distprune=distprune)
    process = allocation.start()
    assert process.stdout.readline().startswith("joins")
    process.terminate()
    assert process.wait(60) == status
    assert allocation.times_requeued() == 1


def test_sigterm_before_ray_is_up_puts_the_job_back_into_the_queue(allocate):
    allocation = allocate(ray=RAY.replace("printf", "touch $SLURM_TMPDIR/asked; true"), distprune=DISTPRUNE)
    process = allocation.start()
    while not (allocation.tmp / "asked").exists():
        time.sleep(0.05)
    process.terminate()
    assert process.communicate(timeout=60) == ("", None)
    assert process.returncode == 130
    assert allocation.times_requeued() == 1


def test_a_head_that_does_not_start_fails_the_job(allocate):
    allocation = allocate(ray="#!/usr/bin/env bash\nexit 1\n", distprune=DISTPRUNE)
    process = allocation.start("0")
    assert process.communicate(timeout=60) == ("", None)
    assert process.returncode == 1
    assert allocation.times_requeued() == 0


@pytest.mark.slow
def test_the_requeued_job_resumes_and_gives_the_same_bytes(allocate, run, save_model, calibrate, digests, tmp_path):
    """With Ray and distprune as they are: two Ray nodes of one CPU each, of which each has a worker."""
    model, output = save_model(num_hidden_layers=24), tmp_path / "pruned"
    allocation = allocate()
    words = ["prune", str(model), "--output", str(output), "--calibration", str(calibrate(model)), "--sparsity", "0.3"]
    words += ["--method", "olica", "--device", "cpu", "--micro-batch", "3", "--log-format", "json"]

    process, calls = allocation.start(*words), 0
    for line in process.stdout:
        calls += '"call ended"' in line
        if calls > 30:
            process.send_signal(signal.SIGTERM)
            break
    output_left, _ = process.communicate(timeout=180)
    assert process.returncode == 130, output_left
    assert allocation.times_requeued() == 1
    assert not output.exists()
    assert not allocation.left_behind()

    process = allocation.start(*words)
    output_left, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output_left
    assert allocation.times_requeued() == 1
    assert not allocation.left_behind()
    log = (output / "distprune_log.jsonl").read_text()
    assert log.index('"interrupted"') < log.index('"run resumed"')
    assert digests(output) == digests(run(model, sparsity=0.3)[0])
