"""What each worker did when, out of a run's log."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

#: Events of the log with which a process begins to drive the run.
BEGINNINGS = ("run started", "run resumed")
#: Calls of one stage on one worker become one bar where the gap between them is less than this share of the run.
GAP = 1 / 1500

#: What an event is about: worker, call and layer.
Key = tuple[int, str, int | None]


@dataclass(frozen=True)
class Span:
    """Calls of one worker, one after the other, in one stage; times are in seconds since the first worker was up.

    Attributes:
        calls: what they were called, without repetitions, in order.
        layers: the first and the last layer that they were about; None where they were about none.
        count: how many calls.
        busy: seconds in which the worker worked on them.
        lost: whether the last of them was lost with its worker, or given up.
    """

    worker: str
    stage: str
    start: float
    end: float
    calls: tuple[str, ...]
    layers: tuple[int, int] | None
    count: int = 1
    busy: float = 0.0
    lost: bool = False


@dataclass
class Timeline:
    """All that happened on the workers.

    Attributes:
        spans: by time.
        waited: seconds until the first worker was up.
        resumed: when the run was gone on with; the time between is left out.
        up: seconds that all workers were up together.
        end: when the last event was.
    """

    spans: list[Span] = field(default_factory=list)
    waited: float = 0.0
    resumed: list[float] = field(default_factory=list)
    up: float = 0.0
    end: float = 0.0

    @property
    def workers(self) -> list[str]:
        return sorted({span.worker for span in self.spans}, key=natural)

    @property
    def stages(self) -> list[str]:
        """In the order in which they began."""
        return list(dict.fromkeys(span.stage for span in self.spans))

    @property
    def busy(self) -> float:
        """The share of the time in which workers were up that they worked."""
        return sum(span.busy for span in self.spans) / self.up if self.up else 0.0


def read_events(log: str) -> list[dict[str, Any]]:
    """The events in a run's log, a JSON object a line; a line that is none, torn off in a crash, is left out."""
    events = []
    for line in log.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"time", "event"} <= event.keys():
            events.append(event)
    return events


def timeline_of(events: Sequence[Mapping[str, Any]]) -> Timeline:
    """The timeline that the events tell of."""
    timed = list(without_pauses(events))
    first = next((time for time, event in timed if event["event"] == "worker up"), 0.0)
    timeline = Timeline(waited=first, end=max((time for time, _ in timed), default=0.0) - first)
    began: dict[Key, tuple[float, str]] = {}
    up: dict[str, float] = {}
    for time, event in ((time - first, event) for time, event in timed):
        worker = worker_of(event)
        match event["event"]:
            case "run resumed":
                timeline.resumed.append(time)
                timeline.up += together(up, time)
                began.clear()
            case "worker up":
                up[worker] = time
            case "call started":
                began[key_of(event)] = time, event.get("stage", "")
            case "call ended" | "call given up" | "worker lost" if key_of(event) in began:
                timeline.spans.append(span_of(event, *began.pop(key_of(event)), time))
        if event["event"] in ("worker lost", "worker sent away") and worker in up:
            timeline.up += time - up.pop(worker)
    timeline.up += together(up, timeline.end)
    timeline.spans = joined(timeline.spans, GAP * timeline.end)
    return timeline


def without_pauses(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Each event with the seconds since the run began, without those in which nothing drove it."""
    offset, before = None, 0.0
    for event in events:
        time = datetime.fromisoformat(event["time"]).timestamp()
        if offset is None or event["event"] in BEGINNINGS:
            offset = time - before
        before = max(before, time - offset)
        yield time - offset, event


def together(up: dict[str, float], time: float) -> float:
    """The seconds until then of the workers that are up, which are none afterwards."""
    seconds = sum(time - since for since in up.values())
    up.clear()
    return seconds


def key_of(event: Mapping[str, Any]) -> Key:
    return event.get("worker", -1), event.get("call", ""), event.get("layer")


def worker_of(event: Mapping[str, Any]) -> str:
    node, number = event.get("node"), event.get("worker")
    return f"worker {number}" if node is None else f"{node}/{number}"


def span_of(event: Mapping[str, Any], start: float, stage: str, end: float) -> Span:
    layer, call = event.get("layer"), str(event["call"]).replace("_", " ")
    lost = event["event"] != "call ended"
    busy = end - start if lost else min(float(event["seconds"]), end - start)
    layers = None if layer is None else (layer, layer)
    return Span(worker_of(event), stage, start, end, (call,), layers, busy=busy, lost=lost)


def joined(spans: Iterable[Span], gap: float) -> list[Span]:
    """Neighbours of one worker and stage as one, so that a long run doesn't have a hundred thousand bars."""
    last: dict[str, int] = {}
    result: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        place = last.get(span.worker)
        before = None if place is None else result[place]
        if before and before.stage == span.stage and not before.lost and span.start - before.end <= gap:
            result[place] = join(before, span)
        else:
            last[span.worker] = len(result)
            result.append(span)
    return result


def join(one: Span, other: Span) -> Span:
    layers = [*(one.layers or ()), *(other.layers or ())]
    return replace(
        one,
        end=max(one.end, other.end),
        calls=tuple(dict.fromkeys((*one.calls, *other.calls))),
        layers=(min(layers), max(layers)) if layers else None,
        count=one.count + other.count,
        busy=one.busy + other.busy,
        lost=other.lost,
    )


def natural(worker: str) -> tuple[str, int]:
    """Workers by node, then by number."""
    node, _, number = worker.replace(" ", "/").rpartition("/")
    return node, int(number) if number.isdecimal() else -1
