"""A head node on this machine, as an operator starts it, to which jobs are submitted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
from ray.job_submission import JobDetails, JobSubmissionClient

MINUTES = 180  # seconds that anything here may take, on a machine that does other work


@dataclass(frozen=True)
class Head:
    """The head node: its jobs, where other nodes join it, and where it serves its metrics."""

    jobs: JobSubmissionClient
    address: str
    metrics: str

    def ended(self, job: str) -> JobDetails:
        """A job when it has ended."""
        return wait_for(lambda: self.jobs.get_job_info(job), lambda info: info.status.is_terminal())


def wait_for(look: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    """What is seen, as soon as something holds of it."""
    deadline, seen = time.monotonic() + MINUTES, None
    while time.monotonic() < deadline:
        if holds(seen := look()):
            return seen
        time.sleep(0.2)
    raise AssertionError(f"still not after {MINUTES} s: {seen}")


@contextmanager
def running_head() -> Iterator[Head]:
    """Inside, there is one, with four CPUs in Ray's books; metrics are reported twice a second."""
    gcs, dashboard, agent, metrics = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ray-")  # a job joins the Ray that was last started in its head's
    command = f"""{sys.executable} -m ray.scripts.scripts start --head --block --num-cpus 4 --disable-usage-stats
        --port {gcs} --dashboard-port {dashboard} --dashboard-agent-listen-port {agent}
        --metrics-export-port {metrics} --include-dashboard true --temp-dir {folder}"""
    options = ["--system-config", json.dumps({"metrics_report_interval_ms": 500})]
    process = subprocess.Popen([*command.split(), *options], env=environment(), stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        client = wait_for(lambda: connect(address), lambda client: client is not None)
        yield Head(client, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{metrics}/metrics")
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joining_node(head: Head, cpus: int) -> Iterator[Callable[[], None]]:
    """Inside, the head has another node. Yields what makes all its processes vanish, as when its power is cut."""
    agent, metrics, runtime = free_ports(3)
    command = f"""{sys.executable} -m ray.scripts.scripts start --block --address {head.address} --num-cpus {cpus}
        --disable-usage-stats --dashboard-agent-listen-port {agent} --metrics-export-port {metrics}
        --runtime-env-agent-port {runtime}"""
    process = subprocess.Popen(command.split(), env=environment(), stdout=subprocess.DEVNULL)

    def vanish() -> None:
        with suppress(psutil.NoSuchProcess):
            for each in [*(found := psutil.Process(process.pid)).children(recursive=True), found]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)

    try:
        yield vanish
    finally:
        vanish()
        process.wait(60)


def environment() -> dict[str, str]:
    # A job that is stopped is killed after three seconds, unless it is given more; and a node that is, after thirty.
    found = os.environ | {"RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    found.pop("RAY_ADDRESS", None)
    return found


def free_ports(count: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(count)]
    for each in with_ports:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_ports]
    for each in with_ports:
        each.close()
    return ports


def connect(address: str) -> JobSubmissionClient | None:
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError):
        return None
