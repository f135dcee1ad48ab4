"""distprune: distributed, offline structured pruning of large language models on Ray."""

from distprune.api import calibrate, compare, evaluate, inspect, plan, prune, status
from distprune.errors import InputError, RunFailed
from distprune.modeling import load
from distprune.version import __version__

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
    "status",
]
