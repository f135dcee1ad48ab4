"""What each worker did when, out of a log."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest

from distprune.reporting.pages.timeline import read_events, timeline_of

BEGAN = datetime(2026, 1, 1, tzinfo=timezone.utc)


def event(at: float, name: str, **fields) -> dict:
    return {"time": (BEGAN + timedelta(seconds=at)).isoformat(), "event": name, **fields}


def call(start: float, end: float, worker: int, layer: int, how: str = "call ended", stage: str = "Pruning") -> list:
    about = {"worker": worker, "node": "n", "call": "prune", "layer": layer}
    ended = {"seconds": end - start} if how == "call ended" else {}
    return [event(start, "call started", stage=stage, **about), event(end, how, stage=stage, **about, **ended)]


def up(seconds: float, worker: int) -> dict:
    return event(seconds, "worker up", worker=worker, node="n")


def test_times_count_from_the_first_worker_on():
    timeline = timeline_of([event(0, "run started"), up(10, 0), *call(12, 20, 0, layer=3)])
    assert timeline.waited == 10
    [span] = timeline.spans
    assert (span.worker, span.stage, span.start, span.end, span.layers) == ("n/0", "Pruning", 2, 10, (3, 3))


def test_workers_are_busy_for_a_share_of_the_time_that_they_are_up():
    events = [
        event(0, "run started"),
        up(0, 0),
        up(5, 1),
        *call(0, 10, 0, 0),
        *call(5, 7.5, 1, 1),
        event(10, "run done"),
    ]
    assert timeline_of(events).busy == pytest.approx((10 + 2.5) / (10 + 5))


def test_a_call_that_was_lost_is_told_apart_and_its_worker_is_up_no_longer():
    events = [event(0, "run started"), up(0, 0), *call(0, 4, 0, 2, how="worker lost"), event(8, "run done")]
    timeline = timeline_of(events)
    assert [(span.lost, span.end) for span in timeline.spans] == [(True, 4)]
    assert timeline.up == 4


def test_the_time_between_two_attempts_is_left_out():
    first = [event(0, "run started"), up(0, 0), *call(0, 4, 0, 0)]
    second = [event(1000, "run resumed"), up(1001, 0), *call(1001, 1005, 0, 1)]
    timeline = timeline_of([*first, *second])
    assert timeline.resumed == [4]
    assert [(span.start, span.end) for span in timeline.spans] == [(0, 4), (5, 9)]
    assert timeline.end == 9
    assert timeline.busy == pytest.approx(8 / 8)


def test_calls_that_follow_each_other_closely_are_one_bar():
    events = [event(0, "run started"), up(0, 0)]
    for number in range(100):
        events += call(10 * number, 10 * number + 9.999, 0, layer=number)
    events += call(1200, 1300, 0, layer=100)
    one, other = timeline_of(events).spans
    assert (one.count, one.layers) == (100, (0, 99))
    assert one.end == pytest.approx(999.999)
    assert (other.count, other.layers) == (1, (100, 100))


def test_stages_and_workers_are_told_apart():
    events = [event(0, "run started"), up(0, 0), up(0, 10), up(0, 2)]
    events += [*call(0, 1, 0, 0), *call(0, 1, 10, 1), *call(0, 1, 2, 2), *call(1, 2, 0, 0, stage="Distilling")]
    timeline = timeline_of(events)
    assert timeline.workers == ["n/0", "n/2", "n/10"]
    assert timeline.stages == ["Pruning", "Distilling"]
    assert len(timeline.spans) == 4


def test_lines_that_are_no_events_are_passed_over():
    good = event(0, "run started")
    assert read_events(f'{json.dumps(good)}\n{{"time": "2026\n[]\n') == [good]
    assert timeline_of([]).spans == []
