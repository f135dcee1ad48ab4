"""Who writes finished layers: workers that see the output's file system, or the driver; the same bytes either way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distprune import RunFailed
from distprune.checkpoint import PartFolder, ShardWriter
from distprune.engine.worker.host_tensor import size_of

SUPPORT = Path(__file__).parents[1] / "support"
DISTILLATIONS = {
    "none": None,
    "layers": {"learning_rate": 1e-3, "batch": 2},
    "logits": {"objective": "logits", "batch": 2},
}


@pytest.fixture
def writers(monkeypatch) -> list[str]:
    """Who has written each part: "driver", or "worker" where its file was accepted."""
    written = []
    for name, who in {"put": "driver", "accept": "worker"}.items():
        original = getattr(ShardWriter, name)

        def noting(self, *arguments, original=original, who=who):
            written.append(who)
            original(self, *arguments)

        monkeypatch.setattr(ShardWriter, name, noting)
    return written


@pytest.mark.parametrize("distillation", DISTILLATIONS)
def test_workers_or_the_driver_write_the_same_bytes(prune_here, digests, writers, tmp_path, distillation):
    found = {}
    for writes in ("auto", "driver"):
        writers.clear()
        prune_here(tmp_path / writes, writes=writes, distill=DISTILLATIONS[distillation])
        assert set(writers) == {"worker" if writes == "auto" else "driver"}
        found[writes] = digests(tmp_path / writes)
        assert not list((tmp_path / writes).glob("*.offered*"))
    assert found["auto"] == found["driver"]
    assert len(found["auto"]) > 4


def test_layers_do_not_pass_through_the_object_store(run, monkeypatch):
    """Only what the next layers need does: here nothing, since each is pruned on the dense model's activations."""
    from distprune.engine.scheduler.worker_registry import WorkerRegistry

    sizes, ends = [], WorkerRegistry.ends

    def noting(self, worker, seconds, values):
        if self._works[worker].assignment.method == "prune":
            sizes.append(size_of(values))
        ends(self, worker, seconds, values)

    monkeypatch.setattr(WorkerRegistry, "ends", noting)
    run(sparsity=0.3, propagation=1)
    assert sizes == [0] * 4
    sizes.clear()
    run(sparsity=0.3, propagation=1, writes="driver")
    assert min(sizes) > 1000


ON_A_BLIND_NODE = """
import json, sys
import ray
from ray.cluster_utils import Cluster
import distprune
from distprune.checkpoint import ShardWriter

options, second_node, results = json.loads(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
cluster.add_node(num_cpus=1, env_vars=second_node)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
written, put, accept = [], ShardWriter.put, ShardWriter.accept
ShardWriter.put = lambda *given: written.append("driver") or put(*given)
ShardWriter.accept = lambda *given: written.append("worker") or accept(*given)
distprune.prune(**options)
open(results, "w").write(json.dumps(written))
"""


def test_what_a_node_that_does_not_see_the_output_finishes_is_written_by_the_driver(
    run, dense_path, calibration_path, digests, tmp_path
):
    options = {"method": "olica", "device": "cpu", "micro_batch": 3, "sparsity": 0.3, "max_shard_size": 60_000}
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    second_node = {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT / "blind"), os.environ.get("PYTHONPATH", "")]),
        "BLIND_TO": str(hidden),
        "BLIND_LOG": str(tmp_path / "attempts.log"),
    }
    given = {"model": dense_path, "calibration": calibration_path, "output": hidden / "pruned", **options}
    results = tmp_path / "results.json"
    script = [sys.executable, "-c", ON_A_BLIND_NODE, json.dumps([given, second_node, str(results)], default=str)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(results.read_text())) == {"driver"}
    assert "token" in (tmp_path / "attempts.log").read_text()
    there, _ = run(**options, calibration=calibration_path)
    assert digests(hidden / "pruned") == digests(there)


def test_a_disk_that_is_full_for_a_worker_ends_the_run_with_its_message(
    prune_here, undisturbed_here, digests, monkeypatch, tmp_path
):
    def full(self, tensors):
        from distprune.checkpoint import failures_explained

        with failures_explained(self.path / "layer"):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunFailed, match="No space left on device"):
        patch.setattr(PartFolder, "write", full)
        prune_here(tmp_path / "pruned")
    prune_here(tmp_path / "pruned")
    assert digests(tmp_path / "pruned") == undisturbed_here
