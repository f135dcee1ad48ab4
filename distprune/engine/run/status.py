"""How far a run is, alive or not, from what lies beside its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distprune.checkpoint import is_locked, partial_directory
from distprune.engine.run.journal import Journal
from distprune.engine.run.layer_files import DISTILLED, PRUNED
from distprune.engine.run.record import load_record
from distprune.engine.run.work_folder import OUTLINE, Outline, WorkFolder
from distprune.engine.stages.dense_pass import PASSED, PROFILE
from distprune.errors import InputError

# The stage that not every run has, as the record's seconds call it.
GRADIENT_PASS = "gradient pass"


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        state: "running"; "stopped", to be gone on with by the same command; or "finished".
        run: what it is about.
        layers_done: by stage, in the order of the stages.
        seconds: spent in each stage so far.
    """

    state: Literal["running", "stopped", "finished"]
    run: Outline
    layers_done: Mapping[str, int]
    seconds: Mapping[str, float]


def status(output: Path) -> RunStatus:
    """The status of the run that makes, or has made, ``output``.

    Raises:
        InputError: there is no such run.
    """
    try:
        return status_of_unfinished(WorkFolder(partial_directory(output)))
    except FileNotFoundError:  # none has begun, or it ends just now
        return status_of_finished(output)


def status_of_unfinished(work: WorkFolder) -> RunStatus:
    """The status from what the run has left in its folder so far.

    Raises:
        FileNotFoundError: it has left nothing, or it is clearing its folder away.
    """
    outline = Outline(**work.journal.report(OUTLINE))
    state = "running" if is_locked(work.folder) else "stopped"
    return RunStatus(state, outline, layers_done(work.journal, outline), work.seconds())


def status_of_finished(output: Path) -> RunStatus:
    """The status from the record beside the result."""
    if not output.is_dir():
        raise InputError(f"{output}: no run has made it, and none has begun to. Give a run's --output.")
    record = load_record(output)
    layers = len(record.layers)
    distilled = any(layer.distillation for layer in record.layers)
    has_gradients = GRADIENT_PASS in record.seconds
    outline = Outline(record.model, record.method, record.sparsity_asked, layers, distilled, has_gradients)
    return RunStatus("finished", outline, {stage: layers for stage in stages_of(outline)}, record.seconds)


def layers_done(journal: Journal, outline: Outline) -> dict[str, int]:
    return {stage: journal.count(kind) for stage, kind in stages_of(outline).items()}


def stages_of(outline: Outline) -> dict[str, str]:
    """The stages that go layer by layer, and the kind of journal entry that each leaves for a layer."""
    passes = {"dense pass": PASSED, GRADIENT_PASS: PROFILE} if outline.has_gradients else {"dense pass": PROFILE}
    stages = passes | {"prune": PRUNED}
    return stages | {"distill": DISTILLED} if outline.distilled else stages
