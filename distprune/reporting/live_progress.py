"""Progress for people: bars and a line for each worker on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from distprune.engine.telemetry.progress import Assignment, Progress, WorkerName
from distprune.reporting.assignment_words import in_words
from distprune.reporting.pace import Pace

JOINING, IDLE, LOST = "joining", "idle", "lost, joining again"
# A plain line is due when so many seconds have passed without one.
SILENCE = 60.0
# Lines of a terminal that are not for workers.
SPARED_LINES = 13
# As wide as the longest name of a stage, so that nothing moves when that begins.
NAME = len("Copying embedding and head")
# As wide as most of what workers do, so that little moves when they go on to something else.
DOES = len("finish statistics, layer 100")
# Columns of a line that are not the bar's, and the bar's at most.
BESIDE_BAR, LONGEST_BAR = 57, 40


@dataclass(frozen=True)
class Doing:
    """What a worker does, and since when."""

    name: WorkerName
    what: str
    since: float


class Spectator(Progress):
    """Keeps what every worker does now, and the stage's pace."""

    def __init__(self, console: Console, now: Callable[[], float] = monotonic):
        self._console, self._now = console, now
        self._registry: dict[int, Doing] = {}
        self._pace = Pace(now)

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._pace.stage(total, done)

    def advance(self) -> None:
        self._pace.advance()

    def joining(self, worker: WorkerName) -> None:
        self._does(worker, LOST if worker.number in self._registry else JOINING)

    def joined(self, worker: WorkerName) -> None:
        self._does(worker, IDLE)

    def began(self, worker: WorkerName, assignment: Assignment) -> None:
        self._pace.began(worker.number, assignment.layer)
        self._does(worker, in_words(assignment))

    def ended(self, worker: WorkerName, assignment: Assignment, seconds: float) -> None:
        self._pace.ended(worker.number)
        self._does(worker, IDLE)

    def lost(self, worker: WorkerName, assignment: Assignment | None) -> None:
        self._pace.gone(worker.number)
        self.note(f"{worker} is lost" + (f" in '{in_words(assignment)}', which another takes" if assignment else ""))

    def draining(self, worker: WorkerName, seconds: float | None) -> None:
        when = "soon" if seconds is None else f"in {max(0, seconds):.0f} s"
        self.note(f"{worker} takes no further calls: its node goes {when}. Another worker is asked for.")

    def gave_up(self, worker: WorkerName, assignment: Assignment | None) -> None:
        self._pace.gone(worker.number)
        what = f"'{in_words(assignment)}'" if assignment else "its call"
        self.note(f"{worker} can't end {what} before its node goes; another worker takes it")

    def left(self, worker: WorkerName) -> None:
        self._pace.gone(worker.number)
        self._registry.pop(worker.number, None)

    def _does(self, worker: WorkerName, what: str) -> None:
        self._registry[worker.number] = Doing(worker, what, self._now())


class TimeSpent(ProgressColumn):
    """How long a stage took, or has taken so far."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(clock(seconds or 0.0), style="progress.elapsed")


class DrawnProgress(Spectator):
    """A bar for each stage, and below a line for each worker."""

    def __init__(self, console: Console, now: Callable[[], float] = monotonic):
        super().__init__(console, now)
        self._stage, self._began, self._ended = None, now(), False
        self._spinner = Spinner("dots", style="progress.spinner")
        bar_width = max(1, min(LONGEST_BAR, console.width - BESIDE_BAR))
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}", table_column=Column(min_width=NAME, no_wrap=True)),
            BarColumn(bar_width, complete_style="blue", finished_style="green"),
            TextColumn("{task.completed}/{task.total}", style="progress.download", justify="right"),
            TimeSpent(table_column=Column(justify="right", no_wrap=True)),
            TextColumn("{task.fields[left]}", justify="right"),
            console=console,
        )

    def stage(self, name: str, total: int, done: int = 0) -> None:
        super().stage(name, total, done)
        if self._stage is not None:
            self._bars.update(self._stage, left="")
        self._stage = self._bars.add_task(name, total=total, completed=done, left="")

    def advance(self) -> None:
        super().advance()
        self._bars.advance(self._stage)

    def __exit__(self, *error) -> None:
        self._registry.clear()  # what stays is the bars
        self._ended = True

    def _picture(self) -> RenderableType:
        if self._stage is None:
            return Group(*([] if self._ended else [self._start()]), self._workers())
        left = self._pace.time_left()
        self._bars.update(self._stage, left=f"{clock(left)} left" if left else "")
        return Group(self._bars.get_renderable(), self._workers())

    def _start(self) -> RenderableType:
        """What is seen until the first stage begins."""
        self._spinner.update(text=f"Starting workers   {clock(self._now() - self._began)}")
        return self._spinner

    def _workers(self) -> Table:
        does, since = Column("does", min_width=DOES), Column("for", justify="right")
        table = Table("worker", does, since, box=None, padding=(0, 2), header_style="dim")
        room, now = max(1, self._console.height - SPARED_LINES), self._now()
        registry = sorted(self._registry.values(), key=lambda doing: doing.name.number)
        for doing in registry[:room]:
            style = "dim" if doing.what in (JOINING, IDLE) else "red" if doing.what == LOST else ""
            table.add_row(str(doing.name), doing.what, clock(now - doing.since), style=style)
        others = Counter(kind_of(doing) for doing in registry[room:])
        if others:
            table.add_row(f"{others.total()} more", ", ".join(f"{count} {kind}" for kind, count in others.items()))
        return table if registry else Table.grid()


class TerminalProgress(DrawnProgress):
    """The picture on a terminal, drawn anew some times a second."""

    def __init__(self, console: Console, now: Callable[[], float] = monotonic):
        super().__init__(console, now)
        self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=4)

    def __enter__(self):
        self._live.start()
        return self

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=False)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._live.stop()


def kind_of(doing: Doing) -> str:
    return doing.what if doing.what in (JOINING, IDLE, LOST) else "at work"


class PlainProgress(Spectator):
    """A line at the start of a stage, about every quarter of it, and when there was none for a minute."""

    def __init__(self, console: Console, now: Callable[[], float] = monotonic):
        super().__init__(console, now)
        self._name, self._done, self._total, self._told = "", 0, 0, now()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        super().stage(name, total, done)
        self._name, self._done, self._total = name, done, total
        self.note(f"{name} ..." + (f" ({done} of {total} done before)" if done else ""))

    def advance(self) -> None:
        super().advance()
        self._done += 1
        quarter = max(1, self._total // 4)
        if self._done % quarter == 0 or self._done == self._total:
            self._tell()

    def began(self, worker: WorkerName, assignment: Assignment) -> None:
        super().began(worker, assignment)
        if self._name and self._now() - self._told >= SILENCE:
            self._tell()

    def _tell(self) -> None:
        left = self._pace.time_left()
        self.note(f"{self._name}: {self._done}/{self._total}" + (f", {clock(left)} left" if left else ""))

    def note(self, text: str) -> None:
        self._told = self._now()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """As a clock shows it: ``4:07`` or ``1:04:07``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def console_progress(console: Console) -> Progress:
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)
