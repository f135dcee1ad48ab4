"""What tells Ray that a spot instance is about to go, with a metadata service of the tests' own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from job_cluster import wait_for
from ray_nodes import RayNodes

SCRIPT = Path(__file__).parents[2] / "cluster" / "preemption_notice.sh"
TOKEN = "a-token"


class Metadata(ThreadingHTTPServer):
    """The metadata services of AWS and Google Cloud; ``notice`` is the time when the instance is to go."""

    notice: datetime | None = None
    asked = 0

    def answer(self, method: str, path: str, headers: dict[str, str]) -> str | None:
        if (method, path) == ("PUT", "/latest/api/token") and "x-aws-ec2-metadata-token-ttl-seconds" in headers:
            return TOKEN
        self.asked += method == "GET"
        match path, headers.get("x-aws-ec2-metadata-token"), headers.get("metadata-flavor"):
            case "/latest/meta-data/spot/instance-action", str(token), None if self.notice and token == TOKEN:
                return json.dumps({"action": "terminate", "time": self.notice.strftime("%Y-%m-%dT%H:%M:%SZ")})
            case "/computeMetadata/v1/instance/preempted", None, "Google":
                return "TRUE" if self.notice else "FALSE"
        return None


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        text = self.server.answer(
            self.command, self.path, {name.lower(): value for name, value in self.headers.items()}
        )
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def watch(cloud: str, server: Metadata, path: str, **environment: str) -> subprocess.Popen[str]:
    address = f"http://127.0.0.1:{server.server_port}"
    given = {**os.environ, **environment, "METADATA": address, "POLL": "0.1", "PATH": path}
    return subprocess.Popen(["bash", str(SCRIPT), cloud], env=given, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path) -> str:
    """PATH with a `ray` that prints what it is asked for."""
    (tmp_path / "ray").write_text('#!/usr/bin/env bash\necho "ray" "$@"\n')
    (tmp_path / "ray").chmod(0o755)
    return os.pathsep.join([str(tmp_path), os.environ["PATH"]])


@pytest.mark.parametrize(("cloud", "earliest", "latest"), [("aws", 100, 120), ("gcp", 30, 30)])
def test_the_node_is_drained_when_there_is_notice_and_not_before(metadata, path, cloud, earliest, latest):
    process = watch(cloud, metadata, path)
    while metadata.asked < 5:
        assert process.poll() is None
    metadata.notice = datetime.now(timezone.utc) + timedelta(seconds=120)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (deadline,) = re.findall(r"^ray drain-node .*--deadline-remaining-seconds (\d+)$", output, re.MULTILINE)
    assert earliest <= int(deadline) <= latest


def test_a_metadata_service_that_does_not_answer_for_a_while_is_asked_again(metadata, path, monkeypatch):
    metadata.notice = datetime.now(timezone.utc) + timedelta(seconds=120)
    answer, failures = metadata.answer, iter(range(3))
    monkeypatch.setattr(metadata, "answer", lambda *asked: answer(*asked) if next(failures, None) is None else None)
    output, _ = watch("aws", metadata, path).communicate(timeout=60)
    assert "ray drain-node" in output


def test_a_notice_whose_time_has_passed_leaves_no_time(metadata, path):
    metadata.notice = datetime.now(timezone.utc) - timedelta(seconds=5)
    output, _ = watch("aws", metadata, path).communicate(timeout=60)
    assert output.endswith("--deadline-remaining-seconds 0\n")


def test_another_cloud_is_refused(metadata, path):
    process = watch("azure", metadata, path)
    assert process.wait(60) == 2


NODES = """
import json, sys, ray
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(json.dumps(ray.nodes()))
"""


@pytest.mark.slow
def test_ray_drains_the_node(metadata, tmp_path):
    """With Ray's own command, which is told the node, as here all nodes have one address. An idle one goes at once."""
    metadata.notice = datetime.now(timezone.utc) + timedelta(seconds=120)
    with RayNodes() as nodes:
        nodes.start(cpus=0)
        nodes.start(cpus=1)

        def seen() -> list[dict[str, Any]]:
            return json.loads(nodes.run("python", "-c", NODES, nodes.address).stdout.splitlines()[-1])

        (node,) = (each["NodeID"] for each in seen() if each["Resources"].get("CPU"))
        (tmp_path / "ray").write_text(
            f'#!/usr/bin/env bash\nPATH=${{PATH#*:}} exec ray "$@" --address {nodes.address} --node-id {node}\n'
        )
        (tmp_path / "ray").chmod(0o755)
        given = {name: value for name, value in nodes.environment.items() if name.startswith("RAY_")}
        process = watch("aws", metadata, os.pathsep.join([str(tmp_path), nodes.environment["PATH"]]), **given)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        drained = wait_for(seen, lambda all_nodes: any(not each["Alive"] for each in all_nodes))
        told = {each["NodeID"]: each["DeathReasonMessage"] for each in drained if not each["Alive"]}
        assert told == {node: "aws takes this instance back"}
