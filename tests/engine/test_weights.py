"""Nodes that don't see the model's folder, and models that are on no node whole: the same bytes as with both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from local_hub import REPOSITORY, join, serving
from safetensors.torch import load_file, save_file

from distprune import InputError
from distprune.calibration import open_calibration
from distprune.checkpoint import Checkpoint, HubFiles, HubModel, TensorFiles
from distprune.config import PruneConfig
from distprune.engine.run.preflight import check_job, dense_model
from distprune.engine.scheduler.ray_cluster import WorkerPlan
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker import weights
from distprune.engine.worker.host_tensor import in_pieces
from distprune.engine.worker.weights import (
    FirstThatWorks,
    Served,
    WeightAccess,
    WeightServer,
    may_span_nodes,
    weight_access,
)
from distprune.errors import Unreachable

SUPPORT = Path(__file__).parents[1] / "support"
OPTIONS = {"sparsity": 0.3, "max_shard_size": 60_000, "propagation": 1}
OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

ON_TWO_NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
import distprune
from distprune.engine.scheduler.pool import WorkerPool

runs, second_node, results = json.loads(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
cluster.add_node(num_cpus=1, env_vars=second_node)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
here = ray.get_runtime_context().get_node_id()
init, start = WorkerPool.__init__, WorkerPool._start

def init_and_wait(pool, *arguments):
    init(pool, *arguments)
    ray.wait(list(pool._starting), num_returns=len(pool._starting))
    pool.elsewhere = set()
    for worker in pool.workers:
        if ray.get(worker.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) != here:
            pool.elsewhere.add(worker)

def note_and_start(pool, attempt):
    calls.append([attempt.task.kind(), attempt.worker in pool.elsewhere])
    start(pool, attempt)

WorkerPool.__init__, WorkerPool._start = init_and_wait, note_and_start
told = []
for options in runs:
    calls, error = [], None
    try:
        distprune.prune(**options, method="olica", device="cpu", micro_batch=3)
    except distprune.InputError as problem:
        error = str(problem)
    told.append({"calls": calls, "error": error})
open(results, "w").write(json.dumps(told))
"""


def on_two_nodes(runs: list[dict], second_node: dict[str, str], folder: Path, **environment: str) -> list[dict]:
    """Runs with those options, one after the other, by a worker on a second node of a cluster.

    Gives for each its error, and its calls, each with whether the second node had it.
    """
    results = folder / "results.json"
    script = [sys.executable, "-c", ON_TWO_NODES, json.dumps([runs, second_node, str(results)], default=str)]
    done = subprocess.run(
        script, capture_output=True, text=True, timeout=240, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())


@pytest.mark.slow
def test_a_node_that_sees_no_folder_is_served_or_asks_the_hub_and_the_bytes_are_the_same(
    run, save_model, dense_path, calibrate, digests, tmp_path
):
    own = {"calibration": None, "samples": 4, "sequence_length": 12}
    folder = save_model(max_shard_size="60KB")
    given = {"calibration": calibrate(folder)}
    log = tmp_path / "attempts.log"
    # What lies below the first folder can't be opened there; the second is on neither node.
    second_node = {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT / "blind"), os.environ.get("PYTHONPATH", "")]),
        "BLIND_TO": str(dense_path),
        "BLIND_LOG": str(log),
        "HF_HOME": str(tmp_path / "second"),
    }
    with serving(folder) as hub:
        served, fetched = on_two_nodes(
            [
                {"model": dense_path, "output": tmp_path / "served", **OPTIONS, **own},
                {"model": REPOSITORY, "output": tmp_path / "fetched", **OPTIONS, **given, "weights": "hub"},
            ],
            second_node,
            tmp_path,
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "first"),
        )
    methods = {method for method, elsewhere in served["calls"] if elsewhere}
    assert {"check_layer", "check_outer", "write_own_samples", "embed", "sweep", "prune"} <= methods
    expected, _ = run(dense_path, **OPTIONS, **own)
    assert digests(tmp_path / "served") == digests(expected)
    made = [open_calibration(path / "calibration.arrow").fingerprint for path in (tmp_path / "served", expected)]
    assert made[0] == made[1]
    # The worker tried to open the first file that it would have read, could not, and tried no other.
    assert set(log.read_text().splitlines()) == {str(dense_path / "config.json")}

    assert fetched["error"] is None
    assert digests(tmp_path / "fetched") == digests(run(folder, **OPTIONS)[0])
    shards = {file.name for file in folder.glob("*.safetensors")}
    first, second = (
        {file.name for file in (tmp_path / node).rglob(f"snapshots/{hub.commit}/*.safetensors")}
        for node in ("first", "second")
    )
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    # The driver, which is on the first, fetches no weights: a worker copies embedding and head too.
    assert {weight_map[name] for name in OUTER} < shards
    assert (first, second) == (set(), shards)
    assert sorted(name for name in hub.sent if name in shards) == sorted(second)


