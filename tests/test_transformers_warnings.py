"""Opening a pruned checkpoint warns of nothing that its user could fix."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distprune.transformers_warnings import LOGGER

OPEN = {
    "checkpoint": "from distprune.checkpoint import Checkpoint; Checkpoint.open(folder)",
    "load": "import distprune; distprune.load(folder)",
    "transformers alone": "import transformers; transformers.AutoConfig.from_pretrained(folder)",
}
OTHERS = f"import logging; logging.getLogger({LOGGER!r}).warning('no')"


@pytest.mark.parametrize("way", OPEN)
def test_layers_that_differ_are_not_warned_of_but_all_else_is(pruned, way):
    code = f"import pathlib; folder = pathlib.Path({str(pruned[0])!r}); {OPEN[way]}; {OTHERS}"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert ("per-layer attribute" in said) == (way == "transformers alone")
    assert "no" in said.split()
