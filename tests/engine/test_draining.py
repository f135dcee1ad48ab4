"""Workers on nodes that are about to go, as spot machines are told, and what becomes of their calls."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import pytest

from distprune.engine.scheduler.durations import Durations
from distprune.engine.scheduler.nodes import Node
from distprune.engine.scheduler.pool import Call, Step, WorkerPool
from distprune.engine.telemetry.log import RunLog, json_lines
from distprune.engine.telemetry.progress import Progress, Together
from distprune.engine.worker.task import Task
from distprune.errors import WorkersLost

# ------------------------------------------------------------------ the pool, on a clock that jumps


class Vanished(Exception):
    """The worker of a call is gone."""


@dataclass(frozen=True, eq=False)
class Result:
    """What a call gives, and when."""

    at: float
    value: Any


@dataclass(frozen=True)
class Drain:
    """A node is said to be gone in so many seconds, which is known from a moment on; it is when it is."""

    known: float
    told: float
    gone: float = inf


class Machines:
    """Stands in for Ray: worker "0" is on the first node, and so on; a call takes as long as its last argument says."""

    lost = (Vanished,)

    def __init__(self, nodes: Sequence[str], drains: Mapping[str, Drain]):
        self.clock, self.begun, self.stopped = 0.0, [], {}
        self._nodes, self._drains = nodes, drains
        self._free: dict[str, float] = {}

    def start_worker(self, number: int, avoided=()) -> str:
        self._free[str(number)] = self.clock
        return str(number)

    def node(self, worker: str) -> str:
        return self._nodes[int(worker)]

    def ready(self, worker: str) -> Result:
        return Result(self.clock, Node(self.node(worker), self.node(worker), "CPU", None, 2**40))

    def call(self, worker: str, task: Task, values: Sequence[Any]) -> list[Result]:
        given, seconds = values
        begins = max(self.clock, self._free[worker])
        ends = self._free[worker] = begins + seconds
        self.begun.append((begins, worker, given))
        drain = self._drains.get(self.node(worker))
        return [Result(drain.gone, Vanished()) if drain and drain.gone < ends else Result(ends, given)]

    def wait(self, results, count=1, timeout=None) -> list[Result]:
        first = min(results, key=lambda result: result.at)
        self.clock = max(self.clock, min(first.at, inf if timeout is None else self.clock + timeout))
        return [first] if first.at <= self.clock else []

    def fetch(self, results) -> list[Any]:
        if isinstance(results[0].value, Vanished):
            raise results[0].value
        return [result.value for result in results]

    def draining(self) -> dict[str, float]:
        known = {node: drain for node, drain in self._drains.items() if drain.known <= self.clock}
        return {node: drain.known + drain.told - self.clock for node, drain in known.items()}

    def holds_results_of(self, site) -> bool:
        return False

    def stop(self, workers, starting) -> None:
        self.stopped |= dict.fromkeys(workers, self.clock)

    def now(self) -> float:
        return self.clock


@dataclass(frozen=True)
class Timed(Task):
    """Gives ``index`` after some seconds."""

    index: Any
    seconds: float


class Solve(Timed):
    pass


class Open(Timed):
    pass


class Sweep(Timed):
    pass


class Close(Timed):
    pass


class Other(Timed):
    pass


class Run:
    """Calls on two workers, of which the first is on node "a"; one more can be asked for."""

    def __init__(self, drain: Drain, progress: Progress | None = None):
        self.machines = Machines(["a", "b", "c"], {"a": drain})
        self.pool = WorkerPool(self.machines, 2, progress)
        assert self.pool.are_up(2, None)
        self.given: list[Any] = []

    def calls(self, *seconds: float) -> Run:
        for number, each in enumerate(seconds):
            self.pool.submit(Solve(number, each), self.given.append)
        return self

    def done(self) -> Machines:
        self.pool.run()
        return self.machines

    def begun_on(self, worker: str) -> list[float]:
        return [at for at, by, *_ in self.machines.begun if by == worker]


def test_a_worker_that_ray_gives_up_starting_ends_the_run_with_one_message():
    machines = Machines(["a"], {})
    machines.ready = lambda worker: Result(0.0, Vanished("the actor was cancelled"))
    pool = WorkerPool(machines, 1)
    with pytest.raises(WorkersLost, match=r"could not be started.*ray status.*the actor was cancelled"):
        pool.are_up(1, None)


def test_a_worker_that_is_leaving_ends_its_call_and_gets_no_other():
    run = Run(Drain(known=15, told=1000)).calls(*[10] * 9)
    machines = run.done()
    assert run.begun_on("0") == [0, 10]
    assert machines.stopped == {"0": 20}
    assert sorted(run.given) == list(range(9)) and len(machines.begun) == 9
    # Another was asked for as soon as that was known.
    assert run.begun_on("2")[0] < 17


def test_a_worker_without_a_call_leaves_at_once():
    run = Run(Drain(known=3, told=1000)).calls(2, 10)
    assert run.done().stopped["0"] == pytest.approx(3, abs=1)
    assert run.begun_on("2") == []


def test_a_call_that_can_not_end_in_time_is_given_to_another():
    run = Run(Drain(known=22, told=4)).calls(*[10] * 6)
    machines = run.done()
    assert run.begun_on("0") == [0, 10, 20]
    assert 22 <= machines.stopped["0"] < 24
    assert sorted(run.given) == list(range(6)) and len(machines.begun) == 7
    again = [call for call in machines.begun if call[2] == 4]
    assert [worker for _, worker, _ in again] == ["0", "2"]


def test_a_call_that_ends_in_time_is_kept():
    run = Run(Drain(known=22, told=9)).calls(*[10] * 6)
    assert len(run.done().begun) == 6
    assert run.machines.stopped == {"0": 30}


def test_a_call_of_which_nobody_knows_how_long_it_takes_is_kept_until_the_node_goes():
    run = Run(Drain(known=2, told=20)).calls(15, 50, 50)
    assert len(run.done().begun) == 3
    run = Run(Drain(known=2, told=20)).calls(50, 30)
    machines = run.done()
    assert machines.stopped["0"] == pytest.approx(22, abs=1)
    assert sorted(run.given) == [0, 1] and run.begun_on("2") == [machines.stopped["0"]]


def test_a_call_ends_where_nobody_knows_when_the_node_goes():
    run = Run(Drain(known=22, told=inf)).calls(10, 10, 10, 10, 500, 10)
    machines = run.done()
    assert machines.stopped == {"0": 20 + 500} and len(machines.begun) == 7  # it straggles, so another begins it too
    assert run.begun_on("0") == [0, 10, 20]


def test_a_node_that_goes_sooner_than_told_costs_a_call_and_counts_as_no_loss():
    run = Run(Drain(known=22, told=100, gone=25)).calls(*[10] * 6)
    calls = list(run.pool._queue) + [flight.attempt.call for flight in run.pool._in_flight.values()]
    machines = run.done()
    assert sorted(run.given) == list(range(6)) and len(machines.begun) == 7
    assert [call.losses for call in calls] == [0] * 6
    assert machines.stopped == {"0": 25} and run.pool.workers == ["1", "2"]


STEPS = (Open, 1.0), (Sweep, 10.0), (Sweep, 10.0), (Close, 5.0)


def take_steps(run: Run, known: int = len(STEPS)) -> Any:
    """The first worker gets a call of several steps, of which it knows the first so many; each like was seen before."""
    for kind, seconds in STEPS * 2:
        for _ in range(2):
            run.pool._durations.add(kind.kind(), seconds)
    call = run.pool.submit_steps(len(STEPS))
    for number in range(known):
        add_step(run, call, number)
    return call


def add_step(run: Run, call: Any, number: int) -> None:
    kind, seconds = STEPS[number]
    run.pool.add_step(call, kind(f"step {number}", seconds), run.given.append)


def test_a_call_of_several_steps_begins_anew_with_another_worker_if_its_last_can_not_end_in_time():
    run = Run(Drain(known=12, told=10))  # it needs 14
    call = take_steps(run)
    machines = run.done()
    assert run.given == [f"step {number}" for number in range(4)]
    assert (call.losses, call.copies) == (0, 0)
    assert machines.stopped["0"] == pytest.approx(12, abs=1)
    assert [step for _, worker, step in machines.begun if worker == "1"] == run.given


def test_a_call_of_several_steps_that_can_all_end_in_time_stays():
    run = Run(Drain(known=12, told=15))
    take_steps(run)
    machines = run.done()
    assert run.given == [f"step {number}" for number in range(4)] and len(machines.begun) == 4
    assert machines.stopped == {"0": 26}


def test_a_worker_that_waits_for_its_next_step_leaves_when_there_is_no_time_for_it_any_more():
    run = Run(Drain(known=12, told=24))
    call = take_steps(run, known=2)
    run.pool.submit(Other("other", 40.0), lambda _: [add_step(run, call, number) for number in (2, 3)])
    machines = run.done()
    # The two steps that it waits for take 15 or, as if both were like the last one that is known, 20 seconds.
    assert machines.stopped["0"] == pytest.approx(36 - 20, abs=1.1)
    assert run.given == [f"step {number}" for number in range(4)]
    assert [step for _, worker, step in machines.begun if worker == "2"] == run.given


def test_a_worker_that_is_leaving_is_not_taken_from_its_call_for_an_earlier_one():
    """As others are that wait for their next step, where a call before theirs was lost."""

    class Loses(Progress):
        def draining(self, worker, seconds):
            run.pool._enqueue(earlier)

    run = Run(Drain(known=12, told=inf), Loses())
    earlier = Call(next(run.pool._orders), 1, [Step(Other("earlier", 3.0), run.given.append)])
    call = take_steps(run, known=2)
    run.pool.submit(Other("other", 40.0), lambda _: [add_step(run, call, number) for number in (2, 3)])
    machines = run.done()
    assert [step for _, worker, step in machines.begun if worker == "0"] == [f"step {number}" for number in range(4)]
    assert [step for _, worker, step in machines.begun if worker == "2"] == ["earlier"]
    assert machines.stopped == {"0": 55}


def test_the_log_and_whoever_watches_are_told():
    seen = []

    class Watch(Progress):
        def draining(self, worker, seconds):
            seen.append((str(worker), round(seconds)))

        def left(self, worker):
            seen.append((str(worker), "left"))

    stream = io.StringIO()
    with json_lines(stream):
        Run(Drain(known=22, told=4), Together(Watch(), RunLog("run"))).calls(*[10] * 6).done()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = {line["event"]: line for line in lines}
    assert told["worker draining"] | {"worker": 0, "node": "a"} == told["worker draining"]
    assert told["worker draining"]["seconds_left"] == pytest.approx(4, abs=1)
    assert told["call given up"] | {"worker": 0, "node": "a", "call": "solve", "layer": 4} == told["call given up"]
    assert told["worker sent away"]["worker"] == 0
    assert [what for _, what in seen] == [pytest.approx(4, abs=1), "left"]
    assert {who for who, _ in seen} == {"a/0"}


def test_the_time_left_of_several_steps_is_known_once_each_was_seen_three_times():
    durations = Durations()
    for seconds in (1, 9, 2):
        assert durations.left(["sweep", "sweep"], spent=0) == inf
        durations.add("sweep", seconds)
    assert durations.left(["sweep", "sweep"], spent=0.5) == 1.5 + 2
    assert durations.left(["sweep", "sweep"], spent=5) == 2
    assert durations.left(["sweep", "close"], spent=0) == inf
    assert durations.left([], spent=0) == inf


# ------------------------------------------------------------------ a cluster of three nodes, one of which is drained

PREEMPTED = """
import json, subprocess, sys, threading
import ray
from ray.cluster_utils import Cluster
import distprune
from distprune.engine.telemetry.progress import Progress