# ------------------------------------------------------------------ one node


def test_served_weights_give_the_same_bytes(run, digests):
    options = OPTIONS | {"distill": {"learning_rate": 1e-3, "batch": 2}}
    assert digests(run(**options, weights="served")[0]) == digests(run(**options)[0])


def test_a_server_that_dies_is_started_again(ray_cluster, dense_path, tmp_path):
    job = check_job(PruneConfig(model=str(dense_path), output=tmp_path / "o", weights="served"))
    checkpoint = job.checkpoint
    [name, *_], [info, *_] = checkpoint.tensors, checkpoint.tensors.values()
    # More headers than Ray sends along when it starts an actor, however they are compressed.
    many = dict(checkpoint.tensors) | {os.urandom(50).hex(): info for _ in range(3000)}
    job = replace(job, model=replace(job.model, checkpoint=replace(checkpoint, tensors=many)))
    with weight_access(job, WorkerPlan(1, "cpu", 1, 0)) as access:
        served = access.open().checkpoint
        expected, rows = checkpoint.read([name])[name].clone(), torch.tensor([[1], [0]])
        found = served.read([name])[name]
        assert torch.equal(found, expected)
        found.zero_()  # it is the reader's own
        time.sleep(1)  # for what nobody refers to any more to be deleted
        os.kill(ray.get(access.server.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        assert torch.equal(served.read_rows(name, rows), expected[rows])


def test_weights_that_go_away_leave_what_was_done_and_the_same_run_goes_on(run, dense_path, digests, tmp_path):
    model, away = shutil.copytree(dense_path, tmp_path / "model"), tmp_path / "away"
    options = {"model": model, "output": tmp_path / "pruned", **OPTIONS}

    class TakesAway(Progress):
        def stage(self, name, total, done=0):
            if name == "Pruning":
                model.rename(away)

    with pytest.raises(Unreachable, match=r"model\.safetensors: is gone"):
        run(**options, progress=TakesAway())
    away.rename(model)
    assert (tmp_path / "pruned.partial").exists()
    run(**options)
    assert digests(tmp_path / "pruned") == digests(run(**OPTIONS)[0])


def test_a_model_whose_configuration_is_code_of_its_own_needs_none_of_it_on_workers(run, dense_path, digests, tmp_path):
    model = shutil.copytree(dense_path, tmp_path / "model")
    (model / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    pass\n"
    )
    config = json.loads((model / "config.json").read_text())
    own = config | {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(own))
    job = check_job(PruneConfig(model=str(model), output=tmp_path / "o", trust_remote_code=True))
    assert type(job.checkpoint.config).__name__ == "OwnConfig"
    folders = run(model, **OPTIONS, trust_remote_code=True)[0], run(dense_path, **OPTIONS)[0]
    made, expected = ({**digests(folder), "config.json": None} for folder in folders)
    assert made == expected


# ------------------------------------------------------------------ what a node decides


@pytest.fixture
def access(dense_path, tmp_path) -> Callable[..., WeightAccess]:
    """What a worker is told of a model that the driver's node has in a folder."""
    folder = shutil.copytree(dense_path, tmp_path / "model")

    def tell(way: str = "auto", hub: HubModel | None = None, server: object | None = None) -> WeightAccess:
        checkpoint = Checkpoint.open(folder)
        model = dense_model(checkpoint)
        return WeightAccess(model, None if hub else checkpoint.fingerprint(), hub, way, server)

    return tell


def source_of(access: WeightAccess) -> object:
    return access.open().checkpoint.source


def lose_folder(access: WeightAccess) -> None:
    shutil.rmtree(access.model.checkpoint.path)


def replace_model(access: WeightAccess) -> None:
    """Another model of the same architecture, as another machine may have it under the same path."""
    file = access.model.checkpoint.path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("hub", [None, HubModel(REPOSITORY, "0" * 40, Path("nowhere"))])
@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("gemma3_text", {"head_dim": 16, "sliding_window": 8}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}}),
        ("qwen2", {"dtype": torch.bfloat16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 32, "max_shard_size": "60KB", "tie_word_embeddings": True}),
    ],
)
def test_a_node_is_told_everything_in_text(save_model, model_type, changes, hub):
    checkpoint = Checkpoint.open(save_model(model_type, **changes))
    model, server = dense_model(checkpoint), object()
    told = WeightAccess(model, None if hub else checkpoint.fingerprint(), hub, "auto", server)
    found = WeightAccess.from_json(json.loads(json.dumps(told.to_json())), server)
    architecture = found.model.architecture
    assert architecture.config.to_dict() == found.model.checkpoint.config.to_dict()
    # Configurations that were read from text know the version of transformers besides.
    of_the_text = {"transformers_version"}
    known = {name: value for name, value in architecture.config.to_dict().items() if name not in of_the_text}
    expected = model.architecture.config.to_dict()
    assert known == {name: value for name, value in expected.items() if name not in of_the_text}
    assert architecture.dtype is model.architecture.dtype
    assert architecture.dense_shapes == model.architecture.dense_shapes
    assert found.model.names == model.names
    assert found.model.checkpoint.tensors == checkpoint.tensors
    assert list(found.model.checkpoint.tensors) == list(checkpoint.tensors)
    assert (found.content, found.hub, found.way, found.server) == (told.content, told.hub, told.way, server)


