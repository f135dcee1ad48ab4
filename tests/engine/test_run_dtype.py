"""The dtype of a run: settled once by the driver, the same on all workers, and never another when the run resumes."""

from __future__ import annotations

import json

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from distprune import InputError
from distprune.checkpoint import partial_directory
from distprune.config import PruneConfig
from distprune.engine.scheduler import run_dtype
from distprune.engine import load_record
from distprune.engine.scheduler.ray_cluster import WorkerPlan
from distprune.engine.telemetry.progress import Progress
from distprune.engine.scheduler.run_dtype import settle_dtype
from distprune.hardware import ComputeDtype

BF16, FP32 = torch.bfloat16, torch.float32
WORKERS = WorkerPlan(2, "cpu", 1, 0)


@pytest.fixture
def hardware(monkeypatch):
    """Lets this machine have units for bfloat16, or none."""

    def pretend(has_units: bool) -> None:
        answer = ComputeDtype(BF16, "has units") if has_units else ComputeDtype(FP32, "has no units")
        monkeypatch.setattr(run_dtype, "compute_dtype", lambda stored, device: answer if stored == BF16 else None)

    return pretend


@pytest.fixture
def half(save_model):
    """A Llama in bfloat16."""
    return save_model(dtype=BF16, num_hidden_layers=2)


class Notes(Progress):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def config(**options) -> PruneConfig:
    return PruneConfig(model="m", output="o", **options)


@pytest.mark.parametrize(("has_units", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_record_log_and_note_tell_the_dtype_and_why(hardware, prune_here, half, tmp_path, has_units, dtype):
    hardware(has_units)
    output, notes = tmp_path / "pruned", Notes()
    record = prune_here(output, half, progress=notes)
    assert record.dtype == load_record(output).dtype == dtype
    logged = json.loads((output / "distprune_log.jsonl").read_text().splitlines()[0])
    assert logged["dtype"] == dtype
    assert logged["dtype_reason"] == ("has units" if has_units else "has no units")
    told = [text for text in notes.texts if text.startswith("Forward passes")]
    assert told == ([] if has_units else ["Forward passes are in float32: has no units."])


def test_auto_gives_the_bytes_of_the_dtype_that_it_comes_to_in_the_checkpoint_s_own(
    hardware, prune_here, half, tmp_path, digests
):
    hardware(False)
    prune_here(tmp_path / "auto", half)
    prune_here(tmp_path / "asked", half, dtype="float32")
    prune_here(tmp_path / "other", half, dtype="bfloat16")
    assert digests(tmp_path / "auto") == digests(tmp_path / "asked") != digests(tmp_path / "other")
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "bfloat16"


class Interrupted(Progress):
    def stage(self, name, total, done=0):
        if name == "Pruning":
            raise KeyboardInterrupt


def test_a_run_does_not_resume_in_another_dtype_unless_told_to(hardware, prune_here, half, tmp_path, digests):
    output = tmp_path / "pruned"
    hardware(True)
    with pytest.raises(KeyboardInterrupt):
        prune_here(output, half, progress=Interrupted())
    hardware(False)
    with pytest.raises(InputError, match=r"another dtype \(bfloat16, and now float32\)\. Give the same"):
        prune_here(output, half)
    assert partial_directory(output).is_dir()
    prune_here(output, half, dtype="bfloat16")
    prune_here(tmp_path / "at once", half, dtype="bfloat16")
    assert digests(output) == digests(tmp_path / "at once")


# ------------------------------------------------------------------ what a cluster's nodes say


def settle(answers: list[ComputeDtype], monkeypatch, **options) -> ComputeDtype:
    monkeypatch.setattr(run_dtype, "nodes_with_room", lambda _: list("abc"[: len(answers)]))
    monkeypatch.setattr(run_dtype, "ask_nodes", lambda nodes, stored, device: answers)
    return settle_dtype(config(**options), BF16, WORKERS)


def test_one_node_without_units_decides_for_all(monkeypatch):
    has, lacks = ComputeDtype(BF16, "has units"), ComputeDtype(FP32, "node b has none")
    assert settle([has, lacks, has], monkeypatch) == lacks
    assert settle([has, has], monkeypatch) == has


def test_what_is_asked_for_is_not_up_to_any_node(monkeypatch):
    lacks = ComputeDtype(FP32, "node b has none")
    assert settle([lacks], monkeypatch, dtype="bfloat16") == ComputeDtype(BF16, "as --dtype asks")


@pytest.mark.parametrize(("has_units", "dtype"), [(True, BF16), (False, FP32)])
def test_where_there_is_no_node_yet_this_machine_decides(hardware, monkeypatch, has_units, dtype):
    hardware(has_units)
    assert settle([], monkeypatch).dtype == dtype


LACKS = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="a CPU with units for bfloat16 lends one")
def test_a_cluster_asks_the_nodes_that_workers_fit_on_and_no_others(monkeypatch):
    """Of three nodes the second has no units for bfloat16, and room for one CPU alone."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=1, env_vars=LACKS)
    cluster.add_node(num_cpus=2)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        cluster.wait_for_nodes()
        assert settle_dtype(config(), BF16, WORKERS).dtype == FP32
        assert settle_dtype(config(), BF16, WorkerPlan(2, "cpu", 2, 0)).dtype == BF16
        assert settle_dtype(config(dtype="bfloat16"), BF16, WORKERS).dtype == BF16
        assert settle_dtype(config(), torch.float32, WORKERS).dtype == FP32
    finally:
        ray.shutdown()
        cluster.shutdown()