model, calibration, output, seconds = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(3)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

def drain(node):
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
    command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", seconds], check=True, capture_output=True)

class Drains(Progress):
    # As soon as the dense pass is done with the first layer, and all workers are at others.
    def stage(self, name, total, done=0):
        self.name, self.done = name, done
    def advance(self):
        self.done += 1
        if (self.name, self.done) == ("Dense pass", 1):
            drain(nodes[0])

distprune.prune(model, output, calibration=calibration, method="olica", sparsity=0.3, device="cpu", micro_batch=1,
                max_shard_size=60_000, workers="3:3", progress=Drains())
ray.shutdown()
cluster.shutdown()
"""


def preempt(model, calibration, output, seconds: int) -> list[dict]:
    """The log of a run on three nodes, of which one is said to be gone in so many seconds."""
    arguments = [sys.executable, "-c", PREEMPTED, *map(str, (model, calibration, output, seconds))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (output / "distprune_log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 60])
def test_a_run_on_a_node_that_ray_drains_loses_nothing(run, dense_path, calibration_path, digests, tmp_path, seconds):
    output = tmp_path / "pruned"
    log = preempt(dense_path, calibration_path, output, seconds)
    assert digests(output) == digests(run(sparsity=0.3, max_shard_size=60_000, micro_batch=1)[0])
    [draining] = [line for line in log if line["event"] == "worker draining"]
    assert draining["seconds_left"] <= seconds and draining["node"]
    [away] = [line for line in log if line["event"] == "worker sent away"]
    assert away["worker"] == draining["worker"]
    assert [line["worker"] for line in log if line["event"] == "worker asked for"] == [0, 1, 2, 3]
    later = log[log.index(away) :]
    assert not [line for line in later if line["event"] == "call started" and line["worker"] == away["worker"]]
    assert not [line for line in log if line["event"] == "worker lost"]
