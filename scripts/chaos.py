"""Many prunes of a small model on a Ray cluster where, at random moments, workers, nodes and drivers are lost.

    python scripts/chaos.py --runs 50 --seed 0

Each must end with the same bytes as the undisturbed run of the same configuration. A driver that was ended is started
again with the same command. Should some kind of fault have hit nothing in so many runs, there are more, up to twice as
many. Ends with status 1 if a run failed, hung, left something behind or gave other bytes, or a kind of fault never hit;
then the logs and folders stay. The seed decides on configurations, faults and the step of a run at which each strikes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

# Before torch is imported, here and in the driver processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from chaos_cluster import Cluster
from chaos_driver import MIXTURE_SETTINGS, SETTINGS, Driver, Setting, make_calibration, make_model
from chaos_faults import FAULTS, Scene
from rich.console import Console
from rich.table import Table

from distprune import InputError, status
from distprune.checkpoint import partial_directory
from distprune.engine.run.record import CONFIG_FILE, LOG_FILE, RECORD_FILE, REPORT_FILE

MOST_FAULTS = 3  # in one run
LOOK_EVERY = 0.05  # seconds
ENDED_BY_SIGNAL = {130, *(-sent for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT))}
console = Console(soft_wrap=True)


class Deck:
    """Deals every card once, in random order, before it deals one again."""

    def __init__(self, cards: list, random: Random):
        self._cards, self._random, self._stack = cards, random, []

    def deal(self):
        if not self._stack:
            self._stack = self._random.sample(self._cards, len(self._cards))
        return self._stack.pop()

    def put_back(self, card) -> None:
        """Deal it again, when all the others have been."""
        self._stack.insert(0, card)


@dataclass(frozen=True)
class Planned:
    """A fault, and the step of the run after which it strikes, so many seconds later. Step 0 is while it starts."""

    kind: str
    step: int
    delay: float


@dataclass
class Trial:
    """How a run went."""

    seconds: float = 0.0
    resumes: int = 0
    faults: Counter = field(default_factory=Counter)
    failure: str = ""


class Chaos:
    def __init__(self, folder: Path, random: Random, timeout: float, mixture: bool = False):
        self.folder, self.random, self.timeout = folder, random, timeout
        self.model, self.calibration = folder / "model", folder / "calibration.arrow"
        make_model(self.model, mixture)
        make_calibration(self.model, self.calibration)
        self.scene = new_scene(random)
        self.faults = Deck(list(FAULTS), random)
        self.undisturbed: dict[Setting, str] = {}

    def close(self) -> None:
        self.scene.calm()
        self.scene.cluster.close()

    def renew_cluster(self) -> None:
        """A failed run may have left it in any state."""
        self.scene.cluster.close()
        self.scene = new_scene(self.random)

    def try_out(self, setting: Setting, name: str) -> Trial:
        """A disturbed run, after an undisturbed one where there was none of that setting yet."""
        if setting not in self.undisturbed:
            calm = self.run(setting, self.folder / f"{name}-undisturbed", [])
            if calm.failure:
                return calm
            self.undisturbed[setting] = digest(self.folder / f"{name}-undisturbed")
        output = self.folder / name
        trial = self.run(setting, output, self.plan_faults(setting))
        trial.failure = trial.failure or self.judge(setting, output)
        if trial.failure:
            self.renew_cluster()
        else:
            shutil.rmtree(output)
        return trial

    def judge(self, setting: Setting, output: Path) -> str:
        left = sorted(file.name for file in output.parent.glob(f"{output.name}.*") if file.suffix != ".log")
        if left:
            return f"left behind: {', '.join(left)}"
        return "" if digest(output) == self.undisturbed[setting] else "other bytes than the undisturbed run's"

    def plan_faults(self, setting: Setting) -> list[Planned]:
        """Half of them strike during the stages; the others before the first step or after the last."""
        planned = []
        for number in range(self.random.randint(1, MOST_FAULTS)):
            middle = self.random.choices(range(1, setting.steps), k=2)
            step = self.random.choice((0, *middle, *([setting.steps] if number else [])))
            planned.append(Planned(self.faults.deal(), step, self.random.uniform(0, 0.3 if step else 8)))
        return planned

    def run(self, setting: Setting, output: Path, planned: list[Planned]) -> Trial:
        """Prune, with faults, and resume as often as the driver was ended by one of them."""
        trial, log, began = Trial(), output.with_name(f"{output.name}.log"), time.monotonic()
        driver = self.scene.driver = self.start(setting, output, log)
        reached: dict[int, float] = {}
        while not trial.failure:
            now = time.monotonic()
            self.scene.do_what_is_due()
            reached.setdefault(steps_done(output), now)
            for fault in [fault for fault in planned if is_due(fault, reached, now)]:
                if FAULTS[fault.kind](self.scene):  # or else a moment later
                    planned.remove(fault)
                    trial.faults[fault.kind] += 1
            if not driver.is_alive:
                if driver.exit_status == 0 or is_published(output):
                    break
                if driver.exit_status not in ENDED_BY_SIGNAL or trial.resumes == drivers_ended(trial):
                    trial.failure = f"ended with status {driver.exit_status}:\n{tail(log)}"
                    break
                trial.resumes += 1
                driver = self.scene.driver = self.start(setting, output, log)
            if now - began > self.timeout:
                driver.tell_where_it_is()
                trial.failure = f"hangs after {steps_done(output)} of {setting.steps} steps:\n{tail(log)}"
            time.sleep(LOOK_EVERY)
        driver.end()
        for missed in planned:  # the run was over before
            self.faults.put_back(missed.kind)
        self.scene.calm()
        trial.seconds = time.monotonic() - began
        return trial

    def start(self, setting: Setting, output: Path, log: Path) -> Driver:
        options = {
            "--output": output,
            "--calibration": self.calibration,
            "--sparsity": 0.3,
            "--micro-batch": 8,
            "--max-shard-size": 200_000,
            "--workers": self.random.choice(("1:1", "1:2", "1:2", "1:3")),
            "--weights": self.random.choice(("auto", "served")),
            "--writes": self.random.choice(("auto", "auto", "driver")),
            "--device": "cpu",
            "--address": self.scene.cluster.address,
        }
        given = [str(part) for option in options.items() for part in option]
        return Driver(["prune", str(self.model), *given, *setting.arguments], log)


def new_scene(random: Random) -> Scene:
    """With a source of chance of its own: how often it is asked depends on the speed of the machine."""
    own = Random(random.random())
    return Scene(Cluster(own), own)


def is_due(fault: Planned, reached: Mapping[int, float], now: float) -> bool:
    """Whether a step from the fault's on was reached so many seconds ago."""
    return any(fault.step <= step and fault.delay <= now - at for step, at in reached.items())


