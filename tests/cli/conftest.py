"""Running the command line in the test's process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from distprune.cli import app


@pytest.fixture
def distprune():
    """Runs a command line in this process."""

    def run(*arguments) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="distprune")

    return run


@pytest.fixture
def model(dense_path, tmp_path) -> Path:
    """The Llama in a folder of the test's own, to spoil."""
    return shutil.copytree(dense_path, tmp_path / "model")


@pytest.fixture
def calibration(calibration_path, tmp_path) -> Path:
    return Path(shutil.copyfile(calibration_path, tmp_path / "calibration.arrow"))


@pytest.fixture
def assert_refused(distprune, model, calibration, tmp_path):
    """Asserts that `distprune prune` ends with status 2 and one message that holds all the words, and no trace."""

    def check(*words: str, arguments: tuple = (), model: Path = model, calibration: Path = calibration) -> Result:
        before = sorted(os.listdir(tmp_path))
        output = tmp_path / "made" / "pruned"
        result = distprune("prune", model, "-o", output, "--calibration", calibration, "--device", "cpu", *arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        message = result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert message.startswith("distprune: ")
        for word in words:
            assert str(word) in message
        assert sorted(set(os.listdir(tmp_path)) - {"made"}) == before
        assert not list((tmp_path / "made").glob("*"))
        return result

    return check
