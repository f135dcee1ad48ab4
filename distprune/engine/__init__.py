"""The Ray side: driver, worker actors, layer tasks, and what a run records."""

from distprune.engine.driver import prune
from distprune.engine.record import RunRecord, load_record
from distprune.engine.sites import Needs
from distprune.engine.status import RunStatus, status

__all__ = ["Needs", "RunRecord", "RunStatus", "load_record", "prune", "status"]
