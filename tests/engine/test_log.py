"""The log of a run: a JSON object for every event, in its work folder and in its result."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import ray

from distprune import InputError
from distprune.engine.telemetry.log import RunLog, json_file, json_lines
from distprune.engine.telemetry.progress import Assignment, Progress, WorkerName

OPTIONS = {"sparsity": 0.3, "propagation": 2}
WORKER = WorkerName(3, "node")


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def events_of(path: Path) -> list[str]:
    return [line["event"] for line in lines_of(path.read_text())]


class Stops(Progress):
    """Interrupts the run in the stage of a name."""

    def stage(self, name, total, done=0):
        if name == "Pruning":
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def log(run) -> list[dict]:
    """The log of a whole run, which an interruption parts in two."""
    output = run(sparsity=0.1)[0].with_name("logged")
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops(), **OPTIONS)
    # As if the process had been killed while it wrote.
    with output.with_name("logged.partial").joinpath("log.jsonl").open("a") as file:
        file.write('{"time": "20')
    run(output=output, workers=2, **OPTIONS)
    return lines_of((output / "distprune_log.jsonl").read_text())


def test_a_run_and_its_resumption_are_one_log(log):
    assert {line["run"] for line in log} == {log[0]["run"]}
    assert log[0]["event"] == "run started" and log[0]["sparsity"] == 0.3
    events = [line["event"] for line in log]
    assert events.index("interrupted") + 1 == events.index("run resumed")
    assert events[-1] == "run done"
    times = [datetime.fromisoformat(line["time"]) for line in log]
    assert times == sorted(times) and times[0].utcoffset().total_seconds() == 0


def test_every_call_and_every_stage_is_there_once(log):
    for event in ("call started", "call ended"):
        layers = [line["layer"] for line in log if line["event"] == event and line["call"] == "prune"]
        assert sorted(layers) == [0, 1, 2, 3]
    ended = [line for line in log if line["event"] == "call ended"]
    assert all(line["seconds"] > 0 and line["node"] and line["worker"] in (0, 1) for line in ended)
    done = [line["stage"] for line in log if line["event"] == "stage done"]
    assert done == ["Checking weights", "Dense pass", "Pruning", "Copying embedding and head", "Assembling"]
    assert {line["worker"] for line in log if line["event"] == "worker asked for"} == {0, 1}


def test_losses_are_warnings_and_errors_are_told_once():
    stream = io.StringIO()
    told = RunLog("out")
    with json_lines(stream):
        told.lost(WORKER, Assignment("prune", 4))
        told.lost(WORKER, None)
        with pytest.raises(InputError), told.errors(), told.errors():
            raise InputError("tensor t is bad")
    lost, idle, error = ({name: line[name] for name in line if name != "time"} for line in lines_of(stream.getvalue()))
    assert lost == {
        "level": "warning", "event": "worker lost", "run": "out", "call": "prune", "layer": 4, "worker": 3,
        "node": "node",
    }  # fmt: skip
    assert "call" not in idle
    assert error == {
        "level": "error", "event": "error", "run": "out", "kind": "InputError", "message": "tensor t is bad"
    }  # fmt: skip


def test_a_file_is_appended_to_and_a_torn_line_cut_away(tmp_path):
    path = tmp_path / "log.jsonl"
    for text in ("first", "second"):
        with json_file(path):
            RunLog("out").note(text)
        with path.open("a") as file:
            file.write('{"torn')
    with json_file(path):
        RunLog("out").note("third")
    assert [line["text"] for line in lines_of(path.read_text())] == ["first", "second", "third"]


def test_nobody_hears_of_it_who_did_not_ask(capsys):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        RunLog("out").lost(WORKER, None)
    finally:
        logging.getLogger().removeHandler(handler)
    assert stream.getvalue() == "" and capsys.readouterr() == ("", "")


def test_the_packages_other_warnings_are_lines_too_and_still_shown(tmp_path):
    code = """
import logging, pathlib, sys
from distprune.engine.telemetry.log import json_file
with json_file(pathlib.Path(sys.argv[1])):
    logging.getLogger("distprune.checkpoint").warning("a disk stalls")
"""
    path = tmp_path / "log.jsonl"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stderr == "a disk stalls\n"
    assert [(line["level"], line["event"]) for line in lines_of(path.read_text())] == [("warning", "a disk stalls")]


@pytest.mark.parametrize("sparsity", [0.3, 0.99])
def test_standard_output_can_be_the_log(run, dense_path, calibration_path, tmp_path, sparsity):
    options = f"--calibration {calibration_path} --output {tmp_path / 'pruned'} --sparsity {sparsity} --workers 1"
    address = f"--method olica --device cpu --log-format json --address {ray.get_runtime_context().gcs_address}"
    command = [sys.executable, "-m", "distprune.cli", "prune", str(dense_path), *options.split(), *address.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    lines = lines_of(done.stdout)
    if sparsity == 0.3:
        assert done.returncode == 0 and "Traceback" not in done.stderr
        assert [lines[0]["event"], lines[-1]["event"]] == ["run started", "run done"]
        assert events_of(tmp_path / "pruned" / "distprune_log.jsonl") == [line["event"] for line in lines]
        assert lines[-1]["decoder_sparsity"] == pytest.approx(0.3, abs=0.01)
    else:
        assert done.returncode == 2
        assert [(line["event"], line["kind"]) for line in lines] == [("error", "InputError")]
