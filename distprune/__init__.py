"""distprune: distributed, offline structured pruning of large language models on Ray."""

from typing import TYPE_CHECKING, Any

from distprune.api import calibrate, compare, evaluate, inspect, plan, prune, report, status
from distprune.errors import InputError, RunFailed
from distprune.version import __version__

if TYPE_CHECKING:
    from distprune.modeling import load

__all__ = [
    "InputError",
    "RunFailed",
    "__version__",
    "calibrate",
    "compare",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "prune",
    "report",
    "status",
]


def __getattr__(name: str) -> Any:
    """``load`` is imported when it is asked for: it needs torch, which would hold up ``distprune --help``."""
    if name == "load":
        from distprune.modeling import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