def steps_done(output: Path) -> int:
    """Layers that are done, of all stages."""
    try:
        return sum(status(output).layers_done.values())
    except InputError:  # it has not begun
        return 0


def is_published(output: Path) -> bool:
    """Whether there is nothing left to resume: a signal came when all was done."""
    return output.exists() and not partial_directory(output).exists()


def drivers_ended(trial: Trial) -> int:
    return sum(count for kind, count in trial.faults.items() if kind.startswith("driver"))


def digest(folder: Path) -> str:
    """SHA-256 over names and bytes of every file but those that tell times and paths."""
    total = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if file.name not in (RECORD_FILE, CONFIG_FILE, LOG_FILE, REPORT_FILE):
            total.update(str(file.relative_to(folder)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text().splitlines()[-lines:])


def all_faults(trials: list[Trial]) -> Counter:
    return sum((trial.faults for trial in trials), Counter())


def missing(trials: list[Trial]) -> set[str]:
    """Kinds of faults that have hit nothing yet."""
    return FAULTS.keys() - all_faults(trials).keys()


def summary(trials: list[Trial]) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    faults = all_faults(trials)
    table.add_row("prunes", str(len(trials)))
    table.add_row("faults that hit", str(faults.total()))
    for kind in FAULTS:
        table.add_row(f"  {kind}", str(faults[kind]))
    table.add_row("resumes", str(sum(trial.resumes for trial in trials)))
    table.add_row("results identical to the undisturbed run's", str(sum(not trial.failure for trial in trials)))
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="disturbed prunes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=int, help="configurations to choose from; all by default")
    parser.add_argument("--no-more", action="store_true", help="runs than that, whatever faults have hit nothing")
    parser.add_argument("--mixture", action="store_true", help="of a mixture of experts, whole layers and in chunks")
    parser.add_argument("--timeout", type=float, default=240, help="seconds after which a prune is said to hang")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    random = Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    every = MIXTURE_SETTINGS if arguments.mixture else SETTINGS
    settings = Deck(random.sample(every, arguments.settings or len(every)), random)
    chaos, trials = Chaos(folder, random, arguments.timeout, arguments.mixture), []
    most = arguments.runs if arguments.no_more else 2 * arguments.runs
    while len(trials) < arguments.runs or (missing(trials) and len(trials) < most):
        setting = settings.deal()
        trial = chaos.try_out(setting, f"run-{len(trials):03}")
        trials.append(trial)
        faults = ", ".join(trial.faults.elements()) or "no fault"
        verdict = trial.failure or "identical"
        console.print(
            f"{len(trials)}: {setting}; {faults}; {trial.seconds:.0f} s; {verdict}", markup=False, highlight=False
        )
    chaos.close()
    console.print(summary(trials))
    if (missing(trials) and not arguments.no_more) or any(trial.failure for trial in trials):
        console.print(f"Logs and folders: {folder}", highlight=False)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
