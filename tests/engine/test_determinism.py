"""The checkpoint depends on model, calibration set and configuration: not on workers, nodes, or who was lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from interruptions import first_of

from distprune.engine.scheduler import pool
from distprune.errors import WorkersLost


@pytest.fixture(scope="session")
def digests(digests):
    """The model card is the same too."""
    return lambda folder: digests(folder) | {"README.md": (folder / "README.md").read_text()}


@pytest.fixture(scope="module")
def by_one_worker(run, pruned, digests):
    """The digests of what one worker makes, for every propagation."""
    options = {"sparsity": 0.3, "max_shard_size": 60_000}
    made = {"full": pruned[0]} | {length: run(propagation=length, **options)[0] for length in (1, 2)}
    return {propagation: digests(folder) for propagation, folder in made.items()}


def test_propagation_changes_the_result_which_has_several_shards(by_one_worker):
    results = list(by_one_worker.values())
    assert all(len(result) > 4 for result in results)
    shards = [{name: digest for name, digest in result.items() if name.endswith(".safetensors")} for result in results]
    assert shards[0] != shards[1] != shards[2] != shards[0]


@pytest.mark.parametrize(("workers", "propagation"), [(2, 1), (3, 1), (2, 2), (3, 2), (2, "full"), (3, "full")])
def test_any_number_of_workers_gives_the_same_bytes(by_one_worker, run, calls, digests, workers, propagation):
    folder, record = run(sparsity=0.3, max_shard_size=60_000, workers=workers, propagation=propagation)
    assert digests(folder) == by_one_worker[propagation]
    assert len({worker for kind, worker in calls if kind == "prune"}) == workers == record.workers


@pytest.mark.parametrize("method", ["oops", "curvature"])
def test_other_methods_give_the_same_bytes_by_any_number_of_workers(run, digests, method):
    options = {"method": method, "sparsity": 0.3, "propagation": 1}
    made = [digests(run(workers=workers, **options)[0]) for workers in (1, 2, 3)]
    assert made[0] == made[1] == made[2]


def test_rounds_give_the_same_bytes_by_any_number_of_workers(run, digests):
    options = {"method": "curvature", "sparsity": 0.3, "rounds": 2}
    made = [digests(run(workers=workers, **options)[0]) for workers in (1, 2)]
    assert made[0] == made[1] != digests(run(**options | {"rounds": 1})[0])


def test_a_search_gives_the_same_bytes_by_any_number_of_workers(run, digests):
    options = {"method": "curvature", "sparsity": 0.5, "search": {"samples": 2, "steps": 1}}
    made = [digests(run(workers=workers, **options)[0]) for workers in (1, 2)]
    assert made[0] == made[1] != digests(run(**options | {"search": None})[0])


def test_experts_in_chunks_give_the_same_bytes_by_any_number_of_workers(run, save_mixture, digests, calls):
    """Whichever workers share a layer's experts, whose outputs the next layer is pruned on."""
    model = save_mixture("qwen3_moe")
    options = {"method": "curvature", "sparsity": 0.3, "propagation": "full", "experts_at_once": 2}
    made = [digests(run(model, workers=workers, **options)[0]) for workers in (1, 2)]
    assert made[0] == made[1]
    assert len({worker for kind, worker in calls if kind == "prune_experts"}) == 2


DISTILLED = {"sparsity": 0.3, "distill": {"learning_rate": 1e-3, "epochs": 2, "batch": 2}}


@pytest.fixture(scope="module")
def distilled_by_one_worker(run, digests):
    folder, record = run(**DISTILLED)
    assert any(layer.distillation.kept for layer in record.layers)
    return digests(folder)


@pytest.mark.parametrize("workers", [2, 3])
def test_distillation_gives_the_same_bytes_by_any_number_of_workers(
    distilled_by_one_worker, run, calls, digests, workers
):
    folder, _ = run(workers=workers, **DISTILLED)
    assert digests(folder) == distilled_by_one_worker
    assert len({worker for kind, worker in calls if kind == "distill"}) == workers


