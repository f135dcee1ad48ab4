"""A pruned checkpoint says what it is."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard


def test_show(prune_here, tmp_path):
    prune_here(tmp_path / "pruned")
    print((tmp_path / "pruned" / "README.md").read_text())
