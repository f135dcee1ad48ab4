"""What a pruned checkpoint is called: the original's name, distprune, and how many parameters are left."""

from __future__ import annotations

import re

from distprune.engine.run.record import RunRecord

UNITS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}


def suggested_name(record: RunRecord) -> str:
    """The name for a pruned model that people recognize, such as ``Llama-3.1-8B-Instruct-distprune-6B``.

    It is a valid name of a repository on the Hugging Face hub.
    """
    return f"{repository_name(original_name(record.model))}-distprune-{rounded(record.total_parameters_after)}"


def original_name(model: str) -> str:
    """The last part of a hub id, path or URL, without a .gguf file's quantization and what an earlier pruning added."""
    last = re.sub(r"([.-](i?q\d\w*|b?f(16|32)))?\.gguf$", "", re.split(r"[/\\]", model.rstrip("/\\"))[-1], flags=re.I)
    return re.sub(r"-distprune-[\d.]+[TBMK]?$", "", last)


def repository_name(text: str) -> str:
    """The text with hyphens in the place of what the hub allows in no name, or of what it allows but once."""
    name = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)))
    return name.strip("-.")[:80].rstrip("-.") or "model"


def rounded(parameters: int) -> str:
    """A number of parameters as people give it: two digits below ten of a unit, whole ones from there: 1.2B, 94M."""
    for unit, size in UNITS.items():
        number = parameters / size
        if number >= 0.9995:
            return (f"{number:.1f}" if number < 9.95 else f"{number:.0f}").removesuffix(".0") + unit
    return str(parameters)
