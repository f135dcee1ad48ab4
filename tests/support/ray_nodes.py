"""A Ray cluster as an operator starts it: one `ray start` a node, here all of them on this machine."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from job_cluster import wait_for

PATIENCE = 120  # seconds that anything may take, on a machine that does other work


class RayNodes:
    """Nodes that know each other by a token of their own, and join the first one."""

    def __init__(self, dashboard: bool = False):
        self._folder = tempfile.mkdtemp(prefix="ray-")
        self.nodes: list[subprocess.Popen[bytes]] = []
        gcs, self.dashboard_port = free_ports(2)
        self.address = f"127.0.0.1:{gcs}"
        self.environment = os.environ | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self._options = ["--head", "--node-ip-address", "127.0.0.1", "--port", str(gcs)]
        self._options += ["--include-dashboard", str(dashboard).lower(), "--dashboard-port", str(self.dashboard_port)]

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            self.kill(node)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, cpus: int) -> subprocess.Popen[bytes]:
        """Start the head, or another node, and wait until it has joined."""
        options = ["--address", self.address] if self.nodes else self._options
        (agent,) = free_ports(1)
        # As on machines of their own: nodes with one folder would unpack a job's files over each other's.
        folder = os.path.join(self._folder, str(len(self.nodes)))
        options += ["--dashboard-agent-listen-port", str(agent), "--num-cpus", str(cpus), "--temp-dir", folder]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options]
        self.nodes.append(subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL))
        wait_for(lambda: self.status().count("\n 1 node_"), lambda count: count == len(self.nodes))
        return self.nodes[-1]

    def status(self) -> str:
        return self.run("ray", "status", "--address", self.address).stdout

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command that has the cluster's token. Standard error is part of the output."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, env=self.environment | environment, timeout=PATIENCE, check=False, **streams)

    @staticmethod
    def kill(node: subprocess.Popen[bytes]) -> None:
        """End a node with all that runs on it, as a power cut would."""
        if node.poll() is not None:
            return
        started = psutil.Process(node.pid)
        for process in [started, *started.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        node.wait()


def free_ports(count: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(count)]
    for each in with_ports:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_ports]
    for each in with_ports:
        each.close()
    return ports