def test_a_node_that_sees_the_folder_reads_it(access):
    assert type(source_of(access(server=object()))) is TensorFiles
    assert type(source_of(access("shared"))) is TensorFiles


@pytest.mark.parametrize("spoil", [lose_folder, replace_model])
def test_a_node_that_does_not_see_the_same_model_is_served(access, spoil):
    told = access(server=object())
    spoil(told)
    assert type(source_of(told)) is Served


@pytest.mark.parametrize("way", ["shared", "auto"])
@pytest.mark.parametrize("spoil, words", [(lose_folder, "can't be read"), (replace_model, "holds another model")])
def test_a_node_that_can_read_it_no_other_way_names_the_folder(access, spoil, words, way):
    told = access(way)
    spoil(told)
    with pytest.raises(InputError, match=rf"{told.model.checkpoint.path} {words}.*--weights"):
        told.open()


def test_a_way_that_is_asked_for_is_taken_whatever_the_node_sees(access):
    hub = HubModel(REPOSITORY, "0" * 40, Path("nowhere"))
    assert type(source_of(access("served", server=object()))) is Served
    assert type(source_of(access("served", hub, object()))) is Served
    assert type(source_of(access("hub", hub))) is HubFiles
    assert type(source_of(access("auto", hub))) is HubFiles
    assert type(source_of(access("auto", hub, object()))) is FirstThatWorks


def test_a_server_that_does_not_see_the_folder_names_its_node(access):
    told = access()
    lose_folder(told)
    with pytest.raises(InputError, match=rf"node \S+: {told.model.checkpoint.path} can't be read"):
        WeightServer.__ray_metadata__.modified_class(*in_pieces(told.to_json())).read("model.norm.weight")


class Broken(TensorFiles):
    tries = 0

    def locate(self, file):
        self.tries += 1
        raise InputError("no network")


def test_what_the_hub_does_not_give_comes_from_the_drivers_node_ever_after(access):
    checkpoint, broken = access().model.checkpoint, Broken()
    name, rows = "model.norm.weight", torch.tensor([1, 0])
    found = replace(checkpoint, source=FirstThatWorks(broken, TensorFiles()))
    for _ in range(2):
        assert torch.equal(found.read([name])[name], checkpoint.read([name])[name])
        assert torch.equal(found.read_rows(name, rows), checkpoint.read_rows(name, rows))
    assert broken.tries == 1
    broken = Broken()
    found = replace(checkpoint, source=FirstThatWorks(broken, TensorFiles()))
    assert torch.equal(found.read_rows(name, rows), checkpoint.read_rows(name, rows))


# ------------------------------------------------------------------ what the driver decides


def test_a_folder_is_on_no_hub(run):
    with pytest.raises(InputError, match=r"--weights hub: .* is no hub id"):
        run(weights="hub")


def test_a_hub_model_is_the_same_run_whichever_way_its_weights_come(dense_path, calibrate, tmp_path, monkeypatch):
    def identity(weights: str) -> dict:
        config = PruneConfig(
            model=REPOSITORY, output=tmp_path / "o", calibration=calibrate(dense_path), weights=weights
        )
        return check_job(config).identity("cpu")

    with serving(dense_path) as hub:
        join(hub, tmp_path / "cache", monkeypatch)
        before, sent = identity("auto"), hub.weights_sent()
        assert before == identity("shared")
        assert (sent, hub.weights_sent()) == (set(), {"model.safetensors"})
    assert before["model"] == f"{REPOSITORY}@{hub.commit}"


def test_a_server_is_started_only_where_workers_may_be_elsewhere(monkeypatch):
    def spans(nodes: int, workers: int) -> bool:
        monkeypatch.setattr(weights, "alive_nodes", lambda: [{"CPU": 4.0}] * nodes)
        return may_span_nodes(WorkerPlan(workers, "cpu", 1, 0))

    assert [spans(1, 4), spans(1, 5), spans(2, 1)] == [False, True, True]