@pytest.mark.slow
def test_losing_workers_in_the_middle_of_calls_gives_the_same_bytes(by_one_worker, run, lose, digests):
    chosen = {("close_layer", 1), ("prune", 2)}
    lost = lose(first_of(chosen))
    folder, _ = run(sparsity=0.3, max_shard_size=60_000, workers=2)
    assert [call.losses for call in lost] == [1, 1]
    assert digests(folder) == by_one_worker["full"]


def test_losing_workers_in_the_gradient_pass_gives_the_same_bytes(run, lose, digests):
    options = {"method": "llm-pruner", "sparsity": 0.3}
    expected = digests(run(**options)[0])
    lost = lose(first_of({("close_loss", None), ("backward", 1)}))
    folder, _ = run(workers=2, **options)
    assert [call.losses for call in lost] == [1, 1]
    assert digests(folder) == expected


def test_losing_a_worker_that_distils_gives_the_same_bytes(distilled_by_one_worker, run, lose, digests):
    chosen = {("advance", 2), ("distill", 1)}
    lost = lose(first_of(chosen))
    folder, _ = run(workers=2, **DISTILLED)
    assert [call.losses for call in lost] == [1, 1]
    assert digests(folder) == distilled_by_one_worker


@pytest.mark.parametrize("hanging", [pytest.param(("prune", 3), marks=pytest.mark.slow), ("sweep", 2)])
def test_a_call_that_hangs_is_taken_over_and_gives_the_same_bytes(
    by_one_worker, run, new_workers, digests, monkeypatch, hanging
):
    """By an idle worker, or by one that waits for what the call would give it."""
    monkeypatch.setattr(pool, "LOOK_EVERY", 0.2)
    start, started = pool.WorkerPool._start, []

    def hang_once(self, attempt):
        if (attempt.task.kind(), attempt.task.layer) == hanging:
            if not started:
                attempt.worker.__ray_call__.remote(lambda _: time.sleep(300))
            started.append(attempt.worker)
        start(self, attempt)

    monkeypatch.setattr(pool.WorkerPool, "_start", hang_once)
    begun = time.monotonic()
    folder, _ = run(sparsity=0.3, max_shard_size=60_000, workers=2)
    assert time.monotonic() - begun < 100
    assert len(set(started)) == 2
    assert digests(folder) == by_one_worker["full"]


def test_a_call_that_keeps_losing_its_workers_is_named(run, lose, monkeypatch):
    monkeypatch.setattr(pool, "LOSSES", 0)
    lose(lambda attempt: attempt.task.kind() == "open_forward")
    with pytest.raises(WorkersLost, match=r"'open_forward' of layer 0 lost 1 workers in a row.*--micro-batch"):
        run()


ON_TWO_NODES = """
import json, pathlib, sys
import ray
from ray.cluster_utils import Cluster
import distprune
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.telemetry.progress import Progress

model, calibration, output = sys.argv[1:]
# One CPU a node and a worker: no node can hold both workers, nor take in one whose node is lost.
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1,
    "_system_config": {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200,
                       "health_check_failure_threshold": 3},
})
second = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
nodes = []
init = WorkerPool.__init__

def init_and_wait(pool, *arguments):
    init(pool, *arguments)
    find_node = lambda worker: ray.get_runtime_context().get_node_id()
    nodes.append(len({ray.get(worker.__ray_call__.remote(find_node)) for worker in pool.workers}))

WorkerPool.__init__ = init_and_wait

class LosesNode(Progress):
    def stage(self, name, total, done=0):
        self.name = name

    def advance(self):
        if self.name == "Pruning":
            self.name = "Pruning on one node"
            cluster.remove_node(second, allow_graceful=False)

distprune.prune(model, f"{output}/pruned", calibration=calibration, method="olica", device="cpu", workers=2,
                micro_batch=3, sparsity=0.3, max_shard_size=60_000, propagation=1, progress=LosesNode())
pathlib.Path(output, "nodes.json").write_text(json.dumps(nodes))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow  # test_chaos loses a node too
def test_two_nodes_one_of_which_is_lost_give_the_same_bytes(
    by_one_worker, dense_path, calibration_path, digests, tmp_path
):
    arguments = map(str, (dense_path, calibration_path, tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_NODES, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "nodes.json").read_text()) == [2]
    assert digests(tmp_path / "pruned") == by_one_worker[1]
