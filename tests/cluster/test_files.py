"""Container files and shell scripts, by their linters, and the page that tells of them all."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
CONTAINERS = sorted((FOLDER / "container").iterdir())
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def linter(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"needs {name}")


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_hadolint_has_nothing_to_say_of_a_container_file(file):
    done = subprocess.run([linter("hadolint"), str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_what_a_container_file_copies_is_in_the_checkout(file):
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", file.read_text(), re.MULTILINE)
    assert copied
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name


def test_container_files_differ_in_the_build_of_pytorch_alone():
    texts = [file.read_text().partition("FROM ")[2] for file in CONTAINERS]
    cpu, cuda = (re.sub(r"(TORCH_INDEX=\S+/)\w+", r"\1BUILD", text) for text in texts)
    assert cpu == cuda


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_shellcheck_has_nothing_to_say_of_a_script(file):
    done = subprocess.run([linter("shellcheck"), str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert file.stat().st_mode & 0o111


def test_the_page_names_every_file_and_no_other():
    files = {str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*") if file.is_file()} - {"README.md"}
    rows = re.findall(r"^\| \[[^\]]+\]\(([^)]+)\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(files)
