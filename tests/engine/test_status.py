"""What is told of a run from outside, while it goes, when it has stopped and when it is finished."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import pytest

from distprune import InputError, status
from distprune.checkpoint import partial_directory
from distprune.engine.run.journal import Journal
from distprune.engine.run.work_folder import OUTLINE
from distprune.engine.telemetry.progress import Progress

OPTIONS = {"sparsity": 0.3, "propagation": 2, "distill": True}


class Looks(Progress):
    """Asks for the status after every step, and interrupts the run at the second of a stage."""

    def __init__(self, output, stops_in: str | None = None):
        self.output, self.stops_in, self.seen = output, stops_in, []

    def stage(self, name, total, done=0):
        self.name, self.steps = name, 0

    def advance(self):
        self.steps += 1
        if self.name != "Checking weights":
            self.seen.append(status(self.output))
        if self.name == self.stops_in and self.steps == 2:
            raise KeyboardInterrupt


def test_a_run_is_running_then_finished_and_its_layers_are_counted(run, tmp_path):
    looks = Looks(tmp_path / "pruned")
    run(output=looks.output, progress=looks, **OPTIONS)
    assert {seen.state for seen in looks.seen} == {"running"}
    counts = [tuple(seen.layers_done.values()) for seen in looks.seen]
    assert counts[:4] == [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)]
    assert counts[4:8] == [(4, 1, 0), (4, 2, 0), (4, 3, 0), (4, 4, 0)]
    assert counts[8:12] == [(4, 4, 1), (4, 4, 2), (4, 4, 3), (4, 4, 4)]
    finished = status(looks.output)
    assert (finished.state, finished.run.method, finished.run.sparsity) == ("finished", "olica", 0.3)
    assert finished.layers_done == {"dense pass": 4, "prune": 4, "distill": 4}


def test_an_interrupted_run_is_stopped(run, tmp_path):
    looks = Looks(tmp_path / "pruned", stops_in="Pruning")
    with pytest.raises(KeyboardInterrupt):
        run(output=looks.output, progress=looks, **OPTIONS)
    stopped = status(looks.output)
    assert stopped.state == "stopped"
    assert stopped.layers_done == {"dense pass": 4, "prune": 2, "distill": 0}
    assert stopped.seconds["prune"] > 0


def test_a_run_that_ends_while_it_is_looked_at_is_finished(run, tmp_path, monkeypatch):
    """It clears its folder away between one look and the next."""
    output, _ = run(output=tmp_path / "pruned", sparsity=0.3)
    journal = Journal(partial_directory(output) / "journal")
    journal.begin({})
    journal.write(OUTLINE, asdict(status(output).run))
    assert status(output).state == "stopped"

    def clears_away(journal: Journal, _: str) -> bool:
        shutil.rmtree(journal.folder)
        return True

    monkeypatch.setattr(Journal, "has", clears_away)
    assert status(output).state == "finished"
    assert not journal.folder.exists()


def test_where_no_run_has_been_there_is_nothing_to_tell(tmp_path):
    with pytest.raises(InputError, match="no run has made it"):
        status(tmp_path / "nothing")
