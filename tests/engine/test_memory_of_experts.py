"""A worker that holds some of a mixture's experts at a time needs no room for all of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

EXPERTS, AT_ONCE, WIDTH, HIDDEN = 64, 4, 384, 512
LAYER_MIB = 3 * EXPERTS * WIDTH * HIDDEN * 4 / 2**20
# Runs the tasks of one layer, and prints by how many MiB they let the process grow at most.
CODE = """
import json, sys
from pathlib import Path
import torch
from distprune.checkpoint import Checkpoint, ShardWriter
from distprune.config import PruneConfig
from distprune.engine.run.preflight import dense_model
from distprune.engine.worker.expert_pass_tasks import ForwardExperts, ForwardJoined, ProfileExperts, ProfileMixture
from distprune.engine.worker.expert_pass_tasks import RouteTokens
from distprune.engine.worker.expert_tasks import JoinExperts, PruneAround, PruneExperts
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.pass_tasks import CloseLayer, OpenForward, Sweep
from distprune.engine.worker.prune_task import Prune

def peak() -> float:
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

model, folder, at_once, width = json.loads(sys.argv[1])
torch.set_num_threads(1)
config = PruneConfig(
    model=model, output=folder, method="slimgpt", dtype="float32", micro_batch=1, experts_at_once=at_once
)
parts = ShardWriter(Path(folder)).announce()
worker = LayerWorker(config, dense_model(Checkpoint.open(Path(model))), torch.device("cpu"), parts)
torch.linalg.cholesky(torch.eye(8)) @ torch.ones(8)
states = torch.randn(2, 16, worker.architecture.hidden_size)
shape = worker.architecture.dense_shape(0)
before = peak()
planned = shape.with_ffn(width=width)
if at_once is None:
    OpenForward(0).run(worker)
    Sweep(0, 0, states).run(worker)
    profile, carried = CloseLayer(0, 1).run(worker)
    Prune(0, states, planned, profile, carried, True).run(worker)
else:
    chunks = range(-(-shape.ffn.count // at_once))
    routed, seen = RouteTokens(0, states).run(worker)
    outputs, overviews = zip(*[ForwardExperts(0, chunk, routed).run(worker) for chunk in chunks])
    _, after = ForwardJoined(0, states, routed, list(outputs)).run(worker)
    told = [seen, *overviews, after]
    profile = ProfileMixture(0, told).run(worker)
    for chunk in chunks:
        profile |= ProfileExperts(0, chunk, routed, told).run(worker)
    finished, state, routed, _ = PruneAround(0, states, planned, profile, {}, True).run(worker)
    pruned = [PruneExperts(0, planned, profile, True, chunk, routed).run(worker)[1] for chunk in chunks]
    JoinExperts(0, states, planned, state, finished.rotary_pairs, routed, pruned).run(worker)
print(peak() - before)
"""


def growth(model, folder, at_once: int | None) -> float:
    arguments = json.dumps([str(model), str(folder), at_once, WIDTH // 2])
    done = subprocess.run([sys.executable, "-c", CODE, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_layers_experts_are_never_all_in_memory(save_mixture, tmp_path):
    sizes = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "moe_intermediate_size": WIDTH}
    model = save_mixture("qwen3_moe", **sizes, num_hidden_layers=1, mlp_only_layers=[])
    whole, chunked = growth(model, tmp_path / "whole", None), growth(model, tmp_path / "chunked", AT_ONCE)
    assert whole > LAYER_MIB
    assert chunked < LAYER_MIB / 2, (whole, chunked)
    print(f"{LAYER_MIB:.0f} MiB a layer: {whole:.0f} MiB whole, {chunked:.0f} MiB in chunks of {AT_ONCE}")
