"""Commands in processes of their own: names, streams and signals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray


def ended(*arguments, code: str = "from distprune.cli import main; main()", **options) -> subprocess.CompletedProcess:
    """A command in a process of its own, whose streams take ASCII alone."""
    command = [sys.executable, "-c", code, *map(os.fsencode, arguments)]
    return subprocess.run(command, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"}, **options)


def prune_arguments(model: Path, calibration: Path, output: Path) -> list:
    options = {"-o": output, "--calibration": calibration, "--method": "magnitude", "--workers": 1, "--device": "cpu"}
    given = [str(word) for option in options.items() for word in option]
    return ["prune", str(model), *given, "--address", ray.get_runtime_context().gcs_address]


def test_names_that_standard_output_cannot_take_are_escaped(dense_path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river runs to the sea. " * 100)
    output = os.fsdecode(os.fsencode(tmp_path) + "/größe".encode() + b"\xff.arrow")
    options = "--samples", "2", "--sequence-length", "8"
    done = ended("calibrate", str(dense_path), "--text", str(text), "-o", output, *options, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb"gr\xf6\xdfe\udcff.arrow: 2 windows of 8 tokens" in done.stdout.replace(rb"\xc3\xb6", rb"\xf6")


def test_an_output_that_is_not_utf8_is_refused(distprune, model, calibration, tmp_path):
    output = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff")
    result = distprune("prune", model, "-o", output, "--calibration", calibration)
    assert result.exit_code == 2
    assert "/b\\xff: is not UTF-8" in result.stderr and "choose another" in result.stderr


def test_a_run_ends_well_whatever_its_name_and_although_its_report_cannot_be_written(
    ray_cluster, model, calibration, tmp_path
):
    output = tmp_path / "größe-出力"
    with open("/dev/full", "w") as full:
        done = ended(*prune_arguments(model, calibration, output), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"standard output can't be told of the run") == 1 and b"Traceback" not in done.stderr
    assert (output / "model.safetensors").is_file()


SIGNALLED = """
import atexit, os, signal, sys
from distprune import api, cli
from distprune.engine import driver

def signal_and(act):
    def signalled(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return act(*arguments, **options)
    return signalled

match sys.argv.pop():
    case "publishing and leaving":
        driver.publish = signal_and(driver.publish)
        atexit.register(signal_and(lambda: None))
    case "beginning":
        api.prune = signal_and(api.prune)
cli.main()
"""


@pytest.mark.parametrize("when", ["publishing and leaving", "beginning"])
def test_a_run_that_sigterm_ends_ends_with_the_status_that_it_has_come_to(
    ray_cluster, model, calibration, tmp_path, when
):
    output = tmp_path / "pruned"
    done = ended(*prune_arguments(model, calibration, output), when, code=SIGNALLED, capture_output=True)
    if when == "beginning":
        assert done.returncode == 130 and b"distprune: interrupted." in done.stderr
        assert not output.exists()
    else:
        assert done.returncode == 0, done.stderr
        assert (output / "model.safetensors").is_file()
        assert not (tmp_path / "pruned.partial").exists()
