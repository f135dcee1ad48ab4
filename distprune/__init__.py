"""distprune: distributed, offline structured pruning of large language models on Ray."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distprune.api import calibrate, card, compare, evaluate, inspect, plan, prune, status
from distprune.errors import InputError, RunFailed
from distprune.version import __version__

if TYPE_CHECKING:
    from distprune.config import PruneConfig
    from distprune.engine import RunRecord, suggested_name
    from distprune.modeling import load

__all__ = [
    "InputError",
    "PruneConfig",
    "RunFailed",
    "RunRecord",
    "__version__",
    "calibrate",
    "card",
    "compare",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "prune",
    "status",
    "suggested_name",
]

# What is imported when it is asked for: torch, Ray and pydantic would hold up ``distprune --help``.
LATER = {
    "PruneConfig": "distprune.config",
    "RunRecord": "distprune.engine",
    "load": "distprune.modeling",
    "suggested_name": "distprune.engine",
}


if not TYPE_CHECKING:  # type checkers would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name in LATER:
            return getattr(import_module(LATER[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
