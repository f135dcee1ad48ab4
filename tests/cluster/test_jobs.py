"""Jobs on a cluster of several nodes, as its users submit them, while a node is lost."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytest.importorskip("aiohttp_cors", reason="needs ray[default]")

from job_cluster import wait_for
from ray_nodes import RayNodes

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    """A head that takes no workers, as in the files for clouds and Kubernetes."""
    with RayNodes(dashboard=True) as nodes:
        nodes.start(cpus=0)
        yield nodes


def write_run(folder: Path, **options: object) -> Path:
    given = {"sparsity": 0.3, "method": "olica", "device": "cpu", "micro_batch": 3, **options}
    (folder / "run.yaml").write_text(yaml.safe_dump({name: value for name, value in given.items()}))
    return folder


def submit(nodes: RayNodes, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What the README says, in the folder of run.yaml."""
    address = f"http://127.0.0.1:{nodes.dashboard_port}"
    job = ["distprune", "prune", "--config", "run.yaml"]
    return nodes.run("ray", "job", "submit", "--address", address, "--working-dir", str(folder), *words, "--", *job)


def test_a_job_whose_node_is_lost_gives_the_same_bytes(nodes, run, save_model, calibrate, digests, tmp_path):
    """The job is there before any node for a worker. One joins, then another, and then the first is lost."""
    model, output = save_model(num_hidden_layers=24), tmp_path / "pruned"
    calibration = calibrate(model)
    (tmp_path / "job").mkdir()
    folder = write_run(
        tmp_path / "job",
        model=str(model),
        output=str(output),
        calibration=calibration.name,
        workers="1:2",
        propagation=1,
    )
    (folder / calibration.name).write_bytes(calibration.read_bytes())  # travels with the job

    submitted = submit(nodes, folder, "--no-wait")
    job = re.search(r"raysubmit_\w+", submitted.stdout)[0]
    first, log = nodes.start(cpus=1), tmp_path / "pruned.partial"

    def calls() -> int:
        return sum(text.count('"call ended"') for text in (file.read_text() for file in log.rglob("*.jsonl")))

    wait_for(calls, lambda count: count > 10)
    nodes.start(cpus=1)
    nodes.kill(first)
    address = f"http://127.0.0.1:{nodes.dashboard_port}"
    told = nodes.run("ray", "job", "logs", "--follow", "--address", address, job)
    assert output.is_dir(), told.stdout
    events = [json.loads(line)["event"] for line in (output / "distprune_log.jsonl").read_text().splitlines()]
    assert "worker lost" in events
    assert digests(output) == digests(run(model, sparsity=0.3, propagation=1)[0])

    again = submit(nodes, folder)
    assert again.returncode == 1
    assert f"{output} exists" in again.stdout
