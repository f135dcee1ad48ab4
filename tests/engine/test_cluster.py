"""How many workers a cluster gets, and what becomes of an address where no cluster is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import ray
from ray.exceptions import AuthenticationError

from distprune import InputError
from distprune.config import PruneConfig
from distprune.engine.run.signals import sigterm_interrupts
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.scheduler.ray_cluster import WorkerPlan, connected, plan_workers
from distprune.engine.telemetry.progress import Progress

CPU_NODE, GPU_NODE = {"CPU": 8.0, "memory": 1e9}, {"CPU": 16.0, "GPU": 4.0}


class Holder:
    """Takes up room."""

    def ready(self) -> None:
        pass


def plan(nodes, layers=80, **options) -> WorkerPlan:
    return plan_workers(PruneConfig(model="m", output="o", **options), nodes, layers)


def test_there_is_one_worker_a_cpu_where_there_are_no_gpus():
    assert plan([CPU_NODE]) == WorkerPlan(8, "cpu", 1, 0)


def test_there_is_one_worker_a_gpu_where_there_are_any():
    assert plan([CPU_NODE, GPU_NODE, GPU_NODE]) == WorkerPlan(8, "cuda", 1, 1)


def test_the_device_asked_for_counts_more_than_what_the_cluster_has():
    assert plan([GPU_NODE], device="cpu") == WorkerPlan(16, "cpu", 1, 0)


def test_threads_are_cpus_and_limit_the_workers():
    assert plan([CPU_NODE], threads_per_worker=3) == WorkerPlan(2, "cpu", 3, 0)


def test_cpus_limit_the_workers_of_a_node_with_more_gpus():
    assert plan([{"CPU": 4.0, "GPU": 8.0}], threads_per_worker=2) == WorkerPlan(2, "cuda", 2, 1)


def test_a_worker_is_never_spread_over_nodes():
    assert plan([{"CPU": 3.0}, {"CPU": 3.0}], threads_per_worker=2).count == 2


def test_ten_workers_of_a_tenth_fit_on_one_gpu():
    assert plan([{"CPU": 16.0, "GPU": 1.0}], gpus_per_worker=0.1) == WorkerPlan(10, "cuda", 1, 0.1)


def test_gpus_can_be_asked_for_by_workers_on_the_cpu():
    assert plan([GPU_NODE], device="cpu", gpus_per_worker=2) == WorkerPlan(2, "cpu", 1, 2)


def test_the_number_of_workers_asked_for_counts():
    assert plan([GPU_NODE], workers=3).count == 3
    assert plan([CPU_NODE], workers=100).count == 80


def test_there_are_no_more_workers_than_layers():
    assert plan([GPU_NODE] * 4, layers=5).count == 5


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        ([CPU_NODE], {"device": "cuda"}),
        ([CPU_NODE, CPU_NODE], {"threads_per_worker": 9}),
        ([GPU_NODE], {"gpus_per_worker": 5}),
        ([], {}),
    ],
)
def test_a_worker_that_fits_nowhere_is_bad_input(nodes, options):
    with pytest.raises(InputError, match=r"no worker fits on any node .*: each asks for .* --device cpu"):
        plan(nodes, **options)


def test_a_range_of_workers_is_for_clusters_that_grow():
    assert plan([CPU_NODE], workers="2:20") == WorkerPlan(20, "cpu", 1, 0, least=2)
    assert plan([], workers="1:4").count == 4
    assert plan([CPU_NODE], workers="8:200", layers=5) == WorkerPlan(5, "cpu", 1, 0, least=5)


@pytest.mark.slow
def test_a_run_waits_for_the_fewest_workers_and_takes_those_that_join(run, new_workers, monkeypatch):
    """Of 3 workers the cluster has room for 2 at first; when the run has begun, room for the third is freed."""
    free = ray.available_resources()["CPU"]
    holder = ray.remote(num_cpus=free - 2)(Holder).remote()
    ray.get(holder.ready.remote())
    employed, pools = [], []
    employ, init = WorkerPool._employ, WorkerPool.__init__

    def note_and_employ(self, worker):
        employed.append(worker)
        employ(self, worker)

    def note_and_init(self, *arguments):
        pools.append(self)
        init(self, *arguments)

    class Frees(Progress):
        def stage(self, name, total, done=0):
            if name == "Pruning":
                ray.kill(holder)
                ray.wait(list(pools[0]._starting), timeout=120)  # for another to be up

    monkeypatch.setattr(WorkerPool, "_employ", note_and_employ)
    monkeypatch.setattr(WorkerPool, "__init__", note_and_init)
    _, record = run(workers="2:3", propagation=1, progress=Frees())
    assert record.workers == len(set(employed)) == 3


def free_cpus() -> float:
    """Of the cluster, when those of workers that were just killed are free again."""
    free, since = None, time.monotonic()
    while not free or time.monotonic() < since + 2:
        if (now := ray.available_resources().get("CPU", 0)) != free:
            free, since = now, time.monotonic()
        time.sleep(0.1)
    return free


def test_a_run_says_that_it_waits_while_others_have_the_cluster(run, new_workers, monkeypatch):
    holder = ray.remote(num_cpus=free_cpus())(Holder).remote()
    ray.get(holder.ready.remote())
    notes = []

    class Frees(Progress):
        def note(self, text):
            notes.append(text)
            ray.kill(holder)

    monkeypatch.setattr("distprune.engine.driver.PATIENCE", 0.5)
    _, record = run(progress=Frees())
    assert notes == ["Waiting until the Ray cluster has 1 CPUs and 0 GPUs free for a worker ..."]
    assert record.workers == 1


def test_workers_take_the_gpus_that_they_ask_for(run, new_workers, calls):
    free = []

    class Watch(Progress):
        def stage(self, name, total, done=0):
            if name == "Pruning":
                free.append(ray.available_resources().get("GPU", 0))

    _, record = run(workers=2, gpus_per_worker=1, progress=Watch())
    assert free == [0]
    assert (record.device, record.workers) == ("cpu", 2)


def test_cuda_without_a_gpu_is_bad_input(run, new_workers):
    with pytest.raises(InputError, match=r"device cuda: PyTorch finds no usable GPU on node .* --device cpu"):
        run(device="cuda")


def test_a_closed_port_is_bad_input_within_seconds(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        start = time.monotonic()
        with (
            pytest.raises(InputError, match=rf"no Ray cluster answers at {address}: .*refused\. Check --address"),
            connected(PruneConfig(model="m", output="o", address=address)),
        ):
            pass
        assert time.monotonic() - start < 5


def test_sigterm_interrupts_also_while_ray_shuts_down(monkeypatch):
    """Ray's own handler would end the process with a status of its own."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)))
    monkeypatch.setattr(ray, "shutdown", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts(), connected(PruneConfig(model="m", output="o")):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_interrupts_also_while_ray_starts(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(1))  # as Ray's own handler does
    with pytest.raises(KeyboardInterrupt), connected(PruneConfig(model="m", output="o")):
        pass


LEAVES_RAY = """
import os, signal, sys, threading, time
import ray
from distprune.config import PruneConfig
from distprune.engine.scheduler.ray_cluster import connected
from distprune.engine.run.signals import sigterm_interrupts

def interrupt_halfway():
    while ray.is_initialized():
        time.sleep(0.001)
    os.kill(os.getpid(), int(sys.argv[2]))

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with sigterm_interrupts(), connected(PruneConfig(model="m", output="o", address=sys.argv[1])):
        held = ray.put("something")
        threading.Thread(target=interrupt_halfway).start()
except KeyboardInterrupt:
    del held
    sys.exit(130)
"""


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interruption_halfway_through_leaving_ray_does_not_end_the_process(run, sent):
    """Ray would end it, at the next object reference that dies, where it had not shut down altogether."""
    address = ray.get_runtime_context().gcs_address
    ended = subprocess.run([sys.executable, "-c", LEAVES_RAY, address, str(int(sent))], check=False)
    assert ended.returncode == 130


ENDS_RAY = """
import os, signal, sys, threading
from distprune.config import PruneConfig
from distprune.engine.scheduler.ray_cluster import connected
from distprune.engine.run.signals import sigterm_interrupts

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with sigterm_interrupts(), connected(PruneConfig(model="m", output="o", workers=1, address="local")):
        threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGTERM)).start()
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("seconds", [pytest.param(0.1, marks=pytest.mark.slow), 0.6])
def test_sigterm_waits_until_a_local_ray_has_ended(seconds):
    """Which takes more than a second, in most of which Ray has reset the handler."""
    ended = subprocess.run([sys.executable, "-c", ENDS_RAY, str(seconds)], check=False)
    assert ended.returncode == 130


def test_an_address_that_is_none_is_bad_input(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with (
        pytest.raises(InputError, match=r"no Ray cluster answers at nonsense: .*Check --address and RAY_ADDRESS"),
        connected(PruneConfig(model="m", output="o")),
    ):
        pass


def test_a_cluster_that_asks_for_a_token_says_how_to_give_it(monkeypatch):
    def refuse(**options):
        raise ConnectionError("Failed to connect") from AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(
            InputError, match=r"no Ray cluster answers at auto: it asks for a token\. Set RAY_AUTH_MODE=token"
        ),
        connected(PruneConfig(model="m", output="o", address="auto")),
    ):
        pass
