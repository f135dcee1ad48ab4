"""The Ray side: driver, worker actors, layer tasks, and what a run records."""

from distprune.engine.driver import prune
from distprune.engine.record import RunRecord, load_record

__all__ = ["RunRecord", "load_record", "prune"]
