"""Runs on a real Ray cluster whose nodes share nothing but an S3 server."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time

import boto3
import pytest

from distprune import InputError, status
from distprune.storage import copy, location, objects_in


def digests_in(folder) -> dict[str, str]:
    """As the fixture ``digests`` has them of a local folder."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in objects_in(folder)
        if file.name.endswith((".safetensors", ".index.json")) or file.name == "config.json"
    }


@pytest.fixture(scope="module")
def bucket(s3_environment):
    boto3.client("s3").create_bucket(Bucket="shared")
    return location("s3://shared")


def command(model, output, calibration, *more: str) -> list[str]:
    options = {"--output": output, "--calibration": calibration, "--method": "olica", "--sparsity": 0.3}
    options |= {"--micro-batch": 3, "--device": "cpu", "--max-shard-size": 60_000}
    given = [str(part) for option in options.items() for part in option]
    return [sys.executable, "-m", "distprune.cli", "prune", str(model), *given, *more]


@pytest.fixture(scope="module")
def model(bucket, dense_path):
    for file in dense_path.iterdir():
        copy(file, bucket / "dense" / file.name)
    return bucket / "dense"


@pytest.mark.slow
def test_from_s3_to_s3_by_one_worker_interrupted_and_resumed_by_two(
    prune_here, dense_path, calibration_path, digests, bucket, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    output = bucket / "pruned"
    by_one, by_two = (command(model, output, calibration_path, "--workers", count) for count in "12")
    first = subprocess.Popen(by_one, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while first.poll() is None and not any(
        "pruned-layer" in file.name for file in objects_in(bucket / "pruned.partial")
    ):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    told, _ = first.communicate(timeout=120)
    assert first.returncode == 130, told
    assert status(str(output)).state == "stopped"
    done = subprocess.run(by_two, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert objects_in(bucket / "pruned.partial") == []
    options = {"sparsity": 0.3, "max_shard_size": 60_000, "propagation": "full", "distill": None}
    prune_here(tmp_path / "there", dense_path, calibration=calibration_path, **options)
    assert digests_in(output) == digests(tmp_path / "there")
    with pytest.raises(InputError, match="s3://shared/pruned exists"):
        prune_here(output, dense_path)
