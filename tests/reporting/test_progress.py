"""Progress is bars and a line a worker on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from distprune.engine.telemetry.progress import Assignment, Progress, WorkerName
from distprune.engine.worker import check_tasks, distill_task, end_to_end_tasks, expert_tasks, pass_tasks, write_tasks  # noqa: F401
from distprune.engine.worker.task import Task
from distprune.reporting import console_progress
from distprune.reporting.assignment_words import WORDS, in_words
from distprune.reporting.live_progress import PlainProgress, TerminalProgress, clock

A, B = WorkerName(0, "node-a"), WorkerName(1, "node-b")


def go_through(progress: Progress) -> None:
    with progress:
        progress.stage("Dense pass", 8)
        for _ in range(8):
            progress.advance()
        progress.note("took [long] enough")
        progress.stage("Pruning", 2)
        progress.advance()
        progress.advance()


def picture(progress: TerminalProgress, height: int = 40) -> list[str]:
    """What the terminal shows now."""
    file = io.StringIO()
    Console(file=file, width=100, height=height).print(progress._picture())
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_away_from_a_terminal_there_are_a_few_plain_lines():
    file = io.StringIO()
    progress = console_progress(Console(file=file, width=20))
    assert type(progress) is PlainProgress
    go_through(progress)
    assert file.getvalue().splitlines() == [
        "Dense pass ...",
        "Dense pass: 2/8",
        "Dense pass: 4/8",
        "Dense pass: 6/8",
        "Dense pass: 8/8",
        "took [long] enough",
        "Pruning ...",
        "Pruning: 1/2",
        "Pruning: 2/2",
    ]


def test_plain_lines_tell_the_time_left_the_lost_and_come_at_least_once_a_minute():
    file, now = io.StringIO(), [0.0]
    progress = PlainProgress(Console(file=file, width=200), lambda: now[0])
    progress.stage("Pruning", 80)
    for worker in (A, B):
        progress.joining(WorkerName(worker.number))
        progress.joined(worker)
        progress.began(worker, Assignment("prune", worker.number))
    for layer in range(2, 10):
        worker = (A, B)[layer % 2]
        now[0] += 40 * (worker is A)
        progress.ended(worker, Assignment("prune", layer - 2), 40.0)
        progress.began(worker, Assignment("prune", layer))
        progress.advance()
    progress.lost(B, Assignment("prune", 9))
    progress.joining(B)
    assert file.getvalue().splitlines() == [
        "Pruning ...",
        "Pruning: 2/80, 26:00 left",
        "Pruning: 6/80, 24:40 left",
        "node-b/1 is lost in 'prune, layer 9', which another takes",
    ]


def test_on_a_terminal_there_is_a_bar_a_stage():
    file = io.StringIO()
    progress = console_progress(Console(file=file, force_terminal=True, width=100))
    assert type(progress) is TerminalProgress
    go_through(progress)
    for text in ("Dense pass", "8/8", "took [long] enough", "Pruning", "2/2"):
        assert text in file.getvalue()


def test_on_a_terminal_there_is_a_line_for_each_worker():
    now = [0.0]
    progress = TerminalProgress(Console(file=io.StringIO(), force_terminal=True, width=100, height=40), lambda: now[0])
    progress.stage("Pruning", 80)
    for worker in (A, B):
        progress.joining(WorkerName(worker.number))
    progress.joined(A)
    progress.began(A, Assignment("prune", 0))
    now[0] = 65.0
    assert [line.split() for line in picture(progress)[1:]] == [
        ["worker", "does", "for"],
        ["node-a/0", "prune,", "layer", "0", "1:05"],
        ["worker", "1", "joining", "1:05"],
    ]
    progress.ended(A, Assignment("prune", 0), 65.0)
    progress.advance()
    progress.joined(B)
    progress.began(B, Assignment("prune", 1))
    now[0] = 70.0
    bar, _, *workers = picture(progress)
    assert "1/80" in bar and bar.endswith("1:25:30 left")  # 79 layers of 65 seconds, 5 of which have passed
    assert [line.split() for line in workers] == [
        ["node-a/0", "idle", "0:05"],
        ["node-b/1", "prune,", "layer", "1", "0:05"],
    ]
    progress.lost(B, Assignment("prune", 1))
    progress.joining(B)
    assert picture(progress)[3].split() == ["node-b/1", "lost,", "joining", "again", "0:00"]


def test_a_stage_that_is_done_has_a_check_mark_and_no_time_left():
    now = [0.0]
    progress = TerminalProgress(Console(file=io.StringIO(), force_terminal=True, width=100, height=40), lambda: now[0])
    progress.stage("Pruning", 3)
    progress.began(A, Assignment("prune", 0))
    now[0] = 60.0
    progress.ended(A, Assignment("prune", 0), 60.0)
    progress.advance()
    progress.began(A, Assignment("prune", 1))
    assert picture(progress)[0].endswith("2:00 left")
    for _ in range(2):
        progress.advance()
    progress.stage("Copying embedding and head", 2)
    pruned, copied, *_ = picture(progress)
    assert pruned.startswith("✓ Pruning") and "3/3" in pruned and "left" not in pruned
    assert pruned.index("3/3") == copied.index("0/2")  # a longer name moves nothing


def test_until_the_first_stage_the_terminal_says_what_it_waits_for():
    now = [0.0]
    progress = TerminalProgress(Console(file=io.StringIO(), force_terminal=True, width=100, height=40), lambda: now[0])
    now[0] = 9.0
    assert picture(progress)[0].endswith("Starting workers   0:09")
    progress.stage("Dense pass", 2)
    assert not any("Starting" in line for line in picture(progress))


@pytest.mark.parametrize("width", [80, 110])
def test_no_line_is_wider_than_the_terminal(width):
    progress = TerminalProgress(Console(file=io.StringIO(), force_terminal=True, width=width, height=40))
    progress.stage("Copying embedding and head", 1126)
    progress._bars.update(progress._stage, left="25:01:01 left")
    file = io.StringIO()
    Console(file=file, width=width).print(progress._bars.get_renderable())
    [line] = file.getvalue().splitlines()
    assert "Copying embedding and head" in line and "0/1126" in line and "25:01:01 left" in line


def test_a_note_on_a_terminal_breaks_between_words():
    file = io.StringIO()
    with console_progress(Console(file=file, force_terminal=True, width=20, soft_wrap=True)) as progress:
        progress.note("The calibration set has few tokens")
    assert "The calibration set\nhas few tokens" in "\n".join(line.strip() for line in file.getvalue().splitlines())


def test_words_are_for_tasks_that_there_are():
    assert WORDS.keys() <= {task.kind() for task in subclasses(Task)}
    assert in_words(Assignment("close_layer", 3)) == "finish statistics, layer 3"
    assert in_words(Assignment("step_optimizer")) == "optimizer step"
    assert in_words(Assignment("prune_experts", 1)) == "prune experts, layer 1"


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_workers_that_have_no_room_on_the_terminal_are_counted():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=15)
    progress = TerminalProgress(console)
    progress.stage("Pruning", 80)
    for number in range(6):
        progress.joined(WorkerName(number, "node"))
    for number in range(5):
        progress.began(WorkerName(number, "node"), Assignment("prune", number))
    lines = picture(progress)[1:]
    assert [line.split()[0] for line in lines] == ["worker", "node/0", "node/1", "4"]
    assert "3 at work, 1 idle" in lines[-1]


def test_the_terminal_is_given_back_when_the_run_fails():
    progress = console_progress(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(KeyboardInterrupt), progress:
        progress.stage("Pruning", 2)
        raise KeyboardInterrupt
    assert not progress._live.is_started


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (90061, "25:01:01")])
def test_times_are_written_as_on_a_clock(seconds, text):
    assert clock(seconds) == text
