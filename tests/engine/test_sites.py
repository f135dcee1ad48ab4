"""Workers stay only where their device holds what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from distprune import InputError
from distprune.engine.scheduler.ray_cluster import WorkerPlan
from distprune.engine.scheduler.worker_registry import WorkerRegistry
from distprune.engine.telemetry.progress import Progress
from distprune.engine.scheduler.nodes import GIB, Requirements, Node, Nodes

SMALL = Node("alpha", "a1", "NVIDIA L4", 24 * GIB, 64 * GIB)
LARGE = Node("beta", "b2", "NVIDIA H100", 80 * GIB, 512 * GIB)
NEEDS = Requirements(device=40 * GIB, resident=20 * GIB)


class Machines:
    """Stands in for Ray: says where each worker that is asked for must not be."""

    def __init__(self, room: int):
        self.asked: list[set[str]] = []
        self.stopped: list[int] = []
        self._room = room

    def start_worker(self, number: int, avoided) -> int:
        self.asked.append(set(avoided))
        return number

    def room(self, avoided) -> int:
        return self._room

    def holds_results_of(self, site) -> bool:
        return False

    def stop(self, workers, starting) -> None:
        self.stopped += workers


class Notes(Progress):
    def __init__(self):
        self.notes, self.joined_at = [], []

    def note(self, text):
        self.notes.append(text)

    def joined(self, worker):
        self.joined_at.append(str(worker))


def test_a_worker_on_a_small_gpu_goes_and_another_is_asked_for_elsewhere():
    machines, notes = Machines(room=2), Notes()
    registry = WorkerRegistry(machines, Nodes(NEEDS), notes)
    first, second = registry.ask(), registry.ask()
    assert registry.admits(first, LARGE) and not registry.admits(second, SMALL)
    third = registry.replace()
    assert registry.admits(third, LARGE)
    assert (machines.asked, machines.stopped) == ([set(), set(), {"a1"}], [second])
    assert (registry.workers, notes.joined_at) == ([first, third], ["beta/0", "beta/2"])
    assert notes.notes == ["alpha is passed over: NVIDIA L4 of 24.0 GiB, and a worker needs 40.0 GiB"]


def test_no_other_is_asked_for_where_there_is_no_room_for_it():
    machines = Machines(room=1)
    registry = WorkerRegistry(machines, Nodes(NEEDS), Progress())
    first, second = registry.ask(), registry.ask()
    assert registry.admits(first, LARGE) and not registry.admits(second, SMALL)
    assert registry.replace() is None
    assert registry.workers == [first]


def test_where_every_gpu_is_too_small_the_input_is_bad():
    registry = WorkerRegistry(Machines(room=0), Nodes(NEEDS), Progress())
    assert not registry.admits(registry.ask(), SMALL)
    with pytest.raises(InputError, match=r"no GPU .* 40\.0 GiB .*: alpha: NVIDIA L4 of 24\.0 GiB.*--micro-batch"):
        registry.replace()


def test_workers_that_share_a_gpu_need_it_to_be_as_much_larger():
    def needed(gpus: float) -> Requirements:
        return WorkerPlan(1, "cuda", 1, gpus).needing(NEEDS).needs

    assert needed(1) == needed(2) == needed(0) == NEEDS
    assert needed(0.5) == Requirements(80 * GIB, 20 * GIB)
    assert Nodes(needed(0.5)).suits(LARGE) and not Nodes(needed(0.25)).suits(LARGE)


def test_a_node_without_gpus_suits_and_is_warned_of_once_it_is_crowded():
    node, notes = replace(SMALL, device_memory=None), Notes()
    registry = WorkerRegistry(Machines(room=9), Nodes(NEEDS), notes)
    for _ in range(5):
        assert registry.admits(registry.ask(), node)
    assert len(notes.notes) == 1
    assert notes.notes[0].startswith("alpha: 4 workers may need 80.0 GiB of memory, and it has 64.0 GiB.")


SMALL_AND_LARGE = """
import json, pathlib, sys
import ray
from ray.cluster_utils import Cluster
from dataclasses import replace
from distprune import InputError
from distprune.config import PruneConfig
from distprune.engine.scheduler import runtime
from distprune.engine import Requirements, prune
from distprune.engine.telemetry.progress import Progress

model, calibration, output = sys.argv[1:]
# Ray fills the node first that the driver is on.
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 8, "labels": {"gigabytes": "24"}})
cluster.add_node(num_cpus=2, num_gpus=2, labels={"gigabytes": "80"})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
Plain = runtime.Worker.__ray_actor_class__

@ray.remote
class Sized(Plain):
    # Its GPU exists in Ray's books alone; the node's label tells its size.
    @ray.method(max_task_retries=-1)
    def ready(self):
        site = Plain.ready(self)
        labels = next(node["Labels"] for node in ray.nodes() if node["NodeID"] == site.node_id)
        return replace(site, device="GPU", device_memory=int(labels["gigabytes"]) * 10**9)

runtime.Worker = Sized
sent_away, up, errors = [], [], []

class Looks(Progress):
    def left(self, worker):
        sent_away.append(worker.number)
    def joined(self, worker):
        up.append(worker.number)

def run(gigabytes, **options):
    config = PruneConfig(model=model, output=f"{output}/pruned", calibration=calibration, method="olica", device="cpu",
                         sparsity=0.3, max_shard_size=60_000, micro_batch=3, gpus_per_worker=1, **options)
    prune(config, Looks(), lambda *_: Requirements(device=gigabytes * 10**9))

try:
    run(90, workers=1)
except InputError as error:
    errors.append(str(error))
away_of_all = len(sent_away)
sent_away.clear()
run(40, workers="2:2")
pathlib.Path(output, "seen.json").write_text(json.dumps([away_of_all, errors, sent_away, up]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_on_a_cluster_of_small_and_large_gpus_the_large_do_the_work(
    run, dense_path, calibration_path, digests, tmp_path
):
    arguments = map(str, (dense_path, calibration_path, tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", SMALL_AND_LARGE, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    away_of_all, errors, sent_away, up = json.loads((tmp_path / "seen.json").read_text())
    # One worker, sent from the node where it was to the other one, where the GPUs are too small as well.
    assert away_of_all == 2 and len(errors) == 1
    for told in ("has the 83.8 GiB that", "GPU of 22.4 GiB", "GPU of 74.5 GiB"):
        assert told in errors[0]
    # Two on the small GPUs, and two in their place.
    assert (sorted(sent_away), sorted(up)) == ([0, 1], [2, 3])
    assert digests(tmp_path / "pruned") == digests(run(sparsity=0.3, max_shard_size=60_000)[0])
    assert sorted(os.listdir(tmp_path)) == ["pruned", "seen.json"]
