"""A Slurm of one machine: ``srun`` and ``scontrol`` do here what they would have other nodes do."""

from __future__ import annotations

from pathlib import Path

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) tr , '\\n' <<<"$3" ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


def write_stubs(folder: Path, **scripts: str) -> Path:
    """Write ``srun``, ``scontrol`` and other ``scripts`` into a new folder for PATH. Returns it."""
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **scripts}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder
