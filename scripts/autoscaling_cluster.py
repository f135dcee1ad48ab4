"""A Ray cluster on this machine that Ray's own autoscaler resizes, with nodes that stand in for machines.

It is what ray.cluster_utils.AutoscalingCluster makes, which needs a file that Ray's wheel lacks, and which runs
``ray stop``: that ends every Ray process of the user. Here only what was started is ended.
"""

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

MIB = 2**20
STORE = 80 * MIB  # about the least that Ray accepts
HEAD, WORKER = "ray.head.default", "worker"  # the stand-in for a cloud knows the head by this name
# It tells nodes apart by ids that it gives them; this is the head's.
HEAD_ID = "f" * 51 + "00000"
SETTINGS = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    # As ray.init() has it, and not by whether there happens to be a token.
    "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
}
# What a cloud's machines would be set up with: nothing here, but each must be named.
SETUP = (
    "cluster_synced_files",
    "head_setup_commands",
    "head_start_ray_commands",
    "initialization_commands",
    "rsync_exclude",
    "rsync_filter",
    "setup_commands",
    "worker_setup_commands",
    "worker_start_ray_commands",
)
START_SECONDS, END_SECONDS = 60, 30


@contextmanager
def autoscaling_cluster(most: int, idle_seconds: float) -> Iterator[str]:
    """The address of a head without CPUs, to which the autoscaler adds up to ``most`` nodes of one CPU each.

    It removes a node that has been idle for so many seconds.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie deep in it
    address = f"{ray.util.get_node_ip_address()}:{free_port()}"
    (folder / "autoscaling.json").write_text(json.dumps(autoscaling(address, most, idle_seconds)))
    command = f"""{sys.executable} -m ray.scripts.scripts start --head --block --port {address.split(":")[1]}
        --num-cpus 0 --object-store-memory {STORE} --include-dashboard false --disable-usage-stats
        --temp-dir {folder} --autoscaling-config {folder / "autoscaling.json"}"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | SETTINGS
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # In a process group of its own, which the nodes are started in as well.
    head = subprocess.Popen(command.split(), env=environment, start_new_session=True, **quiet)
    try:
        wait_for(address, head)
        yield address
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def autoscaling(address: str, most: int, idle_seconds: float) -> dict:
    """The autoscaler's configuration."""
    provider = {
        # Named so, Ray does not look for that file.
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    nodes = {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        WORKER: {
            "resources": {"CPU": 1, "object_store_memory": STORE},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        },
    }
    return {
        "cluster_name": "elastic",
        "max_workers": most,
        "idle_timeout_minutes": idle_seconds / 60,
        "provider": provider,
        "available_node_types": nodes,
        "head_node_type": HEAD,
        **{name: [] for name in SETUP},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
    }


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        return bound.getsockname()[1]


def wait_for(address: str, head: subprocess.Popen) -> None:
    """See that the head listens at its address."""
    host, port = address.split(":")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and head.poll() is None:
        with suppress(OSError):
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"no Ray head at {address}: " + ("ended" if head.poll() is not None else "too slow"))
