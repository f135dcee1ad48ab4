"""The Ray side: driver, worker actors, layer tasks, and what a run records."""

from distprune.engine.driver import prune
from distprune.engine.run.library import Library
from distprune.engine.run.model_card import suggested_name, write_card
from distprune.engine.run.record import RunRecord, load_record
from distprune.engine.run.status import RunStatus, status
from distprune.engine.scheduler.nodes import Requirements

__all__ = [
    "Library",
    "Requirements",
    "RunRecord",
    "RunStatus",
    "load_record",
    "prune",
    "status",
    "suggested_name",
    "write_card",
]
