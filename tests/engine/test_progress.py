"""What a run tells: to nobody, or to several at once."""

from __future__ import annotations

import inspect

from distprune.engine.telemetry.progress import Assignment, Progress, Together, WorkerName

WORKER = WorkerName(3, "node")
TOLD = {
    "stage": ("Pruning", 4, 1),
    "advance": (),
    "note": ("a note",),
    "joining": (WorkerName(3),),
    "joined": (WORKER,),
    "began": (WORKER, Assignment("prune", 2)),
    "ended": (WORKER, Assignment("prune", 2), 1.5),
    "lost": (WORKER, None),
    "left": (WORKER,),
    "draining": (WORKER, 30.0),
    "gave_up": (WORKER, Assignment("prune", 2)),
    "moved": (10,),
}


def noting(notes: list) -> Progress:
    """Notes everything that it is told."""

    def note(name: str):
        return lambda self, *details: notes.append((name, details))

    return type("Noting", (Progress,), {name: note(name) for name in TOLD})()


def test_several_are_all_told_everything():
    """Every method of the interface, so that a new one can't be forgotten."""
    methods = {name for name, _ in inspect.getmembers(Progress, inspect.isfunction) if not name.startswith("_")}
    assert methods == set(TOLD)
    first, second = [], []
    together = Together(noting(first), noting(second))
    for name, details in TOLD.items():
        getattr(together, name)(*details)
    assert first == second == list(TOLD.items())


def test_the_silent_progress_says_nothing(capsys):
    for name, details in TOLD.items():
        getattr(Progress(), name)(*details)
    assert capsys.readouterr() == ("", "")


def test_workers_and_their_assignments_have_names():
    assert [str(WorkerName(3)), str(WORKER)] == ["worker 3", "node/3"]
    assert [str(Assignment("check_outer")), str(Assignment("open_forward", 7))] == ["check outer", "open forward 7"]
